"""What AST's front end and embedder do beyond what all families do."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_ast import save_small_ast
from torch.utils.data import DataLoader, Dataset
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

from lmdbcache.embedders import (
    ASTEmbedder,
    ASTFrontEnd,
    Embedder,
    FrontEnd,
    find_checkpoint,
    weights_digest,
)
from lmdbcache.errors import ConfigError, ModelLoadError


def waveform(num_samples: int = 32000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, num_samples).astype(np.float32)


class Features(Dataset):
    def __init__(self, front_end: ASTFrontEnd) -> None:
        self.front_end = front_end

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> np.ndarray:
        return self.front_end(waveform(seed=index))


@pytest.fixture
def front_end(ast_folder) -> ASTFrontEnd:
    return ASTFrontEnd(find_checkpoint(ast_folder), 16000)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))


# ---- the front end


@pytest.mark.parametrize("num_samples", [400, 5000, 80000])
def test_bit_equal_to_the_extractor(front_end, ast_folder, num_samples):
    """Short clips, padded by the extractor, and long ones, cut by it, to the last bit."""
    extractor = ASTFeatureExtractor.from_pretrained(ast_folder)
    clip = waveform(num_samples)
    expected = extractor(clip, sampling_rate=16000, return_tensors="np").input_values[0]
    features = front_end(clip)
    assert features.dtype == np.float32
    assert features.shape == (128, 128)
    np.testing.assert_array_equal(features, expected)


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_compute_the_same(front_end, context):
    """In DataLoader workers, forked after use or new, every bit is the same."""
    expected = np.stack([front_end(waveform(seed=index)) for index in range(4)])
    loader = DataLoader(
        Features(front_end), batch_size=4, num_workers=1, multiprocessing_context=context
    )
    (features,) = loader
    assert torch.equal(features, torch.from_numpy(expected))


def test_pickles_small_and_keeps_working(front_end):
    """The extractor stays behind."""
    expected = front_end(waveform())
    pickled = pickle.dumps(front_end)
    assert len(pickled) < 500
    np.testing.assert_array_equal(pickle.loads(pickled)(waveform()), expected)
    assert isinstance(front_end, FrontEnd)


def test_a_read_only_waveform_is_taken(front_end):
    """Without torch's warning about memory that can't be written."""
    clip = waveform()
    clip.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = front_end(clip)
    np.testing.assert_array_equal(features, front_end(waveform()))


def test_less_than_one_window_is_refused(front_end):
    """The extractor's assertion never reaches the user."""
    assert front_end.min_samples == 400
    with pytest.raises(ConfigError, match="399"):
        front_end(waveform(399))


@pytest.mark.parametrize("bad", [np.zeros((2, 8000), np.float32), np.zeros(8000, np.int16)])
def test_other_arrays_are_refused(front_end, bad):
    """Integers and stereo would give features of something else."""
    with pytest.raises(ConfigError):
        front_end(bad)


def test_provenance_names_the_implementation(front_end):
    """The one that transformers took, with the versions that decide the features."""
    provenance = front_end.provenance()
    implementation = "numpy" if "mel_filters" in vars(ASTFeatureExtractor()) else "torchaudio"
    assert provenance["feature_extractor"] == implementation
    assert {"transformers", "torchaudio", "soundfile", "soxr"} <= set(provenance)


def run_without_a_working_torchaudio(ast_folder, prelude: str) -> str:
    code = (
        "import sys, numpy\n"
        f"{prelude}\n"
        "from lmdbcache.embedders import ASTFrontEnd, find_checkpoint\n"
        "from lmdbcache.errors import MissingDependencyError\n"
        f"front_end = ASTFrontEnd(find_checkpoint({str(ast_folder)!r}), 16000)\n"
        "try:\n"
        "    front_end(numpy.ones(16000, numpy.float32))\n"
        "    print(front_end.provenance()['feature_extractor'])\n"
        "except MissingDependencyError as error: print('refused:', error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout


def test_a_broken_torchaudio_names_the_remedy(ast_folder, tmp_path):
    """A wheel for other CUDA libraries fails on import; we say which versions fit."""
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('libcudart.so.13')")
    prelude = f"sys.path.insert(0, {str(tmp_path)!r})"
    output = run_without_a_working_torchaudio(ast_folder, prelude)
    assert output.startswith("refused: ")
    assert '"torch>=2.11,<2.15" "torchaudio>=2.11"' in output


def test_without_torchaudio_the_numpy_fbank_is_reported(ast_folder):
    """transformers falls back in silence; the provenance doesn't."""
    prelude = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torchaudio' else find(name, *rest)"
    )
    assert run_without_a_working_torchaudio(ast_folder, prelude).strip() == "numpy"


# ---- the embedder


def test_a_classification_checkpoint_loads(tmp_path, features, capfd):
    """The published checkpoints have a classifier and older module names; both are harmless."""
    config = ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_length=128, num_labels=5
    )
    classifier = ASTForAudioClassification(config).eval()
    save_small_ast(tmp_path, max_length=128)
    classifier.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors")
    assert any("encoder.layer.0.attention.attention.query" in key for key in keys)
    capfd.readouterr()
    embedder = ASTEmbedder(find_checkpoint(tmp_path), device="cpu")
    assert isinstance(embedder, Embedder)
    embeddings = embedder.embed(features)
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        expected = classifier.audio_spectrogram_transformer(features).pooler_output
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)


def test_weights_of_another_shape_are_refused(own_ast_folder):
    """The tensor is named."""
    weights = load_file(own_ast_folder / "model.safetensors")
    weights["layernorm.bias"] = torch.zeros(3)
    save_file(weights, own_ast_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"layernorm.bias \(3,\)"):
        ASTEmbedder(find_checkpoint(own_ast_folder))


@pytest.mark.parametrize("keep", [0, 5, 2000, -1000])
def test_damaged_safetensors(own_ast_folder, keep):
    """A cut-off download is refused."""
    weights = own_ast_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=str(own_ast_folder)):
        ASTEmbedder(find_checkpoint(own_ast_folder))


@pytest.mark.parametrize("content", [b"[1]", b"{\xff", None])
def test_damaged_settings_files(own_ast_folder, content):
    """They aren't replaced by defaults."""
    path = own_ast_folder / "preprocessor_config.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=str(path)):
        ASTFrontEnd(find_checkpoint(own_ast_folder), 16000)
    with pytest.raises(ModelLoadError, match=str(path)):
        ASTEmbedder(find_checkpoint(own_ast_folder))


def test_unknown_arguments(ast_folder, features):
    """Outputs, dtypes, devices and shapes are named with their choices."""
    checkpoint = find_checkpoint(ast_folder)
    with pytest.raises(ConfigError, match="pooler_output, last_hidden_state, mean"):
        ASTEmbedder(checkpoint, output="logits")
    with pytest.raises(ConfigError, match="int8"):
        ASTEmbedder(checkpoint, compute_dtype="int8")
    with pytest.raises(ConfigError, match="gpu"):
        ASTEmbedder(checkpoint, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="cuda"):
            ASTEmbedder(checkpoint, device="cuda")
    with pytest.raises(ConfigError, match=r"\(batch, 128, 128\)"):
        ASTEmbedder(checkpoint).embed(features[:, :100])


def test_provenance(ast_folder):
    """What decides the embedding beyond the config: weights, versions, device, dtype."""
    provenance = ASTEmbedder(find_checkpoint(ast_folder), device="cpu").provenance()
    assert provenance["weights_digest"] == weights_digest(ast_folder)
    assert provenance["torch"] == torch.__version__.split("+")[0]

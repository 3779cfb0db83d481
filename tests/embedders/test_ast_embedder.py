"""The embedder gives what transformers.ASTModel gives, from complete AST checkpoints only."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_ast import save_small_ast
from transformers import ASTConfig, ASTForAudioClassification, ASTModel

from lmdbcache.embedders import ASTEmbedder, Embedder, find_checkpoint, weights_digest
from lmdbcache.errors import ConfigError, ModelLoadError


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))


def by_hand(folder, features: torch.Tensor) -> dict[str, torch.Tensor]:
    model = ASTModel.from_pretrained(folder).eval()
    with torch.no_grad():
        result = model(features)
    return {
        "pooler_output": result.pooler_output,
        "last_hidden_state": result.last_hidden_state,
        "mean": result.last_hidden_state[:, 2:].mean(dim=1),
    }


@pytest.mark.parametrize("output", ASTEmbedder.outputs)
def test_equals_the_model_by_hand(ast_folder, features, output):
    """Each output, float32 on the CPU, with the shape that was promised."""
    embedder = ASTEmbedder(find_checkpoint(ast_folder), output=output, device="cpu")
    embeddings = embedder.embed(features)
    assert embeddings.dtype == torch.float32
    assert embeddings.device.type == "cpu"
    assert not embeddings.requires_grad
    assert tuple(embeddings.shape) == (3, *embedder.embedding_shape)
    torch.testing.assert_close(embeddings, by_hand(ast_folder, features)[output], atol=1e-6, rtol=0)
    assert isinstance(embedder, Embedder)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16"])
def test_lower_compute_dtype(ast_folder, features, compute_dtype):
    """Close to float32, not equal to it, and still handed out as float32."""
    embedder = ASTEmbedder(find_checkpoint(ast_folder), compute_dtype=compute_dtype)
    embeddings = embedder.embed(features)
    expected = by_hand(ast_folder, features)["pooler_output"]
    assert embeddings.dtype == torch.float32
    assert 0 < (embeddings - expected).norm() / expected.norm() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("output", ASTEmbedder.outputs)
def test_a_gpu_agrees_with_the_cpu(ast_folder, features, output):
    """float32 means float32 on a GPU too: no TF32."""
    embedder = ASTEmbedder(find_checkpoint(ast_folder), output=output)
    assert embedder.device.type == "cuda"
    expected = by_hand(ast_folder, features)[output]
    torch.testing.assert_close(embedder.embed(features), expected, atol=2e-5, rtol=0)


def test_a_classification_checkpoint_loads(tmp_path, features, capfd):
    """The published checkpoints have a classifier and older module names; both are harmless."""
    config = ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_length=128, num_labels=5
    )
    classifier = ASTForAudioClassification(config).eval()
    save_small_ast(tmp_path, max_length=128)
    classifier.save_pretrained(tmp_path)
    assert any("encoder.layer.0.attention.attention.query" in key for key in keys_of(tmp_path))
    capfd.readouterr()
    embeddings = ASTEmbedder(find_checkpoint(tmp_path), device="cpu").embed(features)
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        expected = classifier.audio_spectrogram_transformer(features).pooler_output
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)


def keys_of(folder) -> list[str]:
    return sorted(load_file(folder / "model.safetensors"))


def rewrite(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder) -> str:
    with pytest.raises(ModelLoadError) as caught:
        ASTEmbedder(find_checkpoint(folder))
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_missing_weights_are_refused(own_ast_folder):
    """transformers would fill them with random numbers and go on."""
    rewrite(own_ast_folder, lambda weights: weights.pop("layernorm.weight"))
    message = refusal(own_ast_folder)
    assert "missing keys: layernorm.weight" in message
    assert "random" in message


def test_weights_of_another_shape_are_refused(own_ast_folder):
    """The tensor is named."""
    rewrite(own_ast_folder, lambda weights: weights.update({"layernorm.bias": torch.zeros(3)}))
    assert "mismatched keys: layernorm.bias (3,) instead of (64,)" in refusal(own_ast_folder)


def test_half_precision_weights_compute_in_float32(own_ast_folder, features):
    """transformers 5 would otherwise run the model in the checkpoint's own dtype."""
    ASTModel.from_pretrained(own_ast_folder).half().save_pretrained(own_ast_folder)
    assert json.loads((own_ast_folder / "config.json").read_text())["dtype"] == "float16"
    assert ASTModel.from_pretrained(own_ast_folder).dtype == torch.float16
    embeddings = ASTEmbedder(find_checkpoint(own_ast_folder), device="cpu").embed(features)
    model = ASTModel.from_pretrained(own_ast_folder).float().eval()
    with torch.no_grad():
        expected = model(features).pooler_output
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("keep", [0, 5, 2000, -1000])
def test_damaged_safetensors(own_ast_folder, keep):
    """A cut-off download is refused."""
    weights = own_ast_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refusal(own_ast_folder)


def test_pickled_code_never_runs(own_ast_folder, tmp_path):
    """A pytorch_model.bin that is a malicious pickle is refused, not executed."""
    victim = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return (open, (str(victim), "w"))

    (own_ast_folder / "model.safetensors").unlink()
    torch.save({"layernorm.weight": Malicious()}, own_ast_folder / "pytorch_model.bin")
    refusal(own_ast_folder)
    assert not victim.exists()


def test_other_models_and_damaged_settings(own_ast_folder):
    """Each of the two JSON files is checked for what it is for."""
    config, preprocessor = (
        own_ast_folder / name for name in ("config.json", "preprocessor_config.json")
    )
    edit(config, max_length=1024)
    assert "max_length is 1024 in config.json and 128" in refusal(own_ast_folder)
    edit(config, model_type="wav2vec2")
    assert "model_type 'wav2vec2'" in refusal(own_ast_folder)
    edit(config, model_type="audio-spectrogram-transformer", max_length=128)
    edit(preprocessor, feature_extractor_type="WhisperFeatureExtractor")
    assert "WhisperFeatureExtractor" in refusal(own_ast_folder)
    preprocessor.write_text("[1]")
    assert "not a JSON object" in refusal(own_ast_folder)
    preprocessor.write_bytes(b"{\xff")
    assert "not readable as JSON" in refusal(own_ast_folder)
    preprocessor.unlink()
    assert "preprocessor_config.json: missing" in refusal(own_ast_folder)


def test_unknown_arguments(ast_folder, features):
    """Outputs, dtypes, devices and shapes are named with their choices."""
    checkpoint = find_checkpoint(ast_folder)
    with pytest.raises(ConfigError, match="pooler_output, last_hidden_state, mean"):
        ASTEmbedder(checkpoint, output="logits")
    with pytest.raises(ConfigError, match="compute_dtype: 'int8'"):
        ASTEmbedder(checkpoint, compute_dtype="int8")
    with pytest.raises(ConfigError, match="device: 'gpu'"):
        ASTEmbedder(checkpoint, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device: 'cuda'"):
            ASTEmbedder(checkpoint, device="cuda")
    with pytest.raises(ConfigError, match=r"takes \(batch, 128, 128\)"):
        ASTEmbedder(checkpoint).embed(features[:, :100])


def test_provenance(ast_folder):
    """What decides the embedding beyond the config: weights, versions, device, dtype."""
    provenance = ASTEmbedder(find_checkpoint(ast_folder), device="cpu").provenance()
    assert provenance["weights_digest"] == weights_digest(ast_folder)
    assert provenance["device"] == "cpu"
    assert provenance["compute_dtype"] == "float32"
    assert provenance["torch"] == torch.__version__.split("+")[0]
    assert "transformers" in provenance

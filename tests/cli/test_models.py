"""Models of every family on the command line, with nothing said but the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from embedders.small_folders import folder_of

from lmdbcache import EmbeddingCache, config_for
from lmdbcache.audio import load_waveform
from lmdbcache.config import DEFAULT_FRONT_END

CLASSES = ("--class", "dog", "--class", "drum")


@pytest.mark.parametrize(
    ("variant", "output", "shape"),
    [
        ("wav2vec2-masked", None, [32]),
        ("whisper", "mean", [32]),
        ("clap", None, [64]),
    ],
)
def test_extract_and_look(cli, data, tmp_path, variant, output, shape):
    """A dry run, the extraction, the coverage: one config, which follows from the model."""
    options = [*CLASSES, "--model", folder_of(variant), "--duration", 1]
    options += ["--output", output] if output else []
    plan = json.loads(cli("extract", data, *options, "--dry-run", "--json").stdout)
    assert plan["embedding_shape"] == shape
    assert not (tmp_path / "cache").exists()
    result = cli("extract", data, *options, "--num-workers", 1)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith("6 samples: 0 were cached, 6 extracted, 0 failed")
    found = cli("coverage", data, *options)
    assert found.returncode == 0
    assert "6 of 6 stored" in found.stdout
    config = config_for(folder_of(variant), output=output, duration=1.0, namespace="vegas")
    cache = EmbeddingCache(tmp_path / "cache")
    assert list(cache) == [config]
    (info,) = cache.stores()
    assert list(info.embedding_shape) == shape


def test_the_stored_values_are_the_models(cli, data, tmp_path):
    """Those of transformers by hand, from the wav file on."""
    folder = folder_of("hubert")
    options = (*CLASSES, "--model", folder, "--output", "mean", "--duration", 0.5)
    assert cli("extract", data, *options).returncode == 0
    config = config_for(folder, output="mean", duration=0.5, namespace="vegas")
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    with EmbeddingCache(tmp_path / "cache").reader(config) as reader:
        assert len(reader) == 6
        for path in data.glob("*/audios/*.wav"):
            clip = load_waveform(path, 16000, 0.5)
            inputs = extractor(clip, sampling_rate=16000, return_tensors="pt")
            with torch.no_grad():
                expected = model(**inputs).last_hidden_state.mean(dim=1)[0].numpy()
            stored = reader[f"{path.stem}:{path.parts[-3]}"]
            np.testing.assert_allclose(stored, expected, atol=5e-6)


@pytest.mark.parametrize(
    ("variant", "options", "words"),
    [
        ("wav2vec2", ["--output", "pooler_output"], ["mean, last_hidden_state"]),
        ("clap", ["--output", "mean"], ["pooler_output, audio_embeds, last_hidden_state"]),
        ("clap", ["--sample-rate", "16000"], ["--sample-rate 48000"]),
        ("whisper", ["--duration", "2.5"], ["2 s or less"]),
        ("wav2vec2", ["--duration", "0.01"], ["160 samples", "400"]),
        ("wav2vec2", ["--front-end", DEFAULT_FRONT_END], ["that of AST"]),
    ],
)
def test_what_a_model_cant_do(refused, data, variant, options, words):
    """One line that says what it can."""
    line = refused("extract", data, *CLASSES, "--model", folder_of(variant), *options)
    assert all(word in line for word in words)


def test_a_kind_that_isnt_known(refused, data, tmp_path):
    """Names the kinds that are, and the way for all others."""
    (tmp_path / "bert").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "bert" / name).write_text('{"model_type": "bert"}')
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"")
    for command in ("extract", "coverage"):
        line = refused(command, data, *CLASSES, "--model", tmp_path / "bert")
        assert "'bert'" in line
        assert "ModuleEmbedder" in line


def test_a_module_has_its_store_looked_at(cli, data):
    """What identifies it can be said by hand."""
    options = ("--model-name", "my-net/1", "--front-end", "mine/1", "--output", "embedding")
    result = cli("coverage", data, *options, "--sample-rate", 22050, "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["num_present"] == 0


@pytest.mark.parametrize("command", [["coverage"], ["extract", "--dry-run"]])
def test_looking_imports_nothing_heavy(imported, command, data):
    """config.json says enough."""
    heavy = ["torch", "transformers", "torchaudio", "soundfile", "soxr", "tqdm"]
    assert not imported(heavy, *command, data, "--model", folder_of("clap"))[1]

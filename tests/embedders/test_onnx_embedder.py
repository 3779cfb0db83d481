"""ONNXEmbedder: the contract, torch's own embeddings, what is refused, and the digest."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import soundfile
import torch
from embedders.test_contract import energies, net

from lmdbcache import EmbeddingCache, ModuleEmbedder, ONNXEmbedder, config_for, extract
from lmdbcache.errors import ConfigError, ModelLoadError, ProvenanceMismatchError
from lmdbcache.testing import ModelContract

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
FRONT_END = {"front_end": energies, "front_end_id": "log-energy/1"}


def export(module, path, batch=None):
    """Write a module of (batch, 100) → (batch, 16), of any batch size or a fixed one."""
    inputs = torch.zeros(batch or 2, 100)
    axes = None if batch else {"features": {0: "batch"}, "embedding": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the new exporter takes 16 s
        names = {"input_names": ["features"], "output_names": ["embedding"]}
        torch.onnx.export(module.eval(), (inputs,), path, dynamo=False, dynamic_axes=axes, **names)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return export(net(), tmp_path_factory.mktemp("onnx") / "net.onnx")


def onnx_model(path):
    return ONNXEmbedder(path, name="energy-net/1", sample_rate=16000, **FRONT_END)


class TestONNX(ModelContract):
    @pytest.fixture(autouse=True)
    def _keep(self, file):
        type(self).file = file

    def make_model(self):
        return onnx_model(self.file)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(5):
        noise = np.random.default_rng(seed).uniform(-0.3, 0.3, 16000)
        soundfile.write(folder / f"{seed}.wav", noise * (1 + seed) / 5, 16000)
    return {f"{seed}:x": str(folder / f"{seed}.wav") for seed in range(5)}


@pytest.mark.parametrize("batch", [None, 1])
def test_extracts_what_torch_does(tmp_path, clips, file, batch):
    """Within rounding; a file of batch 1 gives the same, clip by clip."""
    path = export(net(), tmp_path / "one.onnx", batch) if batch else file
    model = onnx_model(path)
    module = ModuleEmbedder(net(), name="energy-net/1", sample_rate=16000, **FRONT_END)
    config = config_for(model, duration=1.0)
    assert config == config_for(module, duration=1.0, output="embedding")
    caches = [EmbeddingCache(tmp_path / name) for name in ("onnx", "torch")]
    for cache, one in zip(caches, (model, module), strict=True):
        extract(cache, config, clips, model=one, num_workers=0, batch_size=4)
    with caches[0].reader(config) as found, caches[1].reader(config) as expected:
        assert len(found.metadata.provenance["weights_digest"]) == 16
        np.testing.assert_allclose(
            found.get_batch(list(clips)), expected.get_batch(list(clips)), atol=1e-5
        )


def test_the_digest_has_the_weights_beside_the_file(tmp_path, clips, file):
    """A changed weight in another file is noticed; the file's own name and place don't matter."""
    model = onnx.load(file)
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, size_threshold=0)
    (weights,) = [path for path in tmp_path.iterdir() if path.suffix != ".onnx"]
    cache = EmbeddingCache(tmp_path / "cache")
    config = config_for(onnx_model(tmp_path / "a.onnx"), duration=1.0)
    one, *rest = clips.items()
    extract(cache, config, dict([one]), model=onnx_model(tmp_path / "a.onnx"), num_workers=0)
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(tmp_path / "a.onnx", moved / "b.onnx")
    shutil.copy(weights, moved)
    extract(cache, config, dict(rest[:1]), model=onnx_model(moved / "b.onnx"), num_workers=0)
    values = np.frombuffer((moved / weights.name).read_bytes(), np.float32) + 1
    (moved / weights.name).write_bytes(values.tobytes())
    with pytest.raises(ProvenanceMismatchError):
        extract(cache, config, dict(rest), model=onnx_model(moved / "b.onnx"), num_workers=0)


def test_what_cannot_be_run_is_refused(tmp_path, file):
    """Not an ONNX file, a batch of 4, a lower precision, an output that isn't there."""
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ModelLoadError):
        onnx_model(tmp_path / "text.onnx")
    fixed = onnx_model(export(net(), tmp_path / "four.onnx", 4))
    with pytest.raises(ConfigError):
        fixed.make_embedder(config_for(fixed, duration=1.0))
    model = onnx_model(file)
    with pytest.raises(ConfigError):
        model.check(config_for(model, duration=1.0, compute_dtype="bfloat16"))
    with pytest.raises(ConfigError):
        ONNXEmbedder(file, name="x", sample_rate=16000, outputs={"pooled": "nothing"})
    renamed = ONNXEmbedder(file, name="x", sample_rate=16000, outputs={"pooled": "embedding"})
    assert renamed.outputs == ("pooled",)
    with pytest.raises(ConfigError):
        model.make_embedder(config_for(model, duration=1.0), "tpu")

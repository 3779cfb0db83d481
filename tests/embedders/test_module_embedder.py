"""Any torch.nn.Module: run as it should be, left as it was, and known by name and weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from extraction.clips import write_tones

from lmdbcache import EmbeddingCache, ModuleEmbedder, config_for, extract
from lmdbcache.embedders import AudioModel
from lmdbcache.errors import ConfigError, ExtractionError, ProvenanceMismatchError
from lmdbcache.extraction import plan_extraction

DURATION = 0.5


def frames(waveform: np.ndarray) -> np.ndarray:
    return waveform.reshape(-1, 80)


class Net(torch.nn.Module):
    """Convolution, batch norm and dropout over frames of 80 samples."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = torch.nn.Conv1d(80, 8, 3)
            self.norm = torch.nn.BatchNorm1d(8)
            self.drop = torch.nn.Dropout(0.5)

    def forward(self, features):
        hidden = self.drop(self.norm(self.conv(features.transpose(1, 2))))
        return {"pooled": hidden.mean(dim=2), "hidden": hidden}


OUTPUTS = {"pooled": lambda r: r["pooled"], "hidden": lambda r: r["hidden"]}


def make(module=None, **changes):
    options = {
        "name": "my-net/1",
        "sample_rate": 16000,
        "front_end": frames,
        "front_end_id": "frames-80/1",
        "outputs": OUTPUTS,
    }
    return ModuleEmbedder(module or Net(), **{**options, **changes})


@pytest.fixture
def clips(tmp_path):
    return write_tones(tmp_path / "clips", 5)


@pytest.fixture
def cache(tmp_path):
    return EmbeddingCache(tmp_path / "cache")


def run(cache, embedder, clips, config=None, **options):
    config = config or config_for(embedder, duration=DURATION)
    options = {"num_workers": 0, "batch_size": 2, **options}
    return extract(cache, config, clips, model=embedder, **options)


def test_config():
    """The identity has the name, the decoder and the front end, and the first output."""
    embedder = make()
    assert isinstance(embedder, AudioModel)
    config = config_for(embedder, duration=DURATION)
    assert config.model_name == "my-net/1"
    assert config.output == "pooled"
    assert config.front_end == "soundfile+soxr-hq+mono-mean+frames-80/1"
    plain = config_for(ModuleEmbedder(Net(), name="my-net/1", sample_rate=16000))
    assert plain.output == "embedding"
    assert plain.front_end == "soundfile+soxr-hq+mono-mean+zero-pad+waveform/1"


@pytest.mark.parametrize(("output", "shape"), [("pooled", (8,)), ("hidden", (8, 98))])
def test_extraction(cache, clips, output, shape):
    """In worker processes and by hand: every value is the same."""
    module = Net()
    embedder = make(module)
    config = config_for(embedder, output=output, duration=DURATION)
    assert plan_extraction(cache, config, clips, model=embedder).embedding_shape == shape
    summary = run(cache, embedder, clips, config, num_workers=2)
    assert (summary.num_extracted, summary.failures) == (5, ())
    front_end = embedder.make_front_end(config)
    assert front_end.min_samples == 1
    module.eval()
    from lmdbcache.audio import load_waveform

    with cache.reader(config) as reader, torch.no_grad():
        assert reader.embedding_shape == shape
        for sample_id, path in clips.items():
            features = frames(load_waveform(path, 16000, DURATION))
            expected = module(torch.from_numpy(features)[None])[output][0].numpy()
            np.testing.assert_allclose(reader[sample_id], expected, atol=1e-6)


def test_the_module_is_left_as_it_was(cache, clips):
    """Modes, weights, running statistics and gradients, of every part."""
    module = Net().train()
    module.norm.eval()  # a frozen part
    module.conv.weight.grad = torch.ones_like(module.conv.weight)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run(cache, make(module), clips)
    assert module.training
    assert module.drop.training
    assert not module.norm.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert (module.conv.weight.grad == 1).all()
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_modes_come_back_after_an_error():
    """Also when the module fails in the middle of a batch."""
    module = Net().train()
    embedder = make(module)
    runner = embedder.make_embedder(config_for(embedder, duration=DURATION))
    with pytest.raises(RuntimeError):
        runner.embed(torch.zeros(1, 3, 3))
    assert module.training
    assert module.norm.training


def test_other_weights_under_one_name_are_refused(cache, clips):
    """After training on, say; the first embeddings stay."""
    ids = list(clips)
    run(cache, make(), {ids[0]: clips[ids[0]]})
    with pytest.raises(ProvenanceMismatchError, match="weights_digest"):
        run(cache, make(Net(seed=1)), clips)
    assert run(cache, make(name="my-net/2"), clips).num_extracted == 5
    assert run(cache, make(), clips).num_extracted == 4


@pytest.mark.parametrize("part", ["weight", "buffer", "unsaved buffer"])
def test_the_digest_sees_every_number(part):
    """Parameters and buffers, persistent or not, each last bit."""
    modules = [Net(), Net()]
    for number, module in enumerate(modules):
        module.register_buffer("window", torch.ones(4), persistent=False)
        with torch.no_grad():
            if part == "weight":
                module.conv.bias[0] += number * 1e-6
            elif part == "buffer":
                module.norm.running_mean[0] += number
            else:
                module.window[0] += number
    one, two = (
        make(module)
        .make_embedder(config_for(make(module), duration=DURATION))
        .provenance()["weights_digest"]
        for module in modules
    )
    assert one != two
    assert len(one) == 16


def test_nan_is_refused_by_name(cache, clips):
    """The clip fails with a reason; the others are stored."""

    class Sometimes(torch.nn.Module):
        def forward(self, waveforms):
            mean = waveforms[:, :400].abs().mean(dim=1, keepdim=True)
            return torch.where(waveforms[:, 7:8] == self.seventh, torch.nan, mean)

    from lmdbcache.audio import load_waveform

    module = Sometimes()
    module.seventh = float(load_waveform(clips["video_00003:dog"], 16000, DURATION)[7])
    embedder = ModuleEmbedder(module, name="sometimes", sample_rate=16000)
    summary = run(cache, embedder, clips)
    (failure,) = summary.failures
    assert failure.sample_id == "video_00003:dog"
    assert "NaN" in failure.reason
    assert summary.num_extracted == 4


def test_a_config_of_another_model_is_refused(cache, clips):
    """Name, front end and sample rate have to be the module's own."""
    embedder = make()
    config = config_for(embedder, duration=DURATION)
    for field, other in (("model_name", "ast"), ("front_end", "x/1"), ("sample_rate", 8000)):
        with pytest.raises(ConfigError, match=field):
            run(cache, embedder, clips, config.replace(**{field: other}))
    with pytest.raises(ConfigError, match="pooled, hidden"):
        run(cache, embedder, clips, config.replace(output="mean"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"front_end_id": None}, "front_end_id"),
        ({"front_end": None}, "front_end_id"),
        ({"front_end_id": "with spaces"}, "front_end"),
        ({"name": ""}, "model_name"),
        ({"sample_rate": 0}, "sample_rate"),
        ({"outputs": {}}, "outputs"),
        ({"outputs": {"a b": lambda r: r}}, "output"),
    ],
)
def test_what_cant_identify_a_model(changes, reason):
    """Is refused when it is made."""
    with pytest.raises(ConfigError, match=reason):
        make(**changes)


def test_not_a_module():
    """A class instead of an instance, or a function."""
    with pytest.raises(ConfigError, match="module"):
        make(Net)
    with pytest.raises(ConfigError, match="module"):
        make(frames)


@pytest.mark.parametrize(
    "outputs",
    [None, {"pooled": lambda r: r["pooled"][0]}, {"pooled": lambda r: r["pooled"].sum()}],
)
def test_a_result_that_isnt_one_row_per_clip(outputs, cache, clips):
    """A dict without `outputs`, a single row, a number: what is wrong and how to say it."""
    embedder = make(outputs=outputs)
    with pytest.raises(ConfigError, match="outputs"):
        run(cache, embedder, clips)


def test_complex_embeddings_are_refused(cache, clips):
    """They aren't stored as their real part; as pairs of real numbers they are."""
    outputs = {"spectrum": lambda result: torch.fft.rfft(result["pooled"])}
    with pytest.raises(ConfigError, match="spectrum"):
        run(cache, make(outputs=outputs), clips)
    assert cache.stores() == []
    outputs = {"spectrum": lambda result: torch.view_as_real(torch.fft.rfft(result["pooled"]))}
    embedder = make(outputs=outputs)
    run(cache, embedder, clips)
    with cache.reader(config_for(embedder, duration=DURATION)) as reader:
        assert reader.embedding_shape == (5, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "made",
    [
        torch.Tensor.to_sparse,
        lambda values: torch.quantize_per_tensor(values, 0.1, 0, torch.qint8),
        lambda values: torch.nested.nested_tensor(list(values)),
    ],
    ids=["sparse", "quantized", "nested"],
)
def test_tensors_that_are_no_array_are_refused(cache, clips, made):
    """In our words, and nothing is stored."""
    embedder = make(outputs={"odd": lambda result: made(result["pooled"])})
    with pytest.raises(ConfigError, match="odd"):
        run(cache, embedder, clips)
    assert cache.stores() == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_front_end_that_fails(num_workers, cache, clips):
    """Ends the run with one line, from a worker too."""
    embedder = make(front_end=lambda waveform: waveform.reshape(-1, 79))
    with pytest.raises(ExtractionError, match="frames-80/1"):
        run(cache, embedder, clips, num_workers=num_workers)


def test_features_of_torch_and_other_dtypes():
    """A front end may give a tensor or float64."""
    embedder = make(front_end=lambda waveform: torch.from_numpy(frames(waveform)).double())
    front_end = embedder.make_front_end(config_for(embedder, duration=DURATION))
    assert front_end(np.ones(160, np.float32)).dtype == np.float32


def test_unknown_device():
    """Named as for any other model."""
    embedder = make()
    with pytest.raises(ConfigError, match="tpu9"):
        embedder.make_embedder(config_for(embedder, duration=DURATION), "tpu9")


@pytest.mark.gpu
def test_on_a_gpu():
    """Moved there when asked, and left on the device that it is on otherwise."""
    module, embedder = Net(), None
    embedder = make(module)
    config = config_for(embedder, duration=DURATION)
    features = torch.randn(3, 100, 80, generator=torch.Generator().manual_seed(0))
    on_cpu = embedder.make_embedder(config).embed(features)
    runner = embedder.make_embedder(config, "cuda")
    assert runner.provenance()["device"] == "cuda"
    assert embedder.make_embedder(config).device.type == "cuda"
    torch.testing.assert_close(runner.embed(features), on_cpu, atol=1e-5, rtol=1e-5)

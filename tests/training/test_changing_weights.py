"""Weights that change while their embeddings are stored are noticed before the next computation."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch

from lmdbcache import (
    CacheConfig,
    CachedEncoder,
    EmbeddingCache,
    ModuleEmbedder,
    config_for,
    extract,
)
from lmdbcache.embedders.module_weights import WatchedWeights
from lmdbcache.errors import ConfigError, ProvenanceMismatchError

CONFIG = CacheConfig(model_name="own", front_end="own/1", output="embedding", duration=1.0)
INPUTS = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
NAMES = [f"{letter}:x" for letter in "abcdef"]


class Network(torch.nn.Module):
    """With a persistent buffer, another one, and a cache that each forward pass writes."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
            self.register_buffer("filters", torch.rand(16), persistent=False)
        self.norm = torch.nn.BatchNorm1d(16)
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, inputs):
        self.cache = torch.full((len(inputs),), 2.0)
        return self.last(self.norm(self.first(inputs)) * self.filters)


def other():
    return Network(seed=1)


def load(module):
    module.load_state_dict(other().state_dict())


def average(module):
    with torch.no_grad():
        for mine, online in zip(module.parameters(), other().parameters(), strict=True):
            mine.mul_(0.9).add_(online, alpha=0.1)


def average_data(module):
    for mine, online in zip(module.parameters(), other().parameters(), strict=True):
        mine.data.mul_(0.9).add_(online.data, alpha=0.1)


def average_state(module):
    for mine, online in zip(
        module.state_dict().values(), other().state_dict().values(), strict=True
    ):
        mine.copy_(0.9 * mine + 0.1 * online)


def assign_data(module):
    module.first.weight.data = other().first.weight.data


def through_numpy(module):
    module.last.weight.detach().numpy()[:] += 1


def one_element(module):
    with torch.no_grad():
        module.first.weight[3, 5] += 1e-3


def buffer(module):
    module.norm.running_mean.add_(1)


def filters(module):
    module.filters.mul_(2)


def replaced_parameter(module):
    module.last.weight = torch.nn.Parameter(other().last.weight.detach(), requires_grad=False)


def replaced_layer(module):
    module.last = other().last


def half(module):
    module.half()


CHANGES = [
    load, average, average_data, average_state, assign_data, through_numpy, one_element, buffer,
    filters, replaced_parameter, replaced_layer, half,
]  # fmt: skip


def nothing(module):
    del module


def moved(module):
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def loaded_again(module):
    module.load_state_dict(Network().state_dict())


def copied(module):
    for name, held in module.named_buffers():
        module.get_submodule(name.rpartition(".")[0]).register_buffer(
            name.rpartition(".")[2], held.clone(), persistent="norm" in name
        )


def compiled(module):
    module.compile(backend="eager")


@pytest.fixture
def cache(tmp_path):
    return EmbeddingCache(tmp_path / "cache")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("build", [False, True])
def test_other_weights_are_refused(cache, change, build):
    """Hits of the batch included, whether the module was given or built; nothing is stored."""
    module = Network()
    with CachedEncoder(cache, CONFIG, (lambda: module) if build else module) as encoder:
        encoder(INPUTS[:2], sample_ids=NAMES[:2])
        change(module)
        for _ in range(2):
            with pytest.raises(ProvenanceMismatchError):
                encoder(INPUTS[:4], sample_ids=NAMES[:4])
        module.float()
        module.last, module.first = Network().last, Network().first
        module.load_state_dict(Network().state_dict())
        module.filters = Network().filters
        encoder(INPUTS[:5], sample_ids=NAMES[:5])  # its own weights again
    with cache.reader(CONFIG) as reader:
        assert sorted(reader) == NAMES[:5]
        expected = Network()(INPUTS)
        for name, row in zip(NAMES[:5], expected, strict=False):
            np.testing.assert_allclose(reader[name], row.numpy(), atol=1e-5)


@pytest.mark.parametrize("change", [load, average, one_element, buffer, filters])
def test_mere_hits_are_refused_where_a_write_was_counted(cache, change):
    """The stored embeddings aren't those of the weights that the module has now."""
    module = Network()
    with CachedEncoder(cache, CONFIG, module) as encoder:
        encoder(INPUTS[:2], sample_ids=NAMES[:2])
        encoder(INPUTS[:2], sample_ids=NAMES[:2])
        change(module)
        with pytest.raises(ProvenanceMismatchError):
            encoder(INPUTS[:2], sample_ids=NAMES[:2])
        module.load_state_dict(Network().state_dict())
        module.filters = Network().filters
        encoder(INPUTS[:2], sample_ids=NAMES[:2])


@pytest.mark.parametrize("change", [nothing, moved, loaded_again, copied, compiled])
def test_equal_weights_go_on(cache, change):
    """Moved, loaded or written again, or compiled; so do caches that a forward pass writes."""
    module = Network()
    with CachedEncoder(cache, CONFIG, module) as encoder:
        for start in range(3):
            encoder(INPUTS[start : start + 2], sample_ids=NAMES[start : start + 2])
            change(module)
        assert encoder.num_computed == 4


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_watches_its_own_module(again):
    """And compares it with the digest it brings along."""
    watched = again(WatchedWeights(Network()))
    watched.check()
    average(watched._module)
    with pytest.raises(ProvenanceMismatchError):
        watched.check()


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(Network(), {torch.nn.Linear})


@pytest.mark.filterwarnings("ignore")
def test_packed_parameters_are_watched():
    """What isn't a tensor of the module changes no counter."""
    module = quantized()
    watched = WatchedWeights(module)
    watched.check()
    weight, bias = module.last._packed_params._weight_bias()
    module.last.set_weight_bias(weight, bias + 1)
    with pytest.raises(ProvenanceMismatchError):
        watched.check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "frozen",
    [
        quantized,
        lambda: torch.jit.script(torch.nn.Linear(8, 4).eval().requires_grad_(False)),
        lambda: torch.jit.freeze(torch.jit.script(torch.nn.Linear(8, 4).eval())),
    ],
    ids=["quantized", "scripted", "frozen script"],
)
def test_modules_without_a_mode_of_their_own_are_frozen(cache, frozen):
    """Their parts are in training mode or have none, which changes nothing in what they compute."""
    module = frozen()
    expected = module(INPUTS)
    for number, given in enumerate((module, lambda: module)):
        config = CacheConfig(model_name=f"own/{number}", output="embedding", duration=1.0)
        with CachedEncoder(cache, config, given) as encoder:
            torch.testing.assert_close(encoder(INPUTS, sample_ids=NAMES), expected)
    embedder = ModuleEmbedder(frozen(), name="own/2", sample_rate=8)
    embedder.make_embedder(config_for(embedder, duration=1.0)).embed(INPUTS)


@pytest.mark.filterwarnings("ignore")
def test_quantized_dropout_in_training_mode_is_not_frozen(cache):
    """The one quantized part that a mode changes."""
    module = torch.nn.Sequential(torch.nn.LSTM(4, 4, num_layers=2, dropout=0.5))
    module = torch.ao.quantization.quantize_dynamic(module, {torch.nn.LSTM}).eval()
    module[0].train()
    config = CacheConfig(model_name="own", output="embedding", duration=1.0)
    with pytest.raises(ConfigError):
        CachedEncoder(cache, config, module)


def test_a_digest_is_the_same_through_both_doors(cache, tmp_path):
    """A store that `extract` filled goes on with `CachedEncoder`, and the other way round."""
    from extraction.clips import write_tones

    module = torch.nn.Linear(8000, 4).eval().requires_grad_(False)
    embedder = ModuleEmbedder(module, name="own/1", sample_rate=16000)
    config = config_for(embedder, duration=0.5)
    clips = write_tones(tmp_path / "clips", 3)
    extract(cache, config, clips, model=embedder, num_workers=0)
    with CachedEncoder(cache, config, module) as encoder:
        encoder(torch.randn(1, 8000), sample_ids=["further:x"])
    extract(
        cache, config, {**clips, "more:x": next(iter(clips.values()))}, model=embedder,
        num_workers=0,
    )  # fmt: skip
    assert len(cache.reader(config)) == 5


def test_an_embedder_notices_it_too(cache):
    """A `ModuleEmbedder` around a module that is being trained elsewhere."""
    module = Network()
    source = ModuleEmbedder(module, name="own/1", sample_rate=8)
    embedder = source.make_embedder(config_for(source, duration=1.0))
    embedder.embed(INPUTS)
    embedder.embed(INPUTS[:3])
    average_data(module)
    with pytest.raises(ProvenanceMismatchError):
        embedder.embed(INPUTS)

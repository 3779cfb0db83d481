"""CachedEncoder with a name, a folder or an AudioModel: looked up and loaded when it is needed."""

from __future__ import annotations

import copy
import pickle
from functools import cache as once
from pathlib import Path

import numpy as np
import pytest
import torch
from embedders.small_folders import folder_of
from small_models import save_small_model

from lmdbcache import CachedEncoder, ModuleEmbedder, config_for
from lmdbcache.embedders import find_model, weights_digest
from lmdbcache.errors import ConfigError, ModelLoadError, ProvenanceMismatchError


def folder():
    return folder_of("wav2vec2")


@once
def config_of():
    return config_for(folder(), duration=0.1)


def to_clips(numbers):
    return [
        np.random.default_rng(n).uniform(-0.5, 0.5, config_of().num_samples).astype(np.float32)
        for n in numbers
    ]


def ask(encoder, numbers):
    return encoder(to_clips(numbers), sample_ids=[f"clip_{n}:x" for n in numbers])


@pytest.mark.parametrize("form", [str, Path, find_model], ids=["str", "Path", "AudioModel"])
def test_forms_of_a_model(form, cache):
    """Each gives the same embeddings and notes the same weights."""
    with CachedEncoder(cache, config_of(), form(folder())) as encoder:
        found = ask(encoder, [0, 1])
        assert found.shape == (2, 32)
        assert encoder.front_end is encoder.front_end
    embedder = find_model(folder()).make_embedder(config_of(), "cpu")
    front_end = find_model(folder()).make_front_end(config_of())
    with CachedEncoder(cache, config_of(), embedder, front_end=front_end) as by_hand:
        assert torch.equal(ask(by_hand, [0, 1]), found)
        assert by_hand.num_hits == 2
    provenance = cache.info(config_of()).provenance
    assert provenance["weights_digest"] == weights_digest(folder())
    assert ("checkpoint" in provenance) == (form is not find_model)


def test_hits_need_no_model(cache, tmp_path):
    """A folder that is gone is told at the first miss, and not before."""
    with CachedEncoder(cache, config_of(), folder()) as encoder:
        found = ask(encoder, [0, 1])
    with CachedEncoder(cache, config_of(), tmp_path / "gone") as encoder:
        assert torch.equal(ask(encoder, [0, 1]), found)
        with pytest.raises(ModelLoadError):
            ask(encoder, [0, 2])
        with pytest.raises(ModelLoadError):
            _ = encoder.front_end


def test_other_weights_are_refused(cache, tmp_path):
    """A store that other weights filled isn't continued, whatever the config calls them."""
    with CachedEncoder(cache, config_of(), folder()) as encoder:
        ask(encoder, [0])
    other = save_small_model("wav2vec2", tmp_path / "other", seed=1)
    with CachedEncoder(cache, config_of(), other) as encoder:
        with pytest.raises(ProvenanceMismatchError):
            ask(encoder, [0, 1])
    assert len(cache.coverage(config_of(), ["clip_0:x", "clip_1:x"]).missing) == 1


def test_a_model_that_does_not_fit_the_config(cache):
    """Named before anything is computed: an AudioModel's at once, a name's at the first miss."""
    wrong = config_of().replace(output="pooler_output")
    with pytest.raises(ConfigError):
        CachedEncoder(cache, wrong, find_model(folder()))
    with CachedEncoder(cache, wrong, folder()) as encoder:
        with pytest.raises(ConfigError):
            ask(encoder, [0])
    with CachedEncoder(cache, config_of(), folder_of("ast")) as encoder:
        with pytest.raises(ConfigError):
            ask(encoder, [0])
    assert config_of() not in cache


def test_a_module_of_your_own_is_frozen(cache):
    """One with parameters that require grad is refused, at once and later; its mode is its own."""
    net = torch.nn.Linear(1600, 4)
    model = ModuleEmbedder(net, name="net/1", sample_rate=16000)
    config = config_for(model, duration=0.1)
    with pytest.raises(ConfigError):
        CachedEncoder(cache, config, model)
    net.requires_grad_(False)
    with CachedEncoder(cache, config, model) as encoder:
        assert torch.equal(ask(encoder, [0]), net(torch.from_numpy(to_clips([0])[0]))[None])
        assert net.training
        net.requires_grad_(True)
        with pytest.raises(ConfigError):
            ask(encoder, [1])


def test_pickles_and_copies_without_weights(cache):
    """The name travels; a copy loads the model itself when it has to."""
    with CachedEncoder(cache, config_of(), folder()) as encoder:
        found = ask(encoder, [0])
        encoder.flush()
        pickled = pickle.dumps(encoder)
        assert len(pickled) < 20_000
        for copied in (pickle.loads(pickled), copy.deepcopy(encoder)):
            assert not copied._frozen.is_built
            assert torch.equal(ask(copied, [0]), found)
            assert not copied._frozen.is_built
            assert torch.equal(ask(copied, [1]), ask(encoder, [1]))
            copied.close()
    by_model = pickle.loads(pickle.dumps(CachedEncoder(cache, config_of(), find_model(folder()))))
    assert torch.equal(ask(by_model, [0]), found)
    ask(by_model, [2])
    by_model.close()


def test_moved_to_another_device(cache):
    """The model is built where it is wanted at the next miss."""
    with CachedEncoder(cache, config_of(), folder(), device="cpu") as encoder:
        ask(encoder, [0])
        assert encoder._frozen.is_built
        encoder.to("meta")
        assert not encoder._frozen.is_built
        assert ask(encoder, [0]).device.type == "meta"


@pytest.mark.gpu
def test_on_a_gpu(cache):
    """Asked for, or taken where there is one; embeddings come back where they were asked for."""
    with CachedEncoder(cache, config_of(), folder(), device="cuda") as encoder:
        found = ask(encoder, [0])
        assert found.is_cuda
    assert cache.info(config_of()).provenance["device"] == "cuda"
    cache.clear(config_of())
    with CachedEncoder(cache, config_of(), folder()) as encoder:
        assert torch.equal(ask(encoder, [0]), found.cpu())
    assert cache.info(config_of()).provenance["device"] == "cuda"
    cache.clear(config_of())
    with CachedEncoder(cache, config_of(), folder(), device="cpu") as encoder:
        torch.testing.assert_close(ask(encoder, [0]), found.cpu(), atol=1e-4, rtol=1e-4)
    assert cache.info(config_of()).provenance["device"] == "cpu"

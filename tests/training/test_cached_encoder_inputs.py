"""CachedEncoder: inputs of the misses only, of whatever kind the model takes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from training.encoders import (
    OWN,
    CountingEncoder,
    direct,
    names_of,
    stored,
    waveforms_of,
)

from lmdbcache import CachedEncoder
from lmdbcache.errors import AudioDecodeError, ConfigError


def test_hits_load_nothing_and_build_nothing(cache):
    """With lazy inputs and a factory, only what is missing is loaded; the model is built for it."""
    loaded, built = [], []

    def load(number):
        loaded.append(number)
        return waveforms_of([number])[0]

    def make():
        built.append(1)
        return CountingEncoder()

    with CachedEncoder(cache, OWN, make) as encoder:
        loaders = [partial(load, n) for n in (4, 1, 4)]
        found = encoder(loaders, sample_ids=names_of([4, 1, 4]))
        assert loaded == [4, 1]
        torch.testing.assert_close(found, direct([4, 1, 4]), atol=2e-7, rtol=0)
    with CachedEncoder(cache, OWN, make) as encoder:
        encoder([pytest.fail] * 2, sample_ids=names_of([1, 4]))
        assert built == [1]
        asked = []

        def load_all(sample_ids):
            asked.append(sample_ids)
            return waveforms_of([7, 8])

        encoder(load_all, sample_ids=names_of([7, 1, 8]))
    assert asked == [names_of([7, 8])]
    assert built == [1, 1]


def test_kinds_of_inputs(cache):
    """Tensors, arrays, lists and Mappings are cut to the misses; other things are handed on."""
    seen = []

    def model(waveforms, options=None, *, attention_mask, scale):
        seen.append((waveforms.shape, attention_mask.tolist(), options, scale))
        return waveforms * scale

    with CachedEncoder(cache, OWN, model) as encoder:
        numbers = np.arange(3, dtype=np.float32)[:, None] + 1
        encoder(numbers[:1], sample_ids=["0:x"], attention_mask=torch.tensor([0]), scale=2.0)
        found = encoder(
            list(numbers), "as is", sample_ids=["0:x", "1:x", "2:x"],
            attention_mask=torch.tensor([0, 1, 2]), scale=2.0,
        )  # fmt: skip
    assert ((2, 1), [1, 2], "as is", 2.0) in seen
    assert found.tolist() == [[2.0], [4.0], [6.0]]
    with CachedEncoder(cache, OWN, lambda batch: batch["x"] + batch["y"]) as encoder:
        batch = {"x": numbers, "y": torch.ones(3, 1)}
        assert encoder(batch, sample_ids=["2:x", "3:x", "4:x"]).tolist() == [[6.0], [3.0], [4.0]]


def test_inputs_that_do_not_fit(encoder):
    """Another number, or other shapes, are named before anything is computed."""
    with pytest.raises(ConfigError):
        encoder(waveforms_of([1, 2, 3]), sample_ids=names_of([1, 2]))
    with pytest.raises(ConfigError):
        encoder([torch.ones(8), torch.ones(7)], sample_ids=names_of([1, 2]))
    with pytest.raises(ConfigError):
        encoder(lambda _: torch.ones(1, 8), sample_ids=names_of([1, 2]))


def test_a_loader_s_error_stores_nothing(encoder, cache):
    """A clip that can't be decoded raises; nothing stands in for it."""

    def broken():
        raise AudioDecodeError("clip.wav: broken")

    with pytest.raises(AudioDecodeError):
        encoder([lambda: torch.ones(8), broken], sample_ids=names_of([1, 2]))
    encoder.close()
    assert not stored(cache)


def test_inputs_in_half_precision(cache, encoder):
    """A trainer that rounds its batches to bfloat16 is told, unless the config says so."""
    rounded = waveforms_of([1, 2]).bfloat16()
    for inputs in (rounded, list(rounded), {"waveforms": rounded}):
        with pytest.raises(ConfigError):
            encoder(inputs, sample_ids=names_of([1, 2]))
    loaders = [lambda: waveforms_of([1])[0]] * 2
    assert encoder.bfloat16()(loaders, sample_ids=names_of([1, 1])).dtype == torch.bfloat16
    half = CountingEncoder().bfloat16()
    with CachedEncoder(cache, OWN.replace(compute_dtype="bfloat16"), half) as other:
        found = other(rounded, sample_ids=names_of([1, 2]))
        assert torch.equal(found.float(), half(rounded).float())

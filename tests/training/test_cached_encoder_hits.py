"""CachedEncoder: what the model returns, computed once, whoever asks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from training.encoders import (
    OWN,
    WIDTH,
    ask,
    direct,
    names_of,
    stored,
    waveforms_of,
)

from lmdbcache import CachedEncoder
from lmdbcache.errors import InvalidSampleIdError
from lmdbcache.storage import as_read, as_stored


def test_returns_what_the_model_returns(encoder, model):
    """In order, without grad; the misses of a batch in one pass, repeats and hits in none."""
    first = ask(encoder, [3, 1, 3, 2])
    torch.testing.assert_close(first, direct([3, 1, 3, 2]), atol=2e-7, rtol=0)
    assert model.passes == [3]
    assert not first.requires_grad
    second = ask(encoder, [5, 1, 4, 5, 2])
    assert model.passes == [3, 2]
    torch.testing.assert_close(second, direct([5, 1, 4, 5, 2]), atol=2e-7, rtol=0)
    assert torch.equal(second[[1, 4]], first[[1, 3]])
    assert torch.equal(second[[0, 2]], direct([5, 4]))  # the same misses, bit for bit
    assert torch.equal(ask(encoder, [2, 3]), first[[3, 0]])
    assert model.passes == [3, 2]
    assert (encoder.num_computed, encoder.num_hits) == (5, 4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_same_bits_before_and_after_the_commit(cache, model, dtype):
    """Computed, waiting, and read from the store: one value, in float32 whatever is stored."""
    config = OWN.replace(dtype=dtype)
    with CachedEncoder(cache, config, model) as encoder:
        computed = ask(encoder, range(5))
        waiting = ask(encoder, range(5))
        encoder.flush()
        read = ask(encoder, range(5))
    assert torch.equal(computed, waiting)
    assert torch.equal(computed, read)
    assert computed.dtype == torch.float32
    expected = as_read(as_stored("", direct(range(5)), dtype), dtype).astype(np.float32)
    assert torch.equal(computed, torch.from_numpy(expected))
    assert model.passes == [5]


def test_commits_are_few_and_nothing_is_computed_twice(encoder, model, cache):
    """Many small batches wait in memory; close commits them all."""
    for start in range(0, 80, 8):
        ask(encoder, range(start, start + 8))
    assert not stored(cache)
    ask(encoder, range(80))
    assert sum(model.passes) == 80
    encoder.close()
    values = stored(cache)
    assert len(values) == 80
    assert np.array_equal(values["clip_007:x"], direct(range(8))[7].numpy())
    ask(encoder, range(81))  # opens again
    assert sum(model.passes) == 81


def test_commits_by_time(cache, model):
    """What waits for long is committed at the next use, hits included."""
    with CachedEncoder(cache, OWN, model, commit_seconds=0) as encoder:
        ask(encoder, [1])
        assert len(stored(cache)) == 1
    with CachedEncoder(cache, OWN, model, commit_seconds=0.05) as encoder:
        ask(encoder, [2])
        threading.Event().wait(0.06)
        ask(encoder, [1])
        assert len(stored(cache)) == 2


@pytest.mark.parametrize("size", [40_000, 700_000])  # committed in a thread, and at once
def test_large_embeddings(cache, size):
    """Many megabytes a batch are answered in order, too, whichever way they are committed."""
    calls = []

    def model(inputs):
        calls.append(len(inputs))
        return inputs.expand(-1, size) * 1.0

    def numbers(first, last):
        return torch.arange(first, last, dtype=torch.float32)[:, None]

    with CachedEncoder(cache, OWN, model) as encoder:
        for first in range(0, 480, 40) if size < 100_000 else range(0, 8, 4):
            last = first + (40 if size < 100_000 else 4)
            found = encoder(numbers(first, last), sample_ids=names_of(range(first, last)))
            assert torch.equal(found, numbers(first, last).expand(-1, size))
            again = encoder(pytest.fail, sample_ids=names_of(range(last)))
            assert torch.equal(again[:, -1], numbers(0, last)[:, 0])
            del found, again
        assert sum(calls) == last + 2  # one of the first batch, again


def test_other_processes_commits_are_hits(encoder, model, cache):
    """What another writer commits meanwhile isn't computed."""
    ask(encoder, [1])
    with cache.writer(OWN) as writer:
        writer.put("clip_002:x", np.full(WIDTH, 7, np.float32))
    assert (ask(encoder, [1, 2])[1] == 7).all()
    assert model.passes == [1]


def test_a_cleared_store_is_filled_again(encoder, model, cache):
    """Its samples are misses, not errors."""
    ask(encoder, [1, 2])
    encoder.flush()
    ask(encoder, [1])
    cache.clear(OWN)
    ask(encoder, [1, 2])  # of the snapshot that is still open
    assert model.passes == [2]
    assert torch.equal(ask(encoder, [1, 2, 3]), direct([1, 2, 3]))
    encoder.flush()
    assert len(stored(cache)) == 3
    assert model.passes == [2, 3]


def test_sample_ids_by_one_rule(encoder, model):
    """Spellings of one sample are one sample; what can't be stored is refused before computing."""
    found = encoder(waveforms_of([1, 1]), sample_ids=["a:Dog", "a:dog"])
    assert model.passes == [1]
    assert torch.equal(found[0], found[1])
    with pytest.raises(InvalidSampleIdError, match="no colon"):
        encoder(waveforms_of([1, 2]), sample_ids=["a:dog", "no colon"])
    assert model.passes == [1]


@pytest.mark.parametrize(
    ("is_hit", "num_hits"), [([True, True], 2), ([True, False], 1), ([False, False], 0)]
)
def test_hits_of_a_mixed_batch_are_counted(encoder, is_hit, num_hits):
    """Embeddings that came with the batch are hits, its misses are computed."""
    given = {"embeddings": torch.ones(num_hits, WIDTH)} if num_hits else {}
    misses = [number for number, hit in enumerate(is_hit) if not hit]
    inputs = {"features": waveforms_of(misses)} if misses else {}
    batch = {"sample_ids": names_of(range(2)), "mask": torch.tensor(is_hit), **given, **inputs}
    found = encoder.complete(batch)
    assert (encoder.num_hits, encoder.num_computed) == (num_hits, 2 - num_hits)
    assert (found[torch.tensor(is_hit)] == 1).all()
    assert torch.equal(found[~torch.tensor(is_hit)], direct(misses))


def test_an_empty_batch(encoder):
    """No samples give no embeddings, of the shape that is stored."""
    assert encoder(waveforms_of([]), sample_ids=[]).shape == (0,)
    ask(encoder, [1])
    encoder.flush()
    assert encoder(waveforms_of([]), sample_ids=[]).shape == (0, WIDTH)

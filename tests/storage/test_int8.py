"""Stores of int8: a scale for each row, read back as float32 by every path."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays
from storage.damage import data_file, flip_value

from lmdbcache import CacheConfig
from lmdbcache.errors import IntegrityError, InvalidEmbeddingError
from lmdbcache.storage import StoreMetadata, quantization
from lmdbcache.storage.quantization import (
    LARGEST_MAGNITUDE,
    dequantized,
    quantized,
    quantized_values,
)

CONFIG = CacheConfig(dtype="int8", output="last_hidden_state")
SHAPES = {"pooled": (768,), "one number": (1,), "hidden states": (30, 64), "large": (300, 768)}


def embeddings_of(shape, number=40, *, ragged=False):
    """Embeddings with a few large dimensions, as transformers have them."""
    generator = np.random.default_rng(3)
    large = 1 + 20 * (np.arange(shape[-1]) % 97 == 1)
    return {
        f"{n:03d}:dog": (
            generator.normal(size=(shape[0] + n % 3, *shape[1:]) if ragged else shape) * large
        ).astype(np.float32)
        for n in range(number)
    }


def expected_of(embedding):
    """What docs/format.md says, in float64."""
    largest = np.abs(embedding).max(-1, keepdims=True)
    scale = np.maximum(largest.astype(np.float32) / np.float32(127), np.float32(2.0**-126))
    mantissa, exponent = np.frexp(scale.astype(np.float64))
    scale = np.ldexp(np.ceil(mantissa * 2**17) / 2**17, exponent)
    return (np.rint((embedding / scale).astype(np.float32)) * scale).astype(np.float32)


@pytest.fixture(params=SHAPES)
def filled(request, cache):
    """A store, and what it should give."""
    embeddings = embeddings_of(SHAPES[request.param])
    with cache.writer(CONFIG) as writer:
        writer.put_batch(embeddings, list(embeddings.values()))
    return cache, {name: expected_of(embedding) for name, embedding in embeddings.items()}


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 9)),
        elements=st.floats(-LARGEST_MAGNITUDE, LARGEST_MAGNITUDE, width=32),
    )
)
def test_what_is_read_is_exact_and_quantizes_to_itself(rows):
    """element * scale is exact in float32, off by half a scale at most, and goes round for ever."""
    stored = quantized(rows)
    read = dequantized(stored)
    scale = stored[..., -4:].view("<f4").astype(np.float64)
    assert (read == stored[..., :-4] * scale).all()
    assert np.isfinite(read).all()
    assert (np.abs(read - rows.astype(np.float64)) <= scale * 0.5000001).all()
    assert quantized(read).tobytes() == stored.tobytes()


@pytest.mark.parametrize("verify", ["never", "first_read", "always"])
def test_every_read_gives_the_same(filled, verify):
    """One by one, as a batch, into an array, by position, with and without verification."""
    cache, expected = filled
    names = list(expected)[::-1]
    whole = np.stack([expected[name] for name in names])
    with cache.reader(CONFIG, verify=verify) as reader:
        assert (reader.dtype, reader.embedding_shape) == (np.float32, whole.shape[1:])
        for _ in range(2):  # the second time the places of the values are known
            for name in names:
                embedding = reader[name]
                embedding += 0  # writable
                np.testing.assert_array_equal(embedding, expected[name], strict=True)
        np.testing.assert_array_equal(reader.get_batch(names), whole, strict=True)
        out = np.empty_like(whole)
        assert reader.get_batch(names, out) is out
        np.testing.assert_array_equal(out, whole)
        selection = reader.select(names)
        np.testing.assert_array_equal(selection.get_batch([5, 1, 5]), whole[[5, 1, 5]], strict=True)
        with pytest.raises(InvalidEmbeddingError):
            reader.get_batch(names, np.empty(whole.shape, np.int8))


@pytest.mark.parametrize("verify", ["never", "always"])
def test_ragged_embeddings(cache, verify):
    """The first dimension may differ; the rows have one length."""
    embeddings = embeddings_of((5, 16), ragged=True)
    with cache.writer(CONFIG, ragged=True) as writer:
        writer.put_batch(embeddings, list(embeddings.values()))
    with cache.reader(CONFIG, verify=verify) as reader:
        assert reader.embedding_shape == (None, 16)
        for name, embedding in embeddings.items():
            np.testing.assert_array_equal(reader[name], expected_of(embedding), strict=True)
        batch = reader.get_batch(["000:dog", "003:dog"])
        np.testing.assert_array_equal(batch[1], expected_of(embeddings["003:dog"]))


def test_the_largest_error_is_kept(cache):
    """The metadata has the largest relative L2 distance, of all commits by any writer."""
    embeddings = embeddings_of((64,))
    errors = [
        np.linalg.norm(expected_of(one).astype(np.float64) - one) / np.linalg.norm(one)
        for one in embeddings.values()
    ]
    for name, embedding in sorted(embeddings.items(), reverse=True):
        with cache.writer(CONFIG) as writer:
            writer.put(name, embedding)
            # What waits is given as it will be read.
            np.testing.assert_array_equal(writer.uncommitted(name), expected_of(embedding))
    with cache.reader(CONFIG) as reader:
        assert reader.metadata.quantization_error == pytest.approx(max(errors), rel=1e-3)
        same = dict(reader)
    with cache.writer(CONFIG, on_duplicate="overwrite") as writer:
        writer.put_batch(same, list(same.values()))
    with cache.reader(CONFIG) as reader:
        assert reader.metadata.quantization_error == pytest.approx(max(errors), rel=1e-3)


def test_values_of_a_commit_are_quantized_block_by_block(monkeypatch):
    """Each as by itself, whatever the others' shapes; the error is the largest of all blocks."""
    monkeypatch.setattr(quantization, "_ELEMENTS_AT_ONCE", 80)
    values = [*embeddings_of((3, 8), 6, ragged=True).values(), *embeddings_of((2, 8), 9).values()]
    largest = max(quantized_values([value])[1] for value in values)
    for given_values in (values, values[::-1]):
        stored, error = quantized_values(given_values)
        alone = [quantized(value).tobytes() for value in given_values]
        assert [value.tobytes() for value in stored] == alone
        assert error == largest


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", ["element", "scale"])
def test_a_flipped_bit_is_found(filled, part):
    """Verification compares the stored bytes, before they are read as anything."""
    cache, expected = filled
    name = list(expected)[7]
    after, bits = (0, 1) if part == "element" else (expected[name].shape[-1] + 3, 0x40)
    flip_value(data_file(cache, CONFIG), quantized(expected[name][None])[0], after, bits)
    with cache.reader(CONFIG, verify="always") as reader:
        with pytest.raises(IntegrityError):
            reader[name]
        with pytest.raises(IntegrityError):
            reader.get_batch([name])


@pytest.mark.parametrize(
    ("embedding", "ragged"),
    [
        (np.float32(1), False),
        (np.ones(3, np.float32), True),
        (np.full(3, np.finfo(np.float32).max), False),
        (np.full(3, np.finfo(np.float32).min), False),
        (np.array([1, np.inf]), False),
    ],
)
def test_what_has_no_scale_is_refused(cache, embedding, ragged):
    """No row, rows of any length, or no scale that is finite: nothing is stored."""
    with cache.writer(CONFIG, ragged=ragged) as writer, pytest.raises(InvalidEmbeddingError):
        writer.put("a:x", embedding)
    assert CONFIG not in cache


def test_a_refused_shape_is_not_the_stores(cache):
    """What was refused doesn't decide the shape of a new store."""
    for ragged in (False, True):
        with cache.writer(CONFIG, ragged=ragged) as writer:
            with pytest.raises(InvalidEmbeddingError):
                writer.put_batch(["a:x", "b:x"], np.ones((2, 3) if ragged else 2))
            assert writer.put("a:x", np.ones((2, 3)))
            writer.discard()


@pytest.mark.parametrize("shape", [(), (None,)])
def test_metadata_of_a_shape_without_rows_is_damaged(shape):
    """A foreign store that can't be int8 is refused as it is opened."""
    record = StoreMetadata(CONFIG, shape).pack()
    with pytest.raises(IntegrityError):
        StoreMetadata.unpack(record, "store")


@pytest.mark.parametrize("stated", ["nan", "inf", "-1", "unknown"])
def test_a_foreign_error_that_is_no_number_counts_as_unknown(stated):
    """Else no recomputed embedding would count as drifted."""
    metadata = StoreMetadata(CONFIG, (3,), provenance={"quantization_error": stated})
    assert metadata.quantization_error is None
    assert metadata.with_quantization_error(0.25).quantization_error == 0.25


def test_of_two_errors_the_larger_is_stated():
    """A merge brings larger errors along, and doesn't replace them by smaller ones."""
    small, large = ({"quantization_error": error} for error in ("0.25", "0.5"))
    for ours, theirs in ((small, large), (large, small)):
        metadata = StoreMetadata(CONFIG, (3,), provenance=ours).with_provenance(theirs, "store")
        assert metadata.quantization_error == 0.5

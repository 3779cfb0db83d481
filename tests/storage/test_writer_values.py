"""What an embedding may be, and that it comes back bit by bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.errors import InvalidEmbeddingError

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
VALUES = np.random.default_rng(1).normal(size=(3, 4, 5))


def stored(cache, embedding, dtype="float32", **options):
    config = CacheConfig(dtype=dtype)
    with cache.writer(config, **options) as writer:
        writer.put("a:x", embedding)
    with cache.reader(config) as reader:
        return reader["a:x"]


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("source", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ">f4"])
def test_numpy_arrays_come_back_bit_exact(cache, dtype, source):
    """What is read is numpy's own cast of what was put, to the bit."""
    embedding = VALUES.astype(source)
    read = stored(cache, embedding, dtype)
    assert (read.dtype, read.shape) == (NUMPY[dtype], embedding.shape)
    assert read.tobytes() == embedding.astype(NUMPY[dtype]).tobytes()


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_tensors_come_back_bit_exact(cache, dtype, source):
    """A tensor with grad, read back, is torch's own cast of it."""
    embedding = torch.from_numpy(VALUES).to(source).requires_grad_()
    read = stored(cache, embedding, dtype)
    expected = embedding.detach().to(TORCH[dtype])
    assert read.tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "embedding",
    [
        VALUES.T,
        VALUES[::2, ::-1],
        np.asfortranarray(VALUES),
        torch.from_numpy(VALUES).permute(2, 0, 1),
        torch.from_numpy(VALUES)[:, 1],
        np.broadcast_to(np.float32(3), (2, 2)),
    ],
)
def test_any_memory_layout_is_stored_in_c_order(cache, embedding):
    """Strides of the input don't show."""
    np.testing.assert_array_equal(stored(cache, embedding), np.asarray(embedding, np.float32))


@pytest.mark.parametrize("embedding", [[1, 2, 3], np.arange(3), torch.arange(3), (1.0, 2.0, 3.0)])
def test_sequences_and_integers_are_numbers(cache, embedding):
    """Integers and nested sequences are cast to the stored dtype."""
    read = stored(cache, embedding)
    assert read.dtype == np.float32
    assert len(read) == 3


def test_scalars_are_embeddings_of_shape_nothing(cache):
    """A single number per sample can be stored, read and stacked."""
    assert stored(cache, np.float32(2.5)).shape == ()
    with cache.reader(CacheConfig()) as reader:
        np.testing.assert_array_equal(reader.get_batch(["a:x", "a:x"]), np.float32([2.5, 2.5]))


def test_a_batch_is_stored_as_its_rows_are(tmp_path):
    """New, inserted, repeated and stored ids, of a batch and one by one: the same bytes."""
    rows = np.random.default_rng(0).random((12, 3), dtype=np.float32)
    ids = ["b:x", "z:x", "b:X", "n:x", "a:x", "é:x", "n:x", "m:x", "0:x", "zz:x", "y:x", "b:x"]
    found = []
    for is_batch in (True, False):
        for on_duplicate in ("skip", "overwrite"):
            cache = EmbeddingCache(tmp_path / f"{on_duplicate}-{is_batch}")
            with cache.writer(CacheConfig()) as writer:
                writer.put_batch(["n:x", "c:x"], rows[:2])
            with cache.writer(CacheConfig(), on_duplicate=on_duplicate) as writer:
                if is_batch:
                    added = writer.put_batch(ids, rows)
                else:
                    added = sum([writer.put(i, row) for i, row in zip(ids, rows, strict=True)])
            with cache.reader(CacheConfig()) as reader:
                stored_here = [(i, reader[i].tobytes()) for i in reader]
                found.append((added, writer.num_written, stored_here, list(reader.checksums())))
            assert cache.verify(CacheConfig()).is_sound
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[0][2] != found[1][2]


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        (np.array([1, np.nan]), "NaN or Inf"),
        (np.array([np.inf, 1]), "NaN or Inf"),
        (np.array([np.inf, -np.inf], np.float16), "NaN or Inf"),
        (np.array([1, np.nan], ml_dtypes.bfloat16), "NaN or Inf"),
        (torch.tensor([1.0, float("nan")]), "NaN or Inf"),
        (torch.tensor([1.0, float("inf")], dtype=torch.bfloat16), "NaN or Inf"),
        (torch.tensor([1.0, float("-inf")], dtype=torch.float16), "NaN or Inf"),
        (np.zeros(0), "empty"),
        (np.zeros((3, 0)), "empty"),
        (torch.zeros(0), "empty"),
        (np.array([1j]), "real numbers"),
        (torch.tensor([1j]), "real numbers"),
        (np.array([True]), "real numbers"),
        (np.array(["1"]), "real numbers"),
        (np.array([None]), "real numbers"),
        (None, "real numbers"),
        ("text", "real numbers"),
        ({"a": 1}, "real numbers"),
        ([[1.0], [1.0, 2.0]], "not an array"),
        (torch.zeros(2).to_sparse(), "not an array"),
        (torch.zeros(2, device="meta"), "not an array"),
        (np.array(["2026-11-30"], "datetime64[D]"), "real numbers"),
        (np.ma.masked_greater(np.arange(4.0), 2), "masked"),
        ([np.ma.masked_greater(np.arange(4.0), 2)] * 2, "masked"),
        ([1.0, np.ma.masked], "masked"),
        (np.asmatrix(np.ones((1, 2))), "matrix"),
    ],
)
@pytest.mark.parametrize("dtype", NUMPY)
def test_unusable_embeddings_are_refused_by_name(cache, embedding, reason, dtype):
    """NaN, Inf, nothing, and what isn't real numbers never reach the store."""
    writer = cache.writer(CacheConfig(dtype=dtype))
    with pytest.raises(InvalidEmbeddingError, match=f"^vid:dog: .*{reason}"):
        writer.put("vid:dog", embedding)
    writer.close()
    assert not cache.root.exists()


@pytest.mark.parametrize(
    "rows",
    [
        np.ma.masked_equal(np.arange(8.0).reshape(2, 4), 5),
        [np.arange(4.0), np.ma.masked_equal(np.arange(4.0), 1)],
        torch.complex(torch.ones(2, 4), torch.ones(2, 4)),
    ],
)
def test_unusable_rows_of_a_batch_are_refused_by_name(cache, rows):
    """A batch isn't stored without its mask or its imaginary part."""
    with (
        pytest.raises(InvalidEmbeddingError, match=r"^(a|b):dog"),
        cache.writer(CacheConfig()) as w,
    ):
        w.put_batch(["a:dog", "b:dog"], rows)
    assert not cache.root.exists()
    with pytest.raises(InvalidEmbeddingError):
        cache.get_or_compute(CacheConfig(), ["a:dog", "b:dog"], lambda _: rows)
    assert not cache.root.exists()


def test_a_mask_without_masked_elements_hides_nothing(cache):
    """Such an array is stored like any other."""
    read = stored(cache, np.ma.masked_greater(np.arange(4.0), 9))
    np.testing.assert_array_equal(read, np.arange(4, dtype=np.float32))


def test_a_lazily_negated_tensor_is_stored(cache):
    """The imaginary part of a conjugate has a sign that isn't in memory yet."""
    assert stored(cache, torch.tensor([1 + 2j]).conj().imag).tolist() == [-2.0]


@pytest.mark.parametrize("value", [65520.0, -1e30])
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_float16_overflow_is_refused(cache, value, kind):
    """A finite value beyond float16 doesn't turn into Inf."""
    for embedding in (kind([1.0, value]), kind([1.0, 65504.0])):
        with cache.writer(CacheConfig(dtype="float16")) as writer:
            if embedding[1] == 65504:
                assert writer.put("ok:x", embedding)
            else:
                with pytest.raises(
                    InvalidEmbeddingError, match=r"vid:dog.*float16's range.*float32"
                ):
                    writer.put("vid:dog", embedding)


def test_float32_overflow_is_refused(cache):
    """A float64 beyond float32 doesn't turn into Inf."""
    writer = cache.writer(CacheConfig())
    with pytest.raises(InvalidEmbeddingError, match=r"vid:dog.*float32's range"):
        writer.put("vid:dog", np.array([1e300]))


def test_large_finite_values_whose_sum_overflows_are_stored(cache):
    """The quick check by sum falls back to a look at each value."""
    big = np.full(1000, 3e38, np.float32)
    np.testing.assert_array_equal(stored(cache, big), big)


def test_wrong_shape_is_refused_by_name(cache, config):
    """The first embedding settles the shape; pending and stored count alike."""
    with cache.writer(config) as writer:
        writer.put("a:x", np.ones((2, 3)))
        for shape in ((3, 2), (6,), (2, 3, 1), (2, 4)):
            with pytest.raises(InvalidEmbeddingError, match=r"b:x: .*\(2, 3\)"):
                writer.put("b:x", np.ones(shape))
    with cache.writer(config) as writer, pytest.raises(InvalidEmbeddingError, match="b:x"):
        writer.put("b:x", np.ones(6))


def test_caller_may_reuse_its_buffer(cache, config):
    """What was put is a copy, whatever happens to the array or tensor afterwards."""
    for name, buffer in (("numpy", np.ones(4, np.float32)), ("torch", torch.ones(4))):
        with cache.writer(config) as writer:
            writer.put(f"{name}:x", buffer)
            buffer[:] = 7
        assert (cache.reader(config)[f"{name}:x"] == 1).all()


def test_ragged_store_frees_the_first_dimension_only(cache, config):
    """Lengths differ, the rest doesn't; a later writer needn't say so again."""
    with cache.writer(config, ragged=True) as writer:
        writer.put("a:x", np.ones((2, 3)))
        writer.put("b:x", np.ones((5, 3)))
        with pytest.raises(InvalidEmbeddingError, match="c:x"):
            writer.put("c:x", np.ones((5, 4)))
    with cache.writer(config) as writer:
        writer.put("d:x", np.ones((1, 3)))
    with cache.reader(config) as reader:
        assert reader.embedding_shape == (None, 3)
        assert {sample_id: len(value) for sample_id, value in reader.items()} == {
            "a:x": 2,
            "b:x": 5,
            "d:x": 1,
        }
        assert reader.get_batch(["b:x", "b:x"]).shape == (2, 5, 3)
        with pytest.raises(InvalidEmbeddingError, match=r"b:x has shape \(5, 3\), a:x has"):
            reader.get_batch(["a:x", "b:x"])

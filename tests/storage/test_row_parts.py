"""Some rows of each value: the bytes asked for, never a byte beside the value."""

from __future__ import annotations

import numpy as np
import pytest

from lmdbcache import CacheConfig
from lmdbcache.errors import InvalidEmbeddingError
from lmdbcache.storage import NUMPY_DTYPES, RowPart, Selection

NAMES = [f"{n}:x" for n in range(6)]
ORDER = [5, 0, 0, 3]
PARTS = {
    RowPart(0, 1): [0],
    RowPart(9, 1): [9],
    RowPart(2, None): list(range(2, 10)),
    RowPart(0, 10): list(range(10)),
    RowPart(1, 2, 3, 3): [1, 2, 4, 5, 7, 8],
    RowPart(0, 2, 5, 2): list(range(10)),
    RowPart(0, 1, 4, 3): [0, 3, 6, 9],
}
BEYOND = [RowPart(0, 11), RowPart(10, None), RowPart(10, 1), RowPart(-1, 1), RowPart(1, 2, 4, 3)]


@pytest.mark.parametrize("verify", ["never", "always"])
@pytest.mark.parametrize(("width", "dtype"), [(3, "float16"), (5, "float32"), (3000, "float32")])
def test_rows_are_those_asked_for(cache, dtype, width, verify):
    """By every way to read a selection, located in the file or through LMDB."""
    config = CacheConfig(dtype=dtype)
    values = np.random.default_rng(0).normal(size=(6, 10, width)).astype(NUMPY_DTYPES[dtype])
    with cache.writer(config) as writer:
        writer.put_batch(NAMES, values)
    with cache.reader(config, verify=verify) as reader:
        for part, rows in PARTS.items():
            expected = values[ORDER][:, rows]
            assert part.shape(values.shape[1:]) == expected.shape[1:]
            np.testing.assert_array_equal(part.of(values[2]), values[2][rows])
            selection = Selection(reader, NAMES, part)
            for _ in range(2):
                np.testing.assert_array_equal(selection.get_batch(ORDER), expected)
            out = np.empty(expected.shape, expected.dtype)
            assert selection.get_batch(ORDER, out) is out
            np.testing.assert_array_equal(out, expected)
            with pytest.raises(InvalidEmbeddingError):
                selection.get_batch(ORDER, np.empty((1, 2), dtype))
            copied = selection.copy_with(ORDER, lambda file, at, length: file.gather(at, length))
            assert (copied is None) == (verify == "always")
            if copied is not None:
                assert copied.tobytes() == expected.tobytes()
            selection.will_need(ORDER)


@pytest.mark.parametrize("part", BEYOND)
def test_rows_beyond_the_value_are_refused(cache, config, part):
    """What lies beside a value in the file is never handed out."""
    with cache.writer(config) as writer:
        writer.put_batch(NAMES, np.ones((6, 10, 4), np.float32))
    with cache.reader(config) as reader:
        selection = Selection(reader, NAMES, part)
        for read in (selection.get_batch, selection.will_need):
            with pytest.raises(InvalidEmbeddingError, match=r"shape \(10, 4\)"):
                read([1])


def test_an_empty_part_of_nothing(cache, config):
    """No positions give no rows, of the part's shape."""
    with cache.writer(config) as writer:
        writer.put_batch(NAMES, np.ones((6, 10, 4), np.float32))
    with cache.reader(config) as reader:
        assert Selection(reader, NAMES, RowPart(1, 2)).get_batch([]).shape == (0, 2, 4)


def test_parts_of_different_shapes_do_not_stack(cache, config):
    """All rows from one on, of embeddings with different numbers of rows: an error of ours."""
    with cache.writer(config, ragged=True) as writer:
        for rows in (4, 5):
            writer.put(f"{rows}:dog", np.ones((rows, 3)))
    with cache.reader(config) as reader:
        assert Selection(reader, None, RowPart(1, 3)).get_batch([0, 1]).shape == (2, 3, 3)
        with pytest.raises(InvalidEmbeddingError):
            Selection(reader, None, RowPart(1, None)).get_batch([0, 1])

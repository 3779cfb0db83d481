"""Several embeddings in one array: found by row, gathered from the file, or stacked one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import InvalidEmbeddingError, InvalidSampleIdError
from lmdbcache.storage.layout import sample_id_of_key, sample_key
from lmdbcache.storage.metadata import StoreMetadata
from lmdbcache.storage.reading.located import LocatedValues
from lmdbcache.storage.row_parts import RowPart
from lmdbcache.storage.values import NUMPY_DTYPES, batch_array, from_stored

__all__ = ["gather", "key_or_empty", "remember_all", "rows_of", "stack"]

_REMEMBERED_ROWS: Final = 1 << 16


def key_or_empty(sample_id: str) -> bytes:
    """The key to look a sample up by; the empty one, which is never stored, for a bad id."""
    try:
        return sample_key(sample_id)
    except InvalidSampleIdError:
        return b""


def rows_of(located: LocatedValues, sample_ids: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """Row of each sample in the table, or None if one isn't stored."""
    known = located.known_rows
    try:
        return np.fromiter(map(known.__getitem__, sample_ids), np.int64, len(sample_ids))
    except KeyError:
        pass
    if len(known) > _REMEMBERED_ROWS:
        known.clear()
        located.knows_all = False
    rows = located.table.find([key_or_empty(sample_id) for sample_id in sample_ids])
    if rows.size and rows.min() < 0:
        return None
    known.update(zip(sample_ids, rows.tolist(), strict=True))
    return rows


def remember_all(located: LocatedValues) -> bool:
    """Remember the row of every sample by its id, if the store is small enough for that."""
    known, table = located.known_rows, located.table
    if located.common_length is None or len(table.keys) > _REMEMBERED_ROWS:
        return False
    if not located.knows_all:
        sample_ids = map(sample_id_of_key, table.keys.tolist())
        known.update(zip(sample_ids, range(len(table.keys)), strict=False))
        located.knows_all = True
    return True


def gather(
    located: LocatedValues,
    offsets: npt.NDArray[np.int64],
    out: npt.NDArray[Any] | None,
    part: RowPart | None = None,
) -> npt.NDArray[Any]:
    """Copy the values at these places of the file, or some rows of each, into one array."""
    shape, length = (len(offsets), *located.shape), located.common_length or 0
    if part is not None:
        shape = (len(offsets), *part.shape(located.shape))
        offsets, length = part.places(offsets, located.shape, located.dtype.itemsize)
    if out is None:
        return located.file.gather(offsets, length).view(located.dtype).reshape(shape)
    filled = batch_array(shape, located.dtype, out).reshape(-1).view(np.uint8)
    located.file.gather(offsets, length, filled.reshape(len(offsets), length))
    return out


def stack(
    values: Sequence[Any],
    sample_ids: Sequence[str],
    metadata: StoreMetadata,
    out: npt.NDArray[Any] | None,
) -> npt.NDArray[Any]:
    """Stack values that LMDB gave, one by one.

    Raises:
        InvalidEmbeddingError: Their shapes differ, or `out` doesn't fit.
        IntegrityError: A value isn't an embedding of this store.
    """
    dtype, stored_shape = metadata.config.dtype, metadata.embedding_shape
    shape = tuple(size or 0 for size in stored_shape or ())
    if values and None in (stored_shape or ()):
        shape = from_stored(sample_ids[0], values[0], dtype, stored_shape).shape
    batch = batch_array((len(values), *shape), NUMPY_DTYPES[dtype], out)
    for index, (value, sample_id) in enumerate(zip(values, sample_ids, strict=True)):
        embedding = from_stored(sample_id, value, dtype, stored_shape)
        if embedding.shape != shape:
            raise InvalidEmbeddingError(
                f"{sample_id} has shape {embedding.shape}, {sample_ids[0]} has {shape}: embeddings "
                "of different lengths can't be stacked. Read them one by one"
            )
        batch[index, ...] = embedding
    return batch

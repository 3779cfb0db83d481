"""Comparing stored values with their checksums, read from the file in large steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from lmdbcache.storage.metadata import checksum, new_checksum
from lmdbcache.storage.pages.pages import EntryTable

Progress = Callable[[int, int], None]

CHECKSUM_BYTES: Final = 8
_STEP_BYTES: Final = 4 << 20
_BLOCK_BYTES: Final = 4096
_NUM_THREADS: Final = 4  # reading ahead: several requests keep a disk busy


@dataclass(frozen=True)
class CheckedValues:
    """Values and what they have to be.

    Args:
        table: Where the values lie.
        checksums: (n, 8) uint8, those of the values.
        has_checksum: (n,) bool.
        without_value: Keys that have a checksum alone.
        hidden: Keys that no look-up finds.
    """

    table: EntryTable
    checksums: npt.NDArray[np.uint8]
    has_checksum: npt.NDArray[np.bool_]
    without_value: tuple[bytes, ...] = ()
    hidden: frozenset[bytes] = frozenset()


def paired(values: EntryTable, sums: EntryTable, data: npt.NDArray[np.uint8]) -> CheckedValues:
    """Bring each value together with its checksum.

    Args:
        values: The embeddings.
        sums: Their checksums.
        data: data.mdb, mapped, (file size,) uint8.
    """
    if len(values.keys) == len(sums.keys) and bool((values.keys == sums.keys).all()):
        rows = np.arange(len(values.keys))
    else:
        rows = sums.find(values.keys.tolist())
    usable = np.append(sums.lengths == CHECKSUM_BYTES, values=False)  # row -1: no checksum
    has_checksum = usable[rows]
    places = np.append(sums.offsets, 0)[np.where(has_checksum, rows, -1)]
    columns = np.arange(CHECKSUM_BYTES)
    without_value = np.ones(len(sums.keys), bool)
    without_value[rows[rows >= 0]] = False
    return CheckedValues(
        values,
        data[places[:, None] + columns],
        has_checksum,
        tuple(sums.keys[without_value].tolist()),
    )


def damaged_rows(
    descriptor: int, values: CheckedValues, progress: Progress | None = None
) -> list[int]:
    """Rows whose value can't be read or doesn't match its checksum, or that have none.

    The file is read with plain reads, in its own order: a cold disk is read once, front to back,
    and a bad sector is an error, not a signal.

    Args:
        descriptor: data.mdb, open for reading.
        values: What to check.
        progress: Called with (values done, values in all).
    """
    total = len(values.table.keys)
    damaged: list[int] = []
    done, size = 0, os.fstat(descriptor).st_size
    pool = ThreadPoolExecutor(_NUM_THREADS, "lmdbcache-check")
    try:
        pending: list[Future[list[int]]] = []
        sizes: list[int] = []
        for rows in _steps(values.table, size):
            pending.append(pool.submit(_damaged_of, descriptor, values, rows, size))
            sizes.append(len(rows))
            while len(pending) > 2 * _NUM_THREADS:
                damaged.extend(pending.pop(0).result())
                done += sizes.pop(0)
                if progress is not None:
                    progress(done, total)
        for future in pending:
            damaged.extend(future.result())
    finally:
        pool.shutdown(cancel_futures=True)
    if progress is not None:
        progress(total, total)
    return sorted(damaged)


def _steps(table: EntryTable, size: int) -> Iterator[npt.NDArray[np.intp]]:
    """Rows in the order of the file, some megabytes at a time; long values by themselves."""
    order = np.argsort(table.offsets, kind="stable")
    offsets, lengths = table.offsets[order], table.lengths[order]
    inside = (offsets >= 0) & (lengths >= 0) & (lengths <= size - offsets)
    yield order[~inside]
    is_long = lengths > _STEP_BYTES
    yield from order[inside & is_long].reshape(-1, 1)
    order = order[inside & ~is_long]
    starts = table.offsets[order]
    first = 0
    while first < len(order):
        last = int(np.searchsorted(starts, starts[first] + _STEP_BYTES))
        yield order[first:last]
        first = last


def _damaged_of(
    descriptor: int, values: CheckedValues, rows: npt.NDArray[np.intp], size: int
) -> list[int]:
    table = values.table
    offsets, lengths = table.offsets[rows], table.lengths[rows]
    if len(rows) == 0 or offsets[0] < 0 or lengths[0] < 0 or offsets[0] + lengths[0] > size:
        return [int(row) for row in rows]  # those that `_steps` found to lie outside
    keys, expected = table.keys[rows].tolist(), values.checksums[rows].tobytes()
    wanted = [expected[at : at + CHECKSUM_BYTES] for at in range(0, len(expected), CHECKSUM_BYTES)]
    if len(rows) == 1:
        is_damaged = [_long_checksum(descriptor, keys[0], offsets[0], lengths[0]) != wanted[0]]
    else:
        start = int(offsets[0])
        content = memoryview(_read(descriptor, start, int((offsets + lengths).max()) - start))
        places = zip(keys, (offsets - start).tolist(), lengths.tolist(), wanted, strict=True)
        is_damaged = [
            checksum(key, content[at : at + length]) != checksum_
            for key, at, length, checksum_ in places
        ]
    return [int(row) for row in rows[np.array(is_damaged) | ~values.has_checksum[rows]]]


def _long_checksum(descriptor: int, key: bytes, offset: int, length: int) -> bytes:
    digest = new_checksum(key)
    for at in range(0, int(length), _STEP_BYTES):
        size = min(_STEP_BYTES, int(length) - at)
        digest.update(_read(descriptor, int(offset) + at, size))
    return bytes(digest.digest())


def _read(descriptor: int, start: int, length: int) -> bytes:
    try:
        return os.pread(descriptor, length, start).ljust(length, b"\0")
    except OSError:
        pass
    # A bad sector: what lies around it may be sound.
    parts = []
    for at in range(start, start + length, _BLOCK_BYTES):
        size = min(_BLOCK_BYTES, start + length - at)
        try:
            part = os.pread(descriptor, size, at)
        except OSError:
            part = b""
        parts.append(part.ljust(size, b"\0"))
    return b"".join(parts)

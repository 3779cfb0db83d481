"""The values of one snapshot, each with its place in the mapped file.

The table of a store up to some size is read when a first batch asks for it (7 ms for 28,000
samples). That of a larger store is kept beside the data file as `offsets-<transaction>`, derived
and removable at any time, so that opening 2 million samples takes milliseconds and all processes
share one copy.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import struct
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import lmdb
import numpy as np
import numpy.typing as npt
import xxhash

from lmdbcache.files import open_file, replace_file
from lmdbcache.storage.environment import Environment, Snapshot
from lmdbcache.storage.gather import LARGE_VALUE_BYTES, MappedFile
from lmdbcache.storage.layout import NUM_RESERVED_KEYS
from lmdbcache.storage.metadata import StoreMetadata
from lmdbcache.storage.opening import file_id
from lmdbcache.storage.pages.pages import UnreadablePagesError, ValueTable, read_value_table
from lmdbcache.storage.statistics import HitCounter, counts_of
from lmdbcache.storage.values import NUMPY_DTYPES

__all__ = ["LocatedValues", "locate", "located_values", "table_number"]

_logger: Final = logging.getLogger(__name__)

_READ_AT_ONCE: Final = 100_000  # samples; beyond, reading the table takes longer than a batch may
_FIRST_READS: Final = 4096
_PAYS_AFTER: Final = 16  # a share of the store this large has been read one by one: read the table
_MAGIC: Final = b"lmdbcache offsets 1\n"
_HEADER: Final = struct.Struct("<20s4xQQQQ8s")  # magic, transaction, inode, width, count, checksum
_PREFIX: Final = "offsets-"

_Identity = tuple[Any, int]
# By environment, not by file: inode and transaction numbers of a cleared store come again.
_tables: weakref.WeakKeyDictionary[Environment, tuple[int, ValueTable]] = (
    weakref.WeakKeyDictionary()
)
_tables_lock = threading.Lock()


@dataclass
class LocatedValues:
    """One snapshot's values. Valid while the snapshot is pinned; read with its lock held."""

    file: MappedFile
    table: ValueTable
    dtype: np.dtype[Any]
    # Bytes of each value if all are alike and as the metadata says; else each is read by itself.
    common_length: int | None
    # Shape of one embedding, if all are alike.
    shape: tuple[int, ...]
    known_rows: dict[str, int] = field(default_factory=dict)
    # Whether that has every sample; its length doesn't tell: ids have several spellings.
    knows_all: bool = False
    # Where values of a common length are counted; None: they aren't.
    counter: HitCounter | None = None

    def __post_init__(self) -> None:
        # One number of it is read faster than one of the array.
        self._offset_cells = memoryview(self.table.offsets)  # type: ignore[arg-type]

    def copy(self, row: int) -> npt.NDArray[Any]:
        """An owned copy of the embedding in this row of the table, of the common length."""
        offset, length = self._offset_cells[row], self.common_length or 0
        if length >= LARGE_VALUE_BYTES:
            rows = self.file.gather(np.array([offset]), length)
            return rows.view(self.dtype).reshape(self.shape)
        if self.file.is_asked_for:
            self.file.will_need((offset,), length)
        copied: npt.NDArray[Any] = self.file.value(offset, self.dtype, self.shape).copy()
        return copied


def locate(
    snapshot: Snapshot, transaction: lmdb.Transaction, num_read: int, *, is_counted: bool
) -> LocatedValues | None:
    """The places of a snapshot's values, or None where LMDB has to be asked.

    Args:
        snapshot: Pinned, its lock held.
        transaction: The snapshot's.
        num_read: Samples that were read one by one from it so far.
        is_counted: Whether reads are counted; if not, nothing is made to count in.
    """
    known: LocatedValues | None = snapshot.located
    if known is not None or snapshot.is_unlocatable:
        return known
    count = int(transaction.stat()["entries"]) - NUM_RESERVED_KEYS
    identity = (snapshot.environment.file, snapshot.id)
    generation = snapshot.environment.generation
    try:
        table = _known_table(snapshot)
        if table is None and count > _READ_AT_ONCE:
            if num_read < _FIRST_READS:
                return None  # even a kept table takes longer than the first batch may
            table = _read_table(identity, generation)
            if table is None and count > _PAYS_AFTER * num_read:
                return None
        file = MappedFile(generation / "data.mdb")
        if file.file_id != identity[0]:
            # Nothing protects the pages of the new file from reuse.
            raise UnreadablePagesError("the store was cleared and made again")
        if table is None:
            table = read_value_table(file.data, snapshot.id)
            if count > _READ_AT_ONCE:
                _write_table(table, identity, generation)
                # Mapped, it costs this process no memory of its own.
                table = _read_table(identity, generation) or table
        _check(table, file, count, transaction)
    except (UnreadablePagesError, OSError, ValueError) as error:
        _logger.info("%s: values are read through LMDB (%s)", generation, str(error))
        snapshot.is_unlocatable = True
        return None
    with _tables_lock:
        _tables[snapshot.environment] = (snapshot.id, table)
    located = located_values(file, table, snapshot.metadata)
    counts = counts_of(generation.parent) if is_counted and located.common_length else None
    if counts is not None:
        located.counter = HitCounter(counts, table.keys)
    snapshot.located = located
    return located


def _check(table: ValueTable, file: MappedFile, count: int, transaction: lmdb.Transaction) -> None:
    """Compare with what LMDB itself says, for a few values."""
    if len(table.keys) != count:
        raise UnreadablePagesError(f"{len(table.keys)} values found of {count}")
    for row in {0, count // 3, count // 2, count - 1} if count else ():
        offset, length = int(table.offsets[row]), int(table.lengths[row])
        value = transaction.get(bytes(table.keys[row]))
        if offset < 0 or value is None or len(value) != length:
            raise UnreadablePagesError("a value of another length than LMDB's")
        head = min(length, 256)
        if file.data[offset : offset + head].tobytes() != bytes(value[:head]):
            raise UnreadablePagesError("a value at another place than LMDB's")


def located_values(file: MappedFile, table: ValueTable, metadata: StoreMetadata) -> LocatedValues:
    """Values at the places of a table, with what they have in common."""
    dtype = NUMPY_DTYPES[metadata.config.dtype]
    stored_shape = metadata.embedding_shape or ()
    length = int(table.lengths[0]) if len(table.lengths) else 0
    expected = dtype.itemsize * math.prod(n for n in stored_shape if n)
    if None in stored_shape and length % expected == 0:
        stored_shape = (length // expected, *stored_shape[1:])
        expected = length
    alike = length > 0 and length == expected and bool((table.lengths == length).all())
    shape = tuple(n or 0 for n in stored_shape)
    return LocatedValues(file, table, dtype, length if alike else None, shape)


def _known_table(snapshot: Snapshot) -> ValueTable | None:
    with _tables_lock:
        snapshot_id, table = _tables.get(snapshot.environment, (None, None))
    return table if snapshot_id == snapshot.id else None


def _columns(content: npt.NDArray[np.uint8], width: int, count: int) -> ValueTable:
    """A table over its file's bytes: all offsets, all lengths, all keys."""
    offsets, lengths = content[: 16 * count].view("<i8").reshape(2, count)
    return ValueTable(content[16 * count :].view(f"S{width}"), offsets, lengths)


def _digest(identity: _Identity, width: int, count: int, content: bytes | memoryview) -> bytes:
    digest = xxhash.xxh3_64(struct.pack("<4Q", identity[1], identity[0][1], width, count))
    digest.update(content)
    return bytes(digest.digest())


def _read_table(identity: _Identity, generation: Path) -> ValueTable | None:
    """The kept table of exactly this snapshot, mapped; None if there is none or it is damaged."""
    path = generation / f"{_PREFIX}{identity[1]}"
    try:
        with os.fdopen(open_file(path), "rb") as file:
            head = file.read(_HEADER.size)
            rest = np.memmap(file, np.uint8, "r")[_HEADER.size :].view(np.ndarray)
        magic, transaction, inode, width, count, digest = _HEADER.unpack(head)
        if (magic, transaction, inode) != (_MAGIC, identity[1], identity[0][1]):
            return None
        size = count * (16 + width)
        if len(rest) < size:
            return None
        content = rest[:size]
    except (OSError, struct.error, TypeError, ValueError, OverflowError):
        return None
    if _digest(identity, width, count, content.data) != digest:
        _logger.warning("%s is damaged and is not used; it will be made again", path)
        return None
    return _columns(content, width, count)


def _write_table(table: ValueTable, identity: _Identity, generation: Path) -> None:
    """Keep a table if this process may; replaces those of older snapshots."""
    if not os.access(generation, os.W_OK) or file_id(generation) != identity[0]:
        return
    columns = (table.offsets, table.lengths, table.keys)
    content = b"".join(np.ascontiguousarray(column).tobytes() for column in columns)
    head = _HEADER.pack(
        _MAGIC,
        identity[1],
        identity[0][1],
        table.keys.dtype.itemsize,
        len(table.keys),
        _digest(identity, table.keys.dtype.itemsize, len(table.keys), content),
    )
    path = generation / f"{_PREFIX}{identity[1]}"
    # A cache of a cache: a full disk or a compaction meanwhile is no reason to fail.
    with contextlib.suppress(OSError):
        replace_file(path, head + content)
        for other in generation.iterdir():
            number = table_number(other.name)
            if number is not None and number < identity[1]:
                other.unlink(missing_ok=True)


def table_number(name: str) -> int | None:
    """Return the transaction of a kept table from its file's name; None for another file."""
    number = name.removeprefix(_PREFIX)
    return int(number) if name.startswith(_PREFIX) and number.isdigit() else None

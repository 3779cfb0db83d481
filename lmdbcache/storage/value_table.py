"""The values of one snapshot: where each lies in the mapped file, copied from there.

The entries of a store up to some size are read when a first batch asks for them (some milliseconds
for 28,000 samples). Those of a larger store are kept next to the data file as
`offsets-<transaction>`, derived and removable at any time, so that opening 2 million samples takes
milliseconds and all processes share one copy.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import struct
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import lmdb
import numpy as np
import numpy.typing as npt
import xxhash

from lmdbcache.errors import InvalidEmbeddingError, InvalidSampleIdError
from lmdbcache.files import open_file, replace_file
from lmdbcache.storage.environment import Environment, Snapshot
from lmdbcache.storage.gather import LARGE_VALUE_BYTES, MappedFile, batch_buffers
from lmdbcache.storage.layout import NUM_RESERVED_KEYS, sample_id_of_key, sample_key
from lmdbcache.storage.metadata import StoreMetadata
from lmdbcache.storage.opening import file_id
from lmdbcache.storage.pages.pages import EntryTable, UnreadablePagesError, read_table
from lmdbcache.storage.quantization import SCALE_BYTES, dequantized
from lmdbcache.storage.row_parts import RowPart
from lmdbcache.storage.statistics import HitCounter, counts_of
from lmdbcache.storage.values import NUMPY_DTYPES, batch_array, from_stored, stored_form

_logger: Final = logging.getLogger(__name__)

_READ_AT_ONCE: Final = 100_000  # samples; beyond, reading the table takes longer than a batch may
_REMEMBERED_ROWS: Final = 1 << 16
_FIRST_READS: Final = 4096
_PAYS_AFTER: Final = 16  # a share of the store this large has been read one by one: read the table
_MAGIC: Final = b"lmdbcache offsets 1\n"
_HEADER: Final = struct.Struct("<20s4xQQQQ8s")  # magic, transaction, inode, width, count, checksum
_PREFIX: Final = "offsets-"

_Identity = tuple[Any, int]
# By environment, not by file: inode and transaction numbers of a cleared store come again.
_tables: weakref.WeakKeyDictionary[Environment, tuple[int, EntryTable]] = (
    weakref.WeakKeyDictionary()
)
_tables_lock = threading.Lock()


@dataclass
class ValueTable:
    """One snapshot's values. Valid while the snapshot is pinned; read with its lock held.

    Args:
        file: data.mdb.
        entries: Key, place and length of each value.
        dtype: Of the stored arrays.
        common_length: Bytes of each value if all are alike and as the metadata says; else each is
            read by itself.
        shape: Of one stored array, if all are alike.
        is_quantized: Whether these are rows of int8 with a scale each.
        counter: Where values of a common length are counted; None: they aren't.
    """

    file: MappedFile
    entries: EntryTable
    dtype: np.dtype[Any]
    common_length: int | None
    shape: tuple[int, ...]
    is_quantized: bool = False
    counter: HitCounter | None = None
    known_rows: dict[str, int] = field(default_factory=dict)
    # Whether that has every sample; its length doesn't tell: ids have several spellings.
    knows_all: bool = False

    def __post_init__(self) -> None:
        # One number of it is read faster than one of the array.
        self._offset_cells = memoryview(self.entries.offsets)  # type: ignore[arg-type]
        is_large = (self.common_length or 0) >= LARGE_VALUE_BYTES
        self._is_plainly_copied = not (is_large or self.file.is_asked_for)

    @classmethod
    def of(cls, file: MappedFile, entries: EntryTable, metadata: StoreMetadata) -> ValueTable:
        """Return the table of these values, with what they have in common."""
        shape = (0,) if metadata.embedding_shape is None else metadata.embedding_shape
        dtype, stored_shape = stored_form(shape, metadata.config.dtype)
        length = int(entries.lengths[0]) if len(entries.lengths) else 0
        expected = dtype.itemsize * math.prod(n for n in stored_shape if n)
        if None in stored_shape and length % expected == 0:
            stored_shape = (length // expected, *stored_shape[1:])
            expected = length
        alike = length > 0 and length == expected and bool((entries.lengths == length).all())
        whole = tuple(n or 0 for n in stored_shape)
        is_quantized = metadata.config.dtype == "int8"
        return cls(file, entries, dtype, length if alike else None, whole, is_quantized)

    def rows_of(self, sample_ids: Sequence[str]) -> npt.NDArray[np.int64] | None:
        """Return the row of each sample, or None if one isn't stored."""
        known = self.known_rows
        try:
            return np.fromiter(map(known.__getitem__, sample_ids), np.int64, len(sample_ids))
        except KeyError:
            pass
        if len(known) > _REMEMBERED_ROWS:
            known.clear()
            self.knows_all = False
        rows = find_rows(self.entries, sample_ids)
        if rows.size and rows.min() < 0:
            return None
        known.update(zip(sample_ids, rows.tolist(), strict=True))
        return rows

    def remember_all(self) -> bool:
        """Remember the row of every sample by its id, if the store is small enough for that."""
        keys = self.entries.keys
        if self.common_length is None or len(keys) > _REMEMBERED_ROWS:
            return False
        if not self.knows_all:
            sample_ids = map(sample_id_of_key, keys.tolist())
            self.known_rows.update(zip(sample_ids, range(len(keys)), strict=True))
            self.knows_all = True
        return True

    def copy(self, row: int) -> npt.NDArray[Any]:
        """Return an owned copy of the embedding in this row, of the common length."""
        offset = self._offset_cells[row]
        if self._is_plainly_copied:
            # Not by `MappedFile.value`: a call is a tenth of a single read.
            view = np.ndarray(self.shape, self.dtype, self.file.mapped, offset)
            copied: npt.NDArray[Any] = dequantized(view) if self.is_quantized else view.copy()
            return copied
        whole: npt.NDArray[Any] = self.gather(np.array([row]))[0]
        return whole

    def gather(
        self,
        rows: npt.NDArray[np.int64],
        out: npt.NDArray[Any] | None = None,
        part: RowPart | None = None,
    ) -> npt.NDArray[Any]:
        """Copy the embeddings in these rows, or a part of each, into one array."""
        if not self.is_quantized:
            return self.gather_stored(rows, out, part)
        shape = self.shape if part is None else part.shape(self.shape)
        batch = _float32_array((len(rows), *shape[:-1], shape[-1] - SCALE_BYTES), out)
        self.file.dequantize(*self.places(rows, part), batch)
        return batch

    def gather_stored(
        self,
        rows: npt.NDArray[np.int64],
        out: npt.NDArray[Any] | None = None,
        part: RowPart | None = None,
    ) -> npt.NDArray[Any]:
        """Copy the values in these rows as they are stored; into `out` if these are embeddings."""
        places, length = self.places(rows, part)
        shape = (len(rows), *(self.shape if part is None else part.shape(self.shape)))
        if out is None or self.is_quantized:
            return self.file.gather(places, length).view(self.dtype).reshape(shape)
        filled = batch_array(shape, self.dtype, out).reshape(-1).view(np.uint8)
        self.file.gather(places, length, filled.reshape(len(places), length))
        return out

    def decoded(
        self, values: npt.NDArray[Any], out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Return what `gather_stored` gave as embeddings."""
        if not self.is_quantized:
            return values
        shape = (*values.shape[:-1], values.shape[-1] - SCALE_BYTES)
        return dequantized(values, _float32_array(shape, out))

    def places(
        self, rows: npt.NDArray[np.int64], part: RowPart | None = None
    ) -> tuple[npt.NDArray[np.int64], int]:
        """Return where the values in these rows lie, or the runs of a part, and their length."""
        offsets = self.entries.offsets[rows]
        if part is None:
            return offsets, self.common_length or 0
        return part.places(offsets, self.shape, self.dtype.itemsize)


def _float32_array(shape: tuple[int, ...], out: npt.NDArray[Any] | None) -> npt.NDArray[np.float32]:
    dtype = np.dtype("<f4")
    if out is not None:
        return batch_array(shape, dtype, out)
    return batch_buffers.take(dtype.itemsize * math.prod(shape)).view(dtype).reshape(shape)


def value_table(
    snapshot: Snapshot, transaction: lmdb.Transaction, num_read: int, *, is_counted: bool
) -> ValueTable | None:
    """Return the table of a snapshot's values, or None where LMDB has to be asked.

    Args:
        snapshot: Pinned, its lock held.
        transaction: The snapshot's.
        num_read: Samples that were read one by one from it so far.
        is_counted: Whether reads are counted; if not, nothing is made to count in.
    """
    known: ValueTable | None = snapshot.values
    if known is not None or snapshot.is_unlocatable:
        return known
    count = int(transaction.stat()["entries"]) - NUM_RESERVED_KEYS
    identity = (snapshot.environment.file, snapshot.id)
    generation = snapshot.environment.generation
    try:
        entries = _known_entries(snapshot)
        if entries is None and count > _READ_AT_ONCE:
            if num_read < _FIRST_READS:
                return None  # even a kept table takes longer than the first batch may
            entries = _read_kept(identity, generation)
            if entries is None and count > _PAYS_AFTER * num_read:
                return None
        file = MappedFile(generation / "data.mdb")
        if file.file_id != identity[0]:
            # Nothing protects the pages of the new file from reuse.
            raise UnreadablePagesError("the store was cleared and made again")
        if entries is None:
            entries = read_table(file.data, snapshot.id)
            if count > _READ_AT_ONCE:
                _keep(entries, identity, generation)
                # Mapped, it costs this process no memory of its own.
                entries = _read_kept(identity, generation) or entries
        _check(entries, file, count, transaction)
    except (UnreadablePagesError, OSError, ValueError) as error:
        _logger.info("%s: values are read through LMDB (%s)", generation, str(error))
        snapshot.is_unlocatable = True
        return None
    with _tables_lock:
        _tables[snapshot.environment] = (snapshot.id, entries)
    table = ValueTable.of(file, entries, snapshot.metadata)
    counts = counts_of(generation.parent) if is_counted and table.common_length else None
    if counts is not None:
        table.counter = HitCounter(counts, entries.keys)
    snapshot.values = table
    return table


def _check(
    entries: EntryTable, file: MappedFile, count: int, transaction: lmdb.Transaction
) -> None:
    """Compare with what LMDB itself says, for a few values."""
    if len(entries.keys) != count:
        raise UnreadablePagesError(f"{len(entries.keys)} values found of {count}")
    for row in {0, count // 3, count // 2, count - 1} if count else ():
        offset, length = int(entries.offsets[row]), int(entries.lengths[row])
        value = transaction.get(bytes(entries.keys[row]))
        if offset < 0 or value is None or len(value) != length:
            raise UnreadablePagesError("a value of another length than LMDB's")
        head = min(length, 256)
        if file.data[offset : offset + head].tobytes() != bytes(value[:head]):
            raise UnreadablePagesError("a value at another place than LMDB's")


def find_rows(entries: EntryTable, sample_ids: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the row of each sample, `(n,)`, -1 where none is stored."""
    # A stored key is of canonical form: an id that is found as it stands needn't be brought to it.
    with contextlib.suppress(TypeError, UnicodeEncodeError):
        keys = [*map(str.encode, sample_ids)]
        rows = entries.find(keys)
        if (not rows.size or rows.min() >= 0) and b"\0" not in b"".join(keys):
            return rows
    return entries.find([key_or_empty(sample_id) for sample_id in sample_ids])


def key_or_empty(sample_id: str) -> bytes:
    """The key to look a sample up by; the empty one, which is never stored, for a bad id."""
    try:
        return sample_key(sample_id)
    except InvalidSampleIdError:
        return b""


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


def _known_entries(snapshot: Snapshot) -> EntryTable | None:
    with _tables_lock:
        snapshot_id, table = _tables.get(snapshot.environment, (None, None))
    return table if snapshot_id == snapshot.id else None


def _columns(content: npt.NDArray[np.uint8], width: int, count: int) -> EntryTable:
    """A table over its file's bytes: all offsets, all lengths, all keys."""
    offsets, lengths = content[: 16 * count].view("<i8").reshape(2, count)
    return EntryTable(content[16 * count :].view(f"S{width}"), offsets, lengths)


def _digest(identity: _Identity, width: int, count: int, content: bytes | memoryview) -> bytes:
    digest = xxhash.xxh3_64(struct.pack("<4Q", identity[1], identity[0][1], width, count))
    digest.update(content)
    return bytes(digest.digest())


def _read_kept(identity: _Identity, generation: Path) -> EntryTable | None:
    """Return the kept table of exactly this snapshot, mapped; None if it is missing or damaged."""
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


def _keep(entries: EntryTable, identity: _Identity, generation: Path) -> None:
    """Keep a table if this process may; replaces those of older snapshots."""
    if not os.access(generation, os.W_OK) or file_id(generation) != identity[0]:
        return
    columns = (entries.offsets, entries.lengths, entries.keys)
    content = b"".join(np.ascontiguousarray(column).tobytes() for column in columns)
    head = _HEADER.pack(
        _MAGIC,
        identity[1],
        identity[0][1],
        entries.keys.dtype.itemsize,
        len(entries.keys),
        _digest(identity, entries.keys.dtype.itemsize, len(entries.keys), content),
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

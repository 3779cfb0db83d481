"""Reading with verification: what is handed out matched its checksum after it was copied.

The pages are looked at before LMDB is, and again under the pinned snapshot; from then on values and
checksums are taken from their places in the mapped file, within its bounds. What is compared is
the caller's own copy, so nothing can change between the look and the use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import ConfigError, IntegrityError
from lmdbcache.files import few
from lmdbcache.storage.checks.checking import metadata_findings
from lmdbcache.storage.checks.value_checks import CHECKSUM_BYTES, CheckedValues, paired
from lmdbcache.storage.engine_errors import DAMAGE_REMEDY
from lmdbcache.storage.environment import Snapshot
from lmdbcache.storage.gather import MappedFile
from lmdbcache.storage.generations import current_generation
from lmdbcache.storage.layout import CHECKSUMS_NAME, NUM_RESERVED_KEYS, sample_id_of_key
from lmdbcache.storage.metadata import checksum
from lmdbcache.storage.pages.meta_pages import MetaPage
from lmdbcache.storage.pages.page_file import PageFile
from lmdbcache.storage.pages.pages import UnreadablePagesError, read_table
from lmdbcache.storage.value_table import ValueTable, key_or_empty, stack
from lmdbcache.storage.values import from_stored

Verify = Literal["never", "first_read", "always"]

_TRIES: Final = 5


@dataclass(frozen=True)
class Mismatch:
    """Samples whose copied value doesn't match its checksum, or can't be found."""

    sample_ids: list[str]

    def error(self, store: Path) -> IntegrityError:
        """What to raise for them."""
        names = few(list(map(repr, self.sample_ids)), 3)
        return IntegrityError(
            f"{names}: the value stored in {store} is damaged or lost. Repair the store "
            "(`cache.repair(config)`); the next extraction computes what that drops"
        )


@dataclass
class _VerifiedValues:
    """One snapshot's values with their checksums."""

    values: ValueTable
    checked: CheckedValues
    checksums: bytes
    # (n,) bool: was compared already and needn't be again; None compares at every read.
    compared: npt.NDArray[np.bool_] | None
    without_value: frozenset[bytes] = frozenset()

    def rows_of(self, sample_ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Row of each sample, -1 where there is none."""
        rows = self.values.rows_of(sample_ids)
        if rows is None:
            rows = self.checked.table.find(list(map(key_or_empty, sample_ids)))
        return rows

    def absent(
        self, sample_ids: Sequence[str], rows: npt.NDArray[np.int64]
    ) -> list[str] | Mismatch:
        """Samples without a row: never stored, or those of them whose checksum is there alone."""
        absent = [i for i, row in zip(sample_ids, rows.tolist(), strict=True) if row < 0]
        lost = [i for i in absent if key_or_empty(i) in self.without_value]
        return Mismatch(lost) if lost else absent

    def copied(self, row: int) -> npt.NDArray[np.uint8]:
        """One value as it is stored, owned."""
        table = self.checked.table
        offset, length = int(table.offsets[row]), int(table.lengths[row])
        self.values.file.prepare([offset], length)
        copy: npt.NDArray[np.uint8] = self.values.file.data[offset : offset + length].copy()
        return copy

    def mismatches(self, rows: npt.NDArray[np.int64], values: Iterable[Any]) -> list[int]:
        """Positions of copied values that aren't as written."""
        if self.compared is not None and self.compared[rows].all():
            return []
        keys, has_checksum = self.checked.table.keys, self.checked.has_checksum
        wrong = []
        for index, (row, value) in enumerate(zip(rows.tolist(), values, strict=True)):
            expected = self.checksums[CHECKSUM_BYTES * row : CHECKSUM_BYTES * (row + 1)]
            if checksum(keys[row], value) != expected or not has_checksum[row]:
                wrong.append(index)
        if self.compared is not None and not wrong:
            self.compared[rows] = True
        return wrong


def check_mode(mode: str) -> None:
    """Refuse a mode that doesn't exist.

    Raises:
        ConfigError: Not one of `Verify`.
    """
    if mode not in ("never", "first_read", "always"):
        raise ConfigError(f"verify: {mode!r}; known are 'never', 'first_read', 'always'")


def check_pages(store: Path) -> None:
    """Look at the pages that lead to the values before LMDB follows them.

    Raises:
        IntegrityError: They are damaged.
    """
    for _ in range(_TRIES):
        generation = current_generation(store)
        path = (generation or store) / "data.mdb"
        if not path.exists():
            return  # opening says what is wrong
        with PageFile(path) as file:
            if file.meta is None:
                return
            transaction = file.meta.transaction
            try:
                _tables(file, MappedFile(path), transaction)
                problems = metadata_findings(file)
            except (UnreadablePagesError, OSError, ValueError) as error:
                problems = [str(error)]
        if not problems:
            return
        with PageFile(path) as file:
            is_same = file.meta is not None and file.meta.transaction == transaction
        if is_same and current_generation(store) == generation:
            raise IntegrityError(f"{path} is damaged ({problems[0]}). {DAMAGE_REMEDY}")
    # It is written to all the time, by a process that sees no damage.


def prepare(snapshot: Snapshot, mode: Verify) -> bool:
    """Find a snapshot's values and checksums.

    Returns:
        False if two commits since have taken its meta page: a newer snapshot is needed.

    Raises:
        IntegrityError: Its pages are damaged.
    """
    path = snapshot.environment.generation / "data.mdb"
    try:
        with PageFile(path) as file:
            file.meta = _meta_of(file, snapshot.id)
            if file.meta is None:
                return False
            mapped = MappedFile(path)
            if mapped.file_id != snapshot.environment.file:
                return False
            checked = _tables(file, mapped, snapshot.id)
    except FileNotFoundError:
        return False
    except (UnreadablePagesError, OSError, ValueError) as error:
        with contextlib.suppress(OSError), PageFile(path) as file:
            if _meta_of(file, snapshot.id) is None:
                return False  # taken in the middle of this
        raise IntegrityError(f"{path} is damaged ({error}). {DAMAGE_REMEDY}") from None
    compared = np.zeros(len(checked.table.keys), bool) if mode == "first_read" else None
    snapshot.verified = _VerifiedValues(
        ValueTable.of(mapped, checked.table, snapshot.metadata),
        checked,
        checked.checksums.tobytes(),
        compared,
        without_value=frozenset(checked.without_value),
    )
    return True


def stored_keys(snapshot: Snapshot, after: bytes = b"", limit: int | None = None) -> list[bytes]:
    """Return the keys of a prepared snapshot's embeddings in order.

    Args:
        snapshot: Prepared.
        after: Only those that follow this key.
        limit: At most so many.

    Raises:
        IntegrityError: Some of them can't be found any more.
    """
    verified: _VerifiedValues = snapshot.verified
    if lost := verified.without_value:
        names = [sample_id_of_key(key) for key in sorted(lost)]
        raise Mismatch(names).error(snapshot.environment.generation.parent)
    keys = verified.checked.table.keys
    first = int(np.searchsorted(keys, np.bytes_(after), "right"))
    found: list[bytes] = keys[first : None if limit is None else first + limit].tolist()
    return found


def has_samples(snapshot: Snapshot, sample_ids: Sequence[str]) -> list[bool]:
    """Return of each sample whether it is stored, by a prepared snapshot; damage isn't absence."""
    verified: _VerifiedValues = snapshot.verified
    rows = verified.rows_of(sample_ids).tolist()
    lost = verified.without_value
    return [row >= 0 or key_or_empty(i) in lost for i, row in zip(sample_ids, rows, strict=True)]


def read_batch(
    snapshot: Snapshot, sample_ids: Sequence[str], out: npt.NDArray[Any] | None
) -> npt.NDArray[Any] | list[str] | Mismatch:
    """The embeddings of a prepared snapshot; what is absent; or what doesn't match."""
    verified: _VerifiedValues = snapshot.verified
    rows = verified.rows_of(sample_ids)
    if rows.size and rows.min() < 0:
        return verified.absent(sample_ids, rows)
    values = verified.values
    if length := values.common_length:
        stored = values.gather_stored(rows, out)
        # As bytes: not every dtype has a buffer of its own.
        as_bytes = stored.reshape(-1).view(np.uint8).reshape(len(rows), length)
        wrong = verified.mismatches(rows, as_bytes)
    else:
        copies = list(map(verified.copied, rows.tolist()))
        wrong = verified.mismatches(rows, copies)
    if wrong:
        return Mismatch([sample_ids[index] for index in wrong])
    if length:
        return values.decoded(stored, out)
    return stack(copies, sample_ids, snapshot.metadata, out)


def read_one(snapshot: Snapshot, sample_id: str) -> npt.NDArray[Any] | list[str] | Mismatch:
    """One embedding, as `read_batch`."""
    verified: _VerifiedValues = snapshot.verified
    rows = verified.rows_of([sample_id])
    if rows[0] < 0:
        return verified.absent([sample_id], rows)
    value, metadata = verified.copied(int(rows[0])), snapshot.metadata
    if verified.mismatches(rows, [value]):
        return Mismatch([sample_id])
    return from_stored(
        sample_id, value, metadata.config.dtype, metadata.embedding_shape, copy=False
    )


def _meta_of(file: PageFile, transaction: int) -> MetaPage | None:
    """The meta page of this transaction, unless a newer one has taken it."""
    meta = file.metas[transaction & 1]
    return meta if meta is not None and meta.transaction == transaction else None


def _tables(file: PageFile, mapped: MappedFile, transaction: int) -> CheckedValues:
    tree = file.find_named(CHECKSUMS_NAME)
    if tree is None or file.meta is None:
        raise UnreadablePagesError("the checksums can't be found")
    values = read_table(mapped.data, transaction)
    sums = read_table(mapped.data, transaction, tree)
    # What a damaged page leaves out would look as if it had never been stored.
    found = (len(values.keys), len(sums.keys))
    stored = (file.meta.main.num_entries - NUM_RESERVED_KEYS, tree.num_entries - 1)
    if found != stored:
        raise UnreadablePagesError(
            f"its pages lead to {found[0]} embeddings and {found[1]} checksums of {stored[0]} and "
            f"{stored[1]}"
        )
    return paired(values, sums, mapped.data)

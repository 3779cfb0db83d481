"""Checking a generation's data.mdb without handing it to LMDB: its structure, then its values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
from lmdb.verify import VerifyError, verify as verify_structure

from lmdbcache.errors import IntegrityError, StorageError
from lmdbcache.storage.checks.value_checks import (
    CHECKSUM_BYTES,
    CheckedValues,
    Progress,
    damaged_rows,
    paired,
)
from lmdbcache.storage.engine_errors import LOSS_REMEDY
from lmdbcache.storage.gather import MappedFile
from lmdbcache.storage.layout import CHECKSUMS_NAME, METADATA_KEY, sample_id_of_key
from lmdbcache.storage.metadata import checksum
from lmdbcache.storage.opening import file_problem
from lmdbcache.storage.pages.page_file import Entry, PageFile
from lmdbcache.storage.pages.pages import (
    EntryTable,
    UnreadablePagesError,
    find_hidden_keys,
    read_table,
)
from lmdbcache.storage.report import Report

_MAX_FINDINGS: Final = 20
_TRIES: Final = 5


@dataclass(frozen=True)
class IntegrityReport(Report):
    """What is wrong with a store.

    Args:
        path: The store's folder.
        num_embeddings: Embeddings that were looked at.
        structure: What is wrong with the file, LMDB's pages and the metadata record. What can still
            be found was looked at nevertheless; more may be gone.
        damaged: Sample ids whose value doesn't match its checksum, or has none; or that no look-up
            finds.
        missing: Sample ids of which only the checksum is left.
    """

    derived: ClassVar[tuple[str, ...]] = ("is_sound",)

    path: Path
    num_embeddings: int
    structure: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.structure or self.damaged or self.missing)


def check_generation(
    generation: Path, *, with_values: bool = True, progress: Progress | None = None
) -> IntegrityReport:
    """Check a generation that others may be writing to.

    Args:
        generation: Its folder.
        with_values: Also compare all values with their checksums.
        progress: Called with (values done, values in all).

    Raises:
        IntegrityError: data.mdb is missing, or nothing of it can be read.
        StorageError: It is written to faster than it can be checked.
    """
    for _ in range(_TRIES):
        before = _newest_transaction(generation)
        structure = structure_findings(generation)
        if structure or with_values:
            with PageFile(generation / "data.mdb") as file:
                values = placed_values(file, is_sound=not structure)
                findings = check_values(file, values, structure, progress)
        else:
            findings = IntegrityReport(generation.parent, 0)
        # A commit in the middle of the walk looks like damage.
        if findings.is_sound or _newest_transaction(generation) == before:
            return findings
    raise StorageError(
        f"{generation} is written to faster than it can be checked. Try again when its writer has "
        "ended"
    )


def structure_findings(generation: Path) -> tuple[str, ...]:
    """What is wrong with data.mdb's pages, by LMDB's rules; no value is looked at.

    Raises:
        IntegrityError: data.mdb is missing, or nothing of it can be read.
    """
    path = generation / "data.mdb"
    problem, *_ = file_problem(generation)
    with PageFile(path) as file:
        if file.meta is None:
            raise IntegrityError(f"{path} {problem}. {LOSS_REMEDY}")
    findings = [] if problem is None else [f"data.mdb {problem}"]
    try:
        findings += verify_structure(str(generation))  # type: ignore[no-untyped-call]
    except (VerifyError, OSError, ValueError, IndexError, MemoryError) as error:
        findings.append(str(error))
    with PageFile(path) as file:
        findings += metadata_findings(file)
    return tuple(str(finding) for finding in findings[:_MAX_FINDINGS])


def metadata_findings(file: PageFile) -> list[str]:
    """What is wrong with the newest commit's metadata record."""
    checksums = file.find_named(CHECKSUMS_NAME)
    entry = file.find(file.meta.main, METADATA_KEY) if file.meta else None
    if entry is None or checksums is None:
        return ["this is not a store of lmdbcache: no metadata, or no checksums, can be found"]
    entries = (entry, file.find(checksums, METADATA_KEY))
    record, expected = (file.read(e.offset, e.length) if e else None for e in entries)
    if record is None or expected != checksum(METADATA_KEY, record):
        return ["the metadata record is damaged"]
    return []


def placed_values(file: PageFile, *, is_sound: bool) -> CheckedValues:
    """Where the values of the newest commit lie, each with its checksum.

    Args:
        file: data.mdb.
        is_sound: Its structure was found sound: read it the fast way.
    """
    if is_sound and file.meta is not None:
        try:
            data, transaction = MappedFile(file.path).data, file.meta.transaction
            values = read_table(data, transaction)
            tree = file.find_named(CHECKSUMS_NAME)
            if tree is not None:
                sums = read_table(data, transaction, tree)
                hidden = (find_hidden_keys(data, transaction, t) for t in (None, tree))
                found = frozenset(itertools.chain.from_iterable(hidden))
                return replace(paired(values, sums, data), hidden=found)
        except (UnreadablePagesError, OSError, ValueError):
            pass  # another program's database, or a commit meanwhile
    return _reachable_values(file)


def check_values(
    file: PageFile,
    values: CheckedValues,
    structure: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> IntegrityReport:
    """Compare values with their checksums.

    Args:
        file: data.mdb.
        values: What `placed_values` found.
        structure: What is known to be wrong already.
        progress: Called with (values done, values in all).
    """
    rows = damaged_rows(file.descriptor, values, progress)
    keys = values.table.keys
    damaged = {bytes(keys[row]) for row in rows} | values.hidden
    return IntegrityReport(
        file.path.parent.parent,
        len(keys),
        structure,
        damaged=tuple(map(sample_id_of_key, sorted(damaged))),
        missing=tuple(map(sample_id_of_key, values.without_value)),
    )


def _newest_transaction(generation: Path) -> int | None:
    try:
        with PageFile(generation / "data.mdb") as file:
            return file.meta.transaction if file.meta else None
    except FileNotFoundError:
        return None


def _reachable_values(file: PageFile) -> CheckedValues:
    """The same from pages of which some are damaged."""
    main = dict(_with_keys(file.walk(file.meta.main))) if file.meta else {}
    tree = file.named(main.get(CHECKSUMS_NAME))
    sums = dict(_with_keys(file.walk(tree))) if tree else {}
    values = {k: e for k, e in main.items() if k != METADATA_KEY and not e.is_database}
    expected = {k: file.read(e.offset, e.length) for k, e in sums.items()}
    keys = sorted(values)
    found = [expected.get(key) or b"" for key in keys]
    has_checksum = np.array([len(value) == CHECKSUM_BYTES for value in found], bool)
    padded = b"".join(value[:CHECKSUM_BYTES].ljust(CHECKSUM_BYTES, b"\0") for value in found)
    table = EntryTable(
        np.array(keys, np.bytes_) if keys else np.empty(0, "S1"),
        np.array([values[key].offset for key in keys], np.int64),
        np.array([values[key].length for key in keys], np.int64),
    )
    return CheckedValues(
        table,
        np.frombuffer(padded, np.uint8).reshape(-1, CHECKSUM_BYTES),
        has_checksum,
        tuple(sorted(sums.keys() - values.keys() - {METADATA_KEY})),
    )


def _with_keys(entries: Iterator[Entry]) -> Iterator[tuple[bytes, Entry]]:
    return ((entry.key, entry) for entry in entries)

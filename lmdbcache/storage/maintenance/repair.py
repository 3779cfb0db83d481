"""`repair`: a new generation of what is sound in a damaged one, and a list of what isn't."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from lmdbcache.errors import CacheNotFoundError, IntegrityError
from lmdbcache.storage.checks.checking import check_generation
from lmdbcache.storage.checks.first_opening import mark_known
from lmdbcache.storage.checks.value_checks import Progress
from lmdbcache.storage.commit import put_metadata, transaction_in
from lmdbcache.storage.engine_errors import translated_errors
from lmdbcache.storage.environment import acquire, release
from lmdbcache.storage.forking import no_fork
from lmdbcache.storage.generations import (
    RESERVE_BYTES,
    check_room,
    create_generation,
    current_generation,
    point_at,
    publish_generation,
    remove_other_generations,
    write_lock,
)
from lmdbcache.storage.layout import CURRENT_NAME, sample_id_of_key
from lmdbcache.storage.maintenance.damaged_store import DamagedStore, generation_to_repair
from lmdbcache.storage.metadata import checksum
from lmdbcache.storage.report import Report

_COMMIT_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class RepairReport(Report):
    """What a repair did, or would do.

    Args:
        path: The store's folder.
        num_kept: Embeddings that are sound.
        dropped: Sample ids that were found and have no sound value; the next extraction computes
            them again. What a lost page held can't be named: the extraction also finds that.
        structure: What was wrong with the file and with LMDB's pages.
        is_repaired: Whether there is a new generation; a sound store is left as it is.
    """

    derived: ClassVar[tuple[str, ...]] = ("was_sound",)

    path: Path
    num_kept: int
    dropped: tuple[str, ...] = ()
    structure: tuple[str, ...] = ()
    is_repaired: bool = False

    @property
    def was_sound(self) -> bool:
        """Whether there was nothing to repair."""
        return not (self.structure or self.dropped)


def repair(
    store: str | Path, *, dry_run: bool = False, progress: Progress | None = None
) -> RepairReport:
    """Build a new generation from what is sound; the old one stays until that is checked.

    Writers wait until the end; readers go on with the old generation until they refresh. LMDB never
    gets to see the damaged file. Interrupted at any point, the store is as before.

    Args:
        store: The store's folder.
        dry_run: Only say what would be kept and dropped.
        progress: Called with (values written, values in all).

    Raises:
        CacheNotFoundError: Nothing is stored here.
        CacheFullError: The disk can't hold the new generation.
        IntegrityError: Nothing can be read, or the metadata record is lost.
    """
    store = Path(store).absolute()
    if not os.path.lexists(store / CURRENT_NAME):
        raise CacheNotFoundError(f"nothing is stored in {store}")
    with write_lock(store), DamagedStore(store) as damaged:
        is_named = _is_named(store)
        structure = damaged.findings.structure
        if damaged.findings.is_sound and not is_named:
            structure = (f"{CURRENT_NAME} was garbage",)
        report = RepairReport(
            store,
            len(damaged),
            damaged.dropped,
            structure,
            is_repaired=not dry_run and not (damaged.findings.is_sound and is_named),
        )
        if not report.is_repaired:
            return report
        if not is_named:
            point_at(store, generation_to_repair(store))
        if damaged.findings.is_sound:
            return report
        new = _rebuilt(store, damaged, progress)
        rebuilt = check_generation(new)
        if not rebuilt.is_sound or rebuilt.num_embeddings != len(damaged):
            raise IntegrityError(
                f"{store}: the new generation isn't sound ({rebuilt.to_dict()}). "
                "The store was left as it is; check the disk and the memory of this machine"
            )
        publish_generation(store, new)
        remove_other_generations(store)
    return report


def _is_named(store: Path) -> bool:
    """Whether `CURRENT` names a generation, and isn't garbage."""
    try:
        return current_generation(store) is not None
    except IntegrityError:
        return False


def _rebuilt(store: Path, damaged: DamagedStore, progress: Progress | None) -> Path:
    """A new generation of the sound values, not yet published."""
    check_room(store, damaged.num_bytes * 9 // 8 + RESERVE_BYTES, "a repair")
    new = create_generation(store)
    with no_fork, translated_errors(store):
        environment = acquire(new, write=True, create=True)
        try:
            with environment.env.begin(write=True) as transaction:
                environment.create_databases(transaction)
                put_metadata(environment, transaction, damaged.metadata)
            done = 0
            for items in _batches(store, damaged):
                with transaction_in(environment) as transaction:
                    for key, value, expected in items:
                        transaction.put(key, value)
                        transaction.put(key, expected, db=environment.checksums)
                done += len(items)
                if progress is not None:
                    progress(done, len(damaged))
        finally:
            release(environment)
    mark_known(new)
    return new


def _batches(store: Path, damaged: DamagedStore) -> Iterator[list[tuple[bytes, bytes, bytes]]]:
    """(key, value, checksum) in key order, for one transaction each, checked once more."""
    items, num_bytes = [], 0
    for key, expected in damaged.checksums():
        value = damaged.read(key)
        if value is None or checksum(key, value) != expected:
            raise IntegrityError(
                f"{store}: {sample_id_of_key(key)} reads differently the second time. The "
                "store was left as it is; check the disk and the memory of this machine"
            )
        items.append((key, value, expected))
        num_bytes += len(value)
        if num_bytes >= _COMMIT_BYTES:
            yield items
            items, num_bytes = [], 0
    if items:
        yield items

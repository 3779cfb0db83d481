"""`repair`: a new generation of what is sound in a damaged one, and a list of what isn't."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lmdbcache.errors import CacheNotFoundError, IntegrityError
from lmdbcache.files import check_folder
from lmdbcache.storage.checked_marker import mark_known
from lmdbcache.storage.checks.checking import Findings, check_generation
from lmdbcache.storage.checks.value_checks import Progress
from lmdbcache.storage.engine_errors import LOSS_REMEDY, translated_errors
from lmdbcache.storage.environment import Environment, acquire, release
from lmdbcache.storage.forking import no_fork
from lmdbcache.storage.generations import (
    check_room,
    create_generation,
    current_generation,
    point_at,
    publish_generation,
    remove_other_generations,
    write_lock,
)
from lmdbcache.storage.layout import (
    CURRENT_NAME,
    GENERATION_NAME,
    METADATA_KEY,
    sample_id_of_key,
)
from lmdbcache.storage.maintenance.salvage import Salvage, salvage
from lmdbcache.storage.metadata import checksum
from lmdbcache.storage.pages.page_file import PageFile

__all__ = ["RepairReport", "generation_to_repair", "repair"]

_COMMIT_BYTES: Final = 64 << 20
_RESERVE_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class RepairReport:
    """What a repair did, or would do.

    Args:
        path: The store's folder.
        num_kept: Embeddings that are sound.
        dropped: Sample ids that were found and have no sound value; the next extraction computes
            them again. What a lost page held can't be named: the extraction finds that, too.
        structure: What was wrong with the file and with LMDB's pages.
        num_outside: How many of those kept were found on pages that no longer hang together.
        is_repaired: Whether there is a new generation; a sound store is left as it is.
    """

    path: Path
    num_kept: int
    dropped: tuple[str, ...] = ()
    structure: tuple[str, ...] = ()
    num_outside: int = 0
    is_repaired: bool = False

    @property
    def was_sound(self) -> bool:
        """Whether there was nothing to repair."""
        return not (self.structure or self.dropped)


def repair(
    store: str | Path, *, dry_run: bool = False, progress: Progress | None = None
) -> RepairReport:
    """Build a new generation from what is sound; the old one stays until that is checked.

    Writers wait meanwhile; readers go on with the old generation until they refresh. LMDB never
    gets to see the damaged file. Interrupted at any point, the store is as before.

    Args:
        store: The store's folder.
        dry_run: Only tell what would be kept and dropped.
        progress: Called with (values done, values in all).

    Raises:
        CacheNotFoundError: Nothing is stored here.
        CacheFullError: The disk can't hold the new generation.
        IntegrityError: The metadata record is lost; nothing can be kept without it.
    """
    store = Path(store).absolute()
    if not os.path.lexists(store / CURRENT_NAME):
        raise CacheNotFoundError(f"nothing is stored in {store}")
    with write_lock(store):
        generation = generation_to_repair(store)
        found = _findings(generation)
        is_named = _current_or_none(store) is not None
        if found.is_sound:
            garbage = () if is_named else (f"{CURRENT_NAME} was garbage",)
            if not (is_named or dry_run):
                point_at(store, generation)
            is_repaired = not (is_named or dry_run)
            return RepairReport(
                store, found.num_embeddings, structure=garbage, is_repaired=is_repaired
            )
        with PageFile(generation / "data.mdb") as file:
            saved = salvage(file, store)
            report = RepairReport(
                store,
                len(saved.values),
                tuple(map(sample_id_of_key, saved.dropped)),
                found.structure,
                saved.num_outside,
                is_repaired=not dry_run,
            )
            if dry_run:
                return report
            if not is_named:
                point_at(store, generation)
            new = _rebuilt(store, saved, file, progress)
        if (rebuilt := check_generation(new)) != Findings(len(saved.values)):
            raise IntegrityError(
                f"{store}: the new generation isn't sound ({rebuilt}). The store was left as it "
                "is; check the disk and the memory of this machine"
            )
        publish_generation(store, new)
        remove_other_generations(store)
    return report


def _current_or_none(store: Path) -> Path | None:
    """The live generation; None if `CURRENT` holds garbage."""
    try:
        return current_generation(store)
    except IntegrityError:
        return None


def generation_to_repair(store: Path) -> Path:
    """The live generation, or the only one there is, if `CURRENT` holds garbage.

    Raises:
        IntegrityError: It holds garbage, and there are several or none.
        NotRegularFileError: See `current_generation`.
    """
    generation = _current_or_none(store)
    if generation is not None:
        return generation
    folders = [child for child in store.iterdir() if GENERATION_NAME.fullmatch(child.name)]
    if len(folders) != 1:
        raise IntegrityError(
            f"{store / CURRENT_NAME} is garbage and there are {len(folders)} generations. Write "
            "the name of the right one there (the one with the lower number, if in doubt), and "
            "repair again"
        )
    check_folder(folders[0])
    return folders[0]


def _findings(generation: Path) -> Findings:
    if not (generation / "data.mdb").exists():
        raise IntegrityError(f"{generation / 'data.mdb'} is missing. {LOSS_REMEDY}")
    try:
        return check_generation(generation)
    except IntegrityError as error:  # neither meta page can be read
        return Findings(0, structure=(str(error),))


def _rebuilt(store: Path, saved: Salvage, file: PageFile, progress: Progress | None) -> Path:
    """A new generation of these values, not yet published."""
    needed = sum(entry.length for entry in saved.values.values())
    check_room(store, needed + needed // 8 + _RESERVE_BYTES, "a repair")
    new = create_generation(store)
    with no_fork, translated_errors(store):
        environment = acquire(new, write=True, create=True)
        try:
            with environment.env.begin(write=True) as transaction:
                environment.create_databases(transaction)
            total = len(saved.values)
            for done, items in _batches(saved, file):
                _put(environment, items)
                if progress is not None:
                    progress(done, total)
        finally:
            release(environment)
    mark_known(new)
    return new


def _batches(
    saved: Salvage, file: PageFile
) -> Iterator[tuple[int, list[tuple[bytes, bytes, bytes]]]]:
    """(values so far, some of (key, value, checksum)) in key order, each checked once more."""
    items = [(METADATA_KEY, saved.metadata, checksum(METADATA_KEY, saved.metadata))]
    num_bytes = 0
    for done, (key, entry) in enumerate(sorted(saved.values.items()), 1):
        value = file.read(entry.offset, entry.length)
        expected = saved.checksums[key]
        if value is None or checksum(key, value) != expected:
            raise IntegrityError(
                f"{file.path}: {sample_id_of_key(key)} reads differently the second time. The "
                "store was left as it is; check the disk and the memory of this machine"
            )
        items.append((key, value, expected))
        num_bytes += len(value)
        if num_bytes >= _COMMIT_BYTES:
            yield done, items
            items, num_bytes = [], 0
    if items:
        yield len(saved.values), items


def _put(environment: Environment, items: Iterable[tuple[bytes, bytes, bytes]]) -> None:
    with environment.env.begin(write=True) as transaction:
        for key, value, expected in items:
            transaction.put(key, value)
            transaction.put(key, expected, db=environment.checksums)

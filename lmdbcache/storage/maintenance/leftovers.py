"""Removing a store, or what a killed process has left in its folder; under the writer lock."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lmdbcache.errors import CacheError, NotRegularFileError, ReadOnlyCacheError
from lmdbcache.files import check_file, is_old_temporary, is_temporary, remove_entry
from lmdbcache.storage.generations import (
    current_generation,
    remove_store,
    write_lock,
    writers_of,
)
from lmdbcache.storage.last_use import LAST_USE_NAME
from lmdbcache.storage.layout import (
    CURRENT_NAME,
    GENERATION_NAME,
    STATISTICS_NAME,
    WRITER_LOCK_NAME,
)
from lmdbcache.storage.maintenance.damaged_store import unnamed_generations
from lmdbcache.storage.pages.page_file import PageFile
from lmdbcache.storage.report import Report
from lmdbcache.storage.statistics import add_reads
from lmdbcache.storage.value_table import table_number

# What only lmdbcache makes: a folder with anything else in it is nobody's leftover.
_STORE_NAME: Final = re.compile(r".*-[0-9a-f]{16}")
_OWN_NAMES: Final = frozenset((WRITER_LOCK_NAME, LAST_USE_NAME, STATISTICS_NAME))


@dataclass(frozen=True)
class Leftover(Report):
    """A file or folder that nothing leads to.

    Args:
        path: Where it is.
        size_bytes: Allocated on disk.
        what: What it was, for people.
    """

    path: Path
    size_bytes: int
    what: str


def find_leftovers(store: Path, records: Collection[str] = ()) -> list[Leftover]:
    """Return what may be removed from a folder; nothing while a process writes there.

    Args:
        store: The folder.
        records: Names of files that are kept there and only say something of its embeddings.
    """
    if writers_of(store):
        return []
    return _found(store, records)


def remove_leftovers(store: Path, records: Collection[str] = ()) -> list[Leftover]:
    """Remove what a killed process left.

    Args:
        store: The folder.
        records: See `find_leftovers`.

    Returns:
        What was removed.

    Raises:
        StorageError: A process writes to the store at this moment, or this user may not.
    """
    if not _found(store, records):
        return []  # no lock file is made where there is nothing to do
    with write_lock(store, wait=False):
        found = _found(store, records)
        if is_abandoned(store, records):
            remove_store(store)
            return found
        for leftover in found:
            # A file that can't be removed now is found again the next time.
            with contextlib.suppress(OSError):
                remove_entry(leftover.path)
    return [leftover for leftover in found if not leftover.path.exists()]


@contextlib.contextmanager
def removing(store: Path, *, wait: bool = True) -> Iterator[None]:
    """Remove a store, sound or damaged, at the end of the block; an exception in it keeps it.

    Args:
        store: The store's folder.
        wait: Wait for its writers.

    Raises:
        ReadOnlyCacheError: No permission to remove it.
        StorageError: A process writes to it, and `wait` is False.
    """
    lock = store / WRITER_LOCK_NAME
    try:
        check_file(lock)
    except NotRegularFileError:
        try:
            remove_entry(lock)  # a link, pipe or folder, which no process can hold
        except OSError as error:
            raise ReadOnlyCacheError(f"{lock} can't be removed ({error.strerror})") from None
    with write_lock(store, wait=wait):
        yield
        add_reads(store)  # to what goes, not to a store that is made here again
        remove_store(store)


def is_abandoned(folder: Path, records: Collection[str] = ()) -> bool:
    """Return whether the folder was to become a store and holds nothing: its maker was killed.

    Args:
        folder: The folder.
        records: See `find_leftovers`.
    """
    if not _STORE_NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    try:
        names = {child.name for child in folder.iterdir()}
        # A store that has only lost `CURRENT` can be had back.
        generations = unnamed_generations(folder)
    except OSError:
        return False
    if CURRENT_NAME in names or not names or any(generations.values()):
        return False
    others = names - _OWN_NAMES - set(records) - generations.keys()
    return all(map(is_temporary, others))


def _found(store: Path, records: Collection[str]) -> list[Leftover]:
    if is_abandoned(store, records):
        return [Leftover(store, _size(store), "a store that was never finished")]
    try:
        live = current_generation(store)
        children = list(store.iterdir())
    except (CacheError, OSError):
        return []  # damaged: `repair` may need what is there
    # Without its live generation the store is damaged, and the others may be all that there is.
    if live is None or not (live / "data.mdb").is_file():
        return []
    found = []
    for child in children:
        if GENERATION_NAME.fullmatch(child.name) and child != live:
            found.append(Leftover(child, _size(child), "an old or unfinished generation"))
        elif is_old_temporary(child):
            found.append(Leftover(child, _size(child), "a temporary file"))
    with contextlib.suppress(OSError):
        newest = _newest_transaction(live)
        for child in live.iterdir():
            number = table_number(child.name)
            if number is not None and newest is not None and number < newest:
                found.append(Leftover(child, _size(child), "an index of an older commit"))
            elif is_old_temporary(child):
                found.append(Leftover(child, _size(child), "a temporary file"))
    return found


def _newest_transaction(generation: Path) -> int | None:
    with PageFile(generation / "data.mdb") as file:
        return file.meta.transaction if file.meta else None


def _size(path: Path) -> int:
    total = 0
    paths = [path] if path.is_symlink() or not path.is_dir() else [path, *path.rglob("*")]
    for one in paths:
        with contextlib.suppress(OSError):
            total += one.lstat().st_blocks * 512
    return total

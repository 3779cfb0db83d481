"""What a killed process leaves in a store's folder: found, and removed under the writer lock."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lmdbcache.errors import CacheError
from lmdbcache.files import is_old_temporary, is_temporary, remove_entry
from lmdbcache.storage.generations import (
    current_generation,
    is_being_written,
    remove_store,
    write_lock,
)
from lmdbcache.storage.last_use import LAST_USE_NAME
from lmdbcache.storage.layout import (
    CHECKSUMS_NAME,
    CURRENT_NAME,
    GENERATION_NAME,
    METADATA_KEY,
    STATISTICS_NAME,
    WRITER_LOCK_NAME,
)
from lmdbcache.storage.pages.page_file import PageFile

__all__ = ["Leftover", "find_leftovers", "is_abandoned", "remove_leftovers"]

# What only lmdbcache makes: a folder with anything else in it is nobody's leftover.
_STORE_NAME: Final = re.compile(r".*-[0-9a-f]{16}")
# The records of sources and the figures say something of embeddings, which are gone.
_NAMES_OF_NO_STORE: Final = frozenset(
    (
        *(WRITER_LOCK_NAME, LAST_USE_NAME, STATISTICS_NAME),
        *("sources.sqlite3", "sources.sqlite3-journal"),
    )
)
_OFFSETS: Final = re.compile(r"offsets-([0-9]+)")


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing leads to.

    Args:
        path: Where it is.
        size_bytes: Allocated on disk.
        what: What it was, for people.
    """

    path: Path
    size_bytes: int
    what: str


def find_leftovers(store: Path) -> list[Leftover]:
    """What may be removed from a folder; nothing while somebody writes there."""
    if is_being_written(store):
        return []
    return _found(store)


def remove_leftovers(store: Path) -> list[Leftover]:
    """Remove what a killed process left.

    Returns:
        What was removed.

    Raises:
        StorageError: Somebody writes to the store at this moment, or this user may not.
    """
    if not _found(store):
        return []  # no lock file is made where there is nothing to do
    with write_lock(store, wait=False):
        if is_abandoned(store):
            found = _found(store)
            remove_store(store)
            return found
        found = _found(store)
        for leftover in found:
            _remove(leftover.path)
    return [leftover for leftover in found if not leftover.path.exists()]


def is_abandoned(folder: Path) -> bool:
    """Whether the folder was to become a store and holds nothing: its maker was killed."""
    if not _STORE_NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    try:
        children = list(folder.iterdir())
    except OSError:
        return False
    names = {child.name for child in children}
    if CURRENT_NAME in names or not names:
        return False
    generations = [child for child in children if GENERATION_NAME.fullmatch(child.name)]
    own = names - {child.name for child in generations}
    if any(n not in _NAMES_OF_NO_STORE and not is_temporary(n) for n in own):
        return False
    # A store that has only lost `CURRENT` can be had back.
    return not any(_holds_embeddings(generation) for generation in generations)


def _found(store: Path) -> list[Leftover]:
    if is_abandoned(store):
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
    return found + _found_inside(live)


def _found_inside(live: Path) -> list[Leftover]:
    newest = _newest_transaction(live)
    found = []
    with contextlib.suppress(OSError):
        for child in live.iterdir():
            table = _OFFSETS.fullmatch(child.name)
            if table and newest is not None and int(table[1]) < newest:
                found.append(Leftover(child, _size(child), "an index of an older commit"))
            elif is_old_temporary(child):
                found.append(Leftover(child, _size(child), "a temporary file"))
    return found


def _newest_transaction(generation: Path) -> int | None:
    try:
        with PageFile(generation / "data.mdb") as file:
            return file.meta.transaction if file.meta else None
    except OSError:
        return None


def _holds_embeddings(generation: Path) -> bool:
    """Whether anything but the reserved entries is, or may be, in there."""
    try:
        with PageFile(generation / "data.mdb") as file:
            if file.size <= 2 * file.page_size:
                return False  # nothing beyond the meta pages
            if file.meta is None:
                return True
            reserved = (METADATA_KEY, CHECKSUMS_NAME)
            holds = any(entry.key not in reserved for entry in file.walk(file.meta.main))
            return holds or bool(file.problems)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # nobody knows


def _size(path: Path) -> int:
    total = 0
    paths = [path] if path.is_symlink() or not path.is_dir() else [path, *path.rglob("*")]
    for one in paths:
        with contextlib.suppress(OSError):
            total += one.lstat().st_blocks * 512
    return total


def _remove(path: Path) -> None:
    # A file that can't be removed now is found again the next time.
    with contextlib.suppress(OSError):
        remove_entry(path)

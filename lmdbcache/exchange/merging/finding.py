"""Which stores a merge is asked for: stores, roots, and folders that hold roots."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lmdbcache.cache import is_store
from lmdbcache.errors import CacheError
from lmdbcache.exchange.merging.report import Refusal
from lmdbcache.files import expand_user
from lmdbcache.storage import (
    GENERATION_NAME,
    NUM_RESERVED_KEYS,
    RUNNING_SUFFIX,
    PageFile,
    generation_to_repair,
)

__all__ = ["FoundStores", "file_number", "find_stores"]

_DEPTH: Final = 6  # of folders below a source
# Left by ranks of a staged extraction, whether they had something to store or not.
_RANKS: Final = [f"{below}*{RUNNING_SUFFIX}" for below in ("world-*/rank-*/", "rank-*/", "")]


@dataclass
class FoundStores:
    """The stores under some sources.

    Args:
        stores: Their folders, each once, in the order given.
        refused: Sources that hold none, and folders that lost theirs.
        notes: What was passed over.
    """

    stores: list[Path] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_stores(sources: Iterable[str | os.PathLike[str]]) -> FoundStores:
    """Find the stores under these folders; nothing in them is opened.

    The same store twice, by another path, a link or hard links, is taken once.
    """
    found = FoundStores()
    seen: dict[tuple[int, int], Path] = {}
    for source in sources:
        folder = expand_user(source).absolute()
        before = len(found.stores) + len(found.refused) + len(found.notes)
        for store in _stores_under(folder, _DEPTH, found):
            number = file_number(store)
            if number is not None and number in seen:
                found.notes.append(f"{store} is {seen[number]}: taken once")
                continue
            if number is not None:
                seen[number] = store
            found.stores.append(store)
        if len(found.stores) + len(found.refused) + len(found.notes) == before:
            if any(path for ranks in _RANKS for path in folder.glob(ranks)):
                found.notes.append(f"{folder}: the ranks had nothing to store")
                continue
            found.refused.append(Refusal(os.fspath(folder), None, _nothing_in(folder)))
    return found


def file_number(store: Path) -> tuple[int, int] | None:
    """What tells a store's data from any other's, by whichever path; None if there is none."""
    try:
        status = (generation_to_repair(store) / "data.mdb").stat()
    except (CacheError, OSError):
        return None
    return status.st_dev, status.st_ino


def _nothing_in(folder: Path) -> str:
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "a file; a source is the folder of a store, a root, or a folder of roots"
    return "no store is in here"


def _stores_under(folder: Path, depth: int, found: FoundStores) -> list[Path]:
    try:
        if is_store(folder):
            return [folder]
        children = sorted(child for child in folder.iterdir() if child.is_dir())
    except (NotADirectoryError, FileNotFoundError):
        return []
    except OSError as error:
        found.refused.append(
            Refusal(os.fspath(folder), None, f"can't be listed ({error.strerror})")
        )
        return []
    generations = [child for child in children if GENERATION_NAME.fullmatch(child.name)]
    if generations:
        _note_unnamed(folder, generations, found)
    if generations or not depth:
        return []
    # Links to folders may lead round in a circle.
    below = [child for child in children if not child.is_symlink() or is_store(child)]
    return [store for child in below for store in _stores_under(child, depth - 1, found)]


def _note_unnamed(folder: Path, generations: list[Path], found: FoundStores) -> None:
    """A folder with generations and no `CURRENT`: by the format, nothing is stored there."""
    if any(_holds_something(generation) for generation in generations):
        names = ", ".join(generation.name for generation in generations)
        found.refused.append(
            Refusal(
                os.fspath(folder),
                None,
                f"CURRENT is missing, and {names} holds embeddings: nothing of it is merged. If "
                "they weren't removed on purpose, write the generation's name into CURRENT and "
                "merge again",
            )
        )
    else:
        found.notes.append(f"{folder} is a store that was never written to: passed over")


def _holds_something(generation: Path) -> bool:
    """Whether there may be embeddings in it: a store that is only just made has none."""
    try:
        with PageFile(generation / "data.mdb") as file:
            if file.meta is None:
                return file.size > 0
            return file.meta.main.num_entries > NUM_RESERVED_KEYS
    except OSError:
        return False

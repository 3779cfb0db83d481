"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from lmdbcache.cache import ROOT_VARIABLE, EmbeddingCache
from lmdbcache.errors import CacheNotFoundError
from lmdbcache.store_info import StoreInfo, info_or_damage

__all__ = ["Json", "Progress", "Root", "Store", "Yes", "find_folder", "find_store"]

# typer reads these at run time, on Python 3.10, too.
Root = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--root",
        envvar=ROOT_VARIABLE,
        help="Cache directory; default: the user's cache directory.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]
Store = Annotated[
    str, typer.Argument(help="Fingerprint (its first digits do), or a store's folder name.")
]
Progress = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--progress/--no-progress",
        help="A bar on standard error; default: if that is a terminal.",
        show_default=False,
    ),
]


def find_store(cache: EmbeddingCache, text: str) -> StoreInfo:
    """What the store holds that `find_folder` finds."""
    return info_or_damage(find_folder(cache, text))


def find_folder(cache: EmbeddingCache, text: str) -> Path:
    """The one store that a fingerprint, its beginning, or a folder's name or path stands for.

    Nothing is opened: the store, or one beside it, may be damaged.

    Raises:
        CacheNotFoundError: None, or more than one.
    """
    stores = cache.folders()
    found = [store for store in stores if _means(text, store)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(store.name for store in found or stores)
    if found:
        raise CacheNotFoundError(
            f"{text!r} stands for {len(found)} stores under {cache.root}: {names}. Give more digits"
        )
    there = f"there: {names}" if stores else "there is none; is --root right?"
    raise CacheNotFoundError(f"{text!r} isn't a store under {cache.root}; {there}")


def _means(text: str, store: Path) -> bool:
    if os.sep in text:
        # A path is that folder alone: a store of another root may have the same name.
        return Path(text).expanduser().resolve() == store.resolve()
    digits = store.name.rpartition("-")[2]
    return text == store.name or (text != "" and digits.startswith(text.lower()))

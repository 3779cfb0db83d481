"""Options that several commands share."""

from __future__ import annotations

import contextlib
import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import click

from lmdbcache.cache import (
    ROOT_VARIABLE,
    EmbeddingCache,
    StoreInfo,
    info_or_damage,
)
from lmdbcache.cli.command import Argument, Option
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError, CacheNotFoundError, ConfigError, DatasetError
from lmdbcache.files import expand_user, few
from lmdbcache.storage import EmbeddingReader, canonical_sample_id

_HELP_WIDTH = 60
_NUM_NAMED = 3  # stores in an error; `ls` has all


def complete_store(context: click.Context, incomplete: str) -> list[tuple[str, str]]:
    """What a shell offers for a store: fingerprints and folder names. Nothing is opened."""
    root = context.params.get("root")
    roots = (root or (None,)) if isinstance(root, tuple) else (root,)
    folders = []
    for root in roots:
        with contextlib.suppress(CacheError):
            folders += EmbeddingCache(root).folders()
    parts = [folder.name.rpartition("-") for folder in folders]
    typed = incomplete.lower()
    # Shells show the second part beside the first; a line that is folded confuses zsh.
    found = [(digits, slug[:_HELP_WIDTH]) for slug, _, digits in parts if digits.startswith(typed)]
    named = [(folder.name, "") for folder in folders if folder.name.startswith(incomplete)]
    return found or named


class OnDuplicateChoice(str, Enum):
    """What happens to a sample that is stored with another value."""

    ERROR = "error"
    SKIP = "skip"
    OVERWRITE = "overwrite"


Classes = Annotated[
    list[str] | None,
    Option("--class", help="Only this class; may be given several times.", show_default=False),
]
IdsFile = Annotated[
    Path | None,
    Option(
        "--ids",
        help="Only the samples that this file lists, one in a line.",
        show_default=False,
    ),
]
Root = Annotated[
    Path | None,
    Option(
        "--root",
        envvar=ROOT_VARIABLE,
        help="Cache directory; default: the user's cache directory.",
        show_default=False,
    ),
]
Json = Annotated[bool, Option("--json", help="Print JSON.")]
Yes = Annotated[bool, Option("--yes", "-y", help="Don't ask.")]
DryRun = Annotated[bool, Option("--dry-run", help="Only show what would be removed.")]
Stores = Annotated[
    list[str] | None,
    Argument(
        help="Fingerprints (their first digits do) or folder names.",
        complete=complete_store,
    ),
]
All = Annotated[bool, Option("--all", help="All stores under the root.")]
Store = Annotated[
    str,
    Argument(
        help="Fingerprint (its first digits do), or a store's folder name.",
        complete=complete_store,
    ),
]
BatchSize = Annotated[int, Option(help="Clips per forward pass.")]
NumWorkers = Annotated[
    int | None,
    Option(help="Decoding processes; default: half of the cores, at most 8."),
]
Device = Annotated[
    str | None,
    Option(help="cpu, cuda, cuda:1, …; default: a CUDA GPU if there is one."),
]
Decoder = Annotated[
    str | None,
    Option(
        help="What decodes the audio files: soundfile, or ffmpeg (m4a, mp4, webm, …), whose "
        "embeddings are in a separate store; default: that of --front-end, or soundfile.",
        show_default=False,
    ),
]
Tolerance = Annotated[
    float, Option(min=0.0, help="Largest difference of two elements that counts as none.")
]
Progress = Annotated[
    bool | None,
    Option(
        "--progress/--no-progress",
        help="A bar on standard error; default: if that is a terminal.",
        show_default=False,
    ),
]


def ids_in(path: Path | None) -> list[str] | None:
    """Return the sample ids in a file, one a line; None without a file.

    Raises:
        DatasetError: There is no such file, it can't be read, or it isn't text.
        InvalidSampleIdError: A line isn't a sample id.
    """
    if path is None:
        return None
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise DatasetError(
            f"--ids {path}: {error.strerror or error}; give a file that lists one sample id a line"
        ) from None
    except UnicodeDecodeError:
        raise DatasetError(f"--ids {path}: not text in UTF-8; write one sample id a line") from None
    return [canonical_sample_id(line.strip()) for line in lines if line.strip()]


def digits_of(store: Path) -> str:
    """Return the fingerprint of a store's folder; nothing is opened."""
    return store.name.rpartition("-")[2]


def title_of(store: Path | StoreInfo) -> str:
    """Name a store in a line: its fingerprint, and the config as it was given.

    Args:
        store: What it holds, or its folder.
    """
    info = info_or_damage(store) if isinstance(store, Path) else store
    return f"{info.config.fingerprint} {info.config.title}" if info.config else info.path.name


def stored_config(store: Path) -> CacheConfig:
    """The config of the store in a folder.

    Raises:
        IntegrityError: It is damaged.
    """
    with EmbeddingReader(store, track_usage=False) as reader:
        return reader.config


def fields_of(config: CacheConfig) -> dict[str, Any]:
    """Return a config's fields as the options name them: on disk, `namespace` is `dataset`."""
    return {"namespace" if k == "dataset" else k: v for k, v in config.to_dict().items()}


def find_store(cache: EmbeddingCache, text: str) -> StoreInfo:
    """What the store holds that `find_folder` finds."""
    return info_or_damage(find_folder(cache, text))


def find_folders(
    cache: EmbeddingCache, stores: list[str] | None, *, everything: bool
) -> list[Path]:
    """The stores that are named, each once, or all.

    Raises:
        CacheNotFoundError: A name matches no store, or more than one.
        ConfigError: Neither names nor --all, or both.
    """
    if everything and not stores:
        return cache.folders()
    if not stores or everything:
        raise ConfigError("name the stores (see `lmdbcache ls`), or give --all")
    return list(dict.fromkeys(find_folder(cache, store) for store in stores))


def check_can_ask(*, as_json: bool, may_ask: bool) -> None:
    """Refuse to ask in the middle of JSON.

    Raises:
        ConfigError: `--json` alone.
    """
    if as_json and may_ask:
        raise ConfigError("--json leaves no room for a question; also give --yes")


def find_folder(cache: EmbeddingCache, text: str) -> Path:
    """Return the one store that a fingerprint, its first digits, a folder's name or a path matches.

    Nothing is opened: the store, or another one, may be damaged.

    Raises:
        CacheNotFoundError: None, or more than one.
    """
    stores = cache.folders()
    found = [store for store in stores if _means(text, store)]
    if len(found) == 1:
        return found[0]
    names = few([store.name for store in found or stores], _NUM_NAMED)
    if found:
        raise CacheNotFoundError(
            f"{text!r} matches {len(found)} stores under {cache.root}: {names}. Give more digits"
        )
    there = f"there: {names}" if stores else "there is none; is --root right?"
    raise CacheNotFoundError(f"{text!r} isn't a store under {cache.root}; {there}")


def _means(text: str, store: Path) -> bool:
    if os.sep in text:
        # A path is that folder alone: a store of another root may have the same name.
        return expand_user(text).resolve() == store.resolve()
    digits = digits_of(store)
    return text == store.name or (text != "" and digits.startswith(text.lower()))

"""Files that appear under their name when they are whole."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lmdbcache.errors import TransferError
from lmdbcache.files import few, sync_file
from lmdbcache.storage import translated_errors

__all__ = ["SUFFIXES", "appearing", "check_target", "is_of_export", "shard_name"]

# Of the formats that may be a folder of shards.
SUFFIXES: Final = {"safetensors": ".safetensors", "parquet": ".parquet", "webdataset": ".tar"}
# What Lance makes in its folder.
_LANCE: Final = {"data", "_versions", "_transactions", "_indices", "_deletions"}


def shard_name(number: int, format: str) -> str:  # noqa: A002 - as in `export_embeddings`
    """The name of a file in a folder of shards; numbers from 1."""
    return f"embeddings-{number:05d}{SUFFIXES[format]}"


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse to write where something is that isn't to be replaced.

    Raises:
        TransferError: The name is taken, or its folder is missing.
    """
    if not out.parent.is_dir():
        raise TransferError(f"{out.parent} isn't a folder; make it, or choose another place")
    if not os.path.lexists(out):
        return
    if out.is_dir() and not out.is_symlink():
        is_lance = (out / "_versions").is_dir()
        strange = [
            file.name for file in out.iterdir() if not is_of_export(file.name, is_lance=is_lance)
        ]
        if strange:
            raise TransferError(
                f"{out} is a folder with other files ({few(sorted(strange), 3)}); choose "
                "another place"
            )
        if not any(out.iterdir()):
            return
    if not overwrite:
        raise TransferError(f"{out} exists; give --yes (overwrite=True) to replace it")


def is_of_export(name: str, *, is_lance: bool) -> bool:
    """Whether a file or folder in an export's folder is one that an export makes."""
    if is_lance:
        return name in _LANCE
    return name.startswith("embeddings-") and Path(name).suffix in SUFFIXES.values()


@contextmanager
def appearing(out: Path, *, is_folder: bool) -> Iterator[Path]:
    """A path to write to, which becomes `out` when all went well and else vanishes."""
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with translated_errors(out.parent):
            if is_folder:
                temporary.mkdir()
            yield temporary
            for file in [*temporary.rglob("*"), temporary] if is_folder else [temporary]:
                sync_file(file)
            _replace(temporary, out)
            sync_file(out.parent)
    finally:
        _remove(temporary)


def _replace(new: Path, out: Path) -> None:
    if not (new.is_dir() or (out.is_dir() and not out.is_symlink())):
        new.replace(out)
        return
    # A folder can't be replaced in one step: the old one goes aside first.
    aside = new.with_suffix(".old")
    if os.path.lexists(out):
        out.rename(aside)
    try:
        new.rename(out)
    except OSError:
        aside.rename(out)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

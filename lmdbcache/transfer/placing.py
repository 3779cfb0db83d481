"""Files that appear under their name when they are whole."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmdbcache.errors import TransferError
from lmdbcache.storage.files.engine_errors import translated_errors
from lmdbcache.storage.files.generations import sync_file

__all__ = ["SHARD_FORMATS", "appearing", "check_target", "shard_name"]

SHARD_FORMATS = ("safetensors", "parquet")


def shard_name(number: int, suffix: str) -> str:
    """The name of a file in a folder of shards; numbers from 1."""
    return f"embeddings-{number:05d}.{suffix}"


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
        strange = [file.name for file in out.iterdir() if not _is_ours(file)]
        if strange:
            raise TransferError(
                f"{out} is a folder with other files ({', '.join(sorted(strange)[:3])}); choose "
                "another place"
            )
        if not any(out.iterdir()):
            return
    if not overwrite:
        raise TransferError(f"{out} exists; give --yes (overwrite=True) to replace it")


def _is_ours(file: Path) -> bool:
    return file.name.startswith("embeddings-") and file.suffix.lstrip(".") in SHARD_FORMATS


@contextmanager
def appearing(out: Path, *, is_folder: bool) -> Iterator[Path]:
    """A path to write to, which becomes `out` when all went well and else vanishes."""
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with translated_errors(out.parent):
            if is_folder:
                temporary.mkdir()
            yield temporary
            for file in [*temporary.iterdir(), temporary] if is_folder else [temporary]:
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

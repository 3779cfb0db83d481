"""Where an export goes: a file, a folder, or a folder at a URL."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lmdbcache.errors import TransferError
from lmdbcache.exchange.formats import FORMATS
from lmdbcache.exchange.formats.lance import FOLDERS, VERSIONS
from lmdbcache.exchange.sharing.remote import Remote
from lmdbcache.files import remove_entry, sync_file, without_secrets
from lmdbcache.storage import translated_errors

_SHARD: str = "embeddings-"


def shard_name(number: int, format_name: str) -> str:
    """Return the name of a file in a folder of shards; numbers from 1."""
    return f"{_SHARD}{number:05d}{FORMATS[format_name].suffixes[0]}"


class Output:
    """Where the files of an export are written.

    Args:
        path: The file, or the folder of shards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0

    def finished(self, file: Path) -> None:
        """Take a file that is whole."""
        self.num_bytes += file.stat().st_size

    def finish(self) -> None:
        """Take all files that are left."""
        for file in self.path.rglob("*") if self.path.is_dir() else ():
            if file.is_file():
                self.num_bytes += file.stat().st_size


@contextmanager
def local_output(out: Path, *, is_folder: bool, overwrite: bool) -> Iterator[Output]:
    """Write to a path that becomes `out` when all went well, and else vanishes.

    Raises:
        TransferError: `out` is taken, or its folder is missing.
        CacheFullError: The disk is full.
    """
    _check_free(out, overwrite=overwrite)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with translated_errors(out.parent):
            if is_folder:
                temporary.mkdir()
            output = Output(temporary)
            yield output
            for file in [*temporary.rglob("*"), temporary] if is_folder else [temporary]:
                sync_file(file)
            _replace(temporary, out)
            sync_file(out.parent)
    finally:
        remove_entry(temporary)


def _check_free(out: Path, *, overwrite: bool) -> None:
    if not out.parent.is_dir():
        raise TransferError(f"{out.parent} isn't a folder; make it, or choose another place")
    if not os.path.lexists(out):
        return
    is_empty = False
    if out.is_dir() and not out.is_symlink():
        names = [file.name for file in out.iterdir()]
        _check_entries(str(out), names)
        is_empty = not names
    if not (overwrite or is_empty):
        raise TransferError(f"{out} exists; replace it with `overwrite=True`, or choose another")


def _check_entries(place: str, names: Iterable[str]) -> None:
    """Refuse a folder with anything in it that isn't of an export."""
    names = set(names)
    strange = names - FOLDERS
    if VERSIONS not in names:
        suffixes = {format_.suffixes[0] for format_ in FORMATS.values() if format_.is_sharded}
        strange = {n for n in names if not (n.startswith(_SHARD) and Path(n).suffix in suffixes)}
    if strange:
        raise TransferError(
            f"{place} is a folder with other files ({', '.join(sorted(strange)[:3])}); choose "
            "another place"
        )


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
    remove_entry(aside)


# ---- at a URL


class _Upload(Output):
    """Takes files from a folder of this machine, which are uploaded one after the other."""

    def __init__(self, url: str, folder: Path, *, overwrite: bool) -> None:
        super().__init__(folder)
        self._remote = Remote(url)
        place = without_secrets(url)
        self._left = _files(self._remote)
        _check_entries(place, [name.partition("/")[0] for name in self._left])
        if self._left and not overwrite:
            raise TransferError(
                f"{place} exists; replace it with `overwrite=True`, or choose another place"
            )

    def finished(self, file: Path) -> None:
        """Upload a file that is whole, and remove it here."""
        name, data = file.relative_to(self.path).as_posix(), file.read_bytes()
        self._remote.write(name, data)
        self._left.discard(name)
        self.num_bytes += len(data)
        file.unlink()

    def finish(self) -> None:
        """Upload what is left, and remove what an earlier export had there and this one hasn't."""
        # Of Lance, the versions say which of the others count: they come last.
        for file in sorted(self.path.rglob("*"), key=lambda path: VERSIONS in path.parts):
            if file.is_file():
                self.finished(file)
        for name in self._left:
            self._remote.remove(name)


@contextmanager
def url_output(url: str, *, overwrite: bool) -> Iterator[Output]:
    """Write to a folder whose files are uploaded; at the end it vanishes.

    Raises:
        TransferError: Something is at the URL that isn't to be replaced.
        RemoteError: The place can't be reached or refuses.
        CacheFullError: The disk here is full.
    """
    with tempfile.TemporaryDirectory(prefix="lmdbcache-export-") as folder:
        output = _Upload(url, Path(folder), overwrite=overwrite)
        with translated_errors(Path(folder)):
            yield output


def _files(remote: Remote, folder: str = "") -> set[str]:
    inside = f"{folder}/" if folder else ""
    found = {f"{inside}{name}" for name in remote.list_files(folder)}
    for name in remote.list_folders(folder):
        found |= _files(remote, f"{inside}{name}")
    return found

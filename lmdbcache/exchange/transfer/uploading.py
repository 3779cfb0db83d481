"""An export that goes to a folder or bucket of fsspec, file by file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmdbcache.errors import TransferError
from lmdbcache.exchange.sharing.remote import Remote
from lmdbcache.exchange.transfer.placing import is_of_export
from lmdbcache.files import few
from lmdbcache.storage import translated_errors

__all__ = ["Upload", "uploading"]


class Upload:
    """Takes the files of an export, one after the other, from a folder here.

    Args:
        url: Where they go.
        folder: Where they are made.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder
        self.num_bytes = 0
        self._remote = Remote(url)
        self._written: set[str] = set()
        self._before: list[str] = []

    def check(self, *, overwrite: bool) -> None:
        """Refuse to write where something is that isn't to be replaced.

        Raises:
            TransferError: There is.
        """
        folders = self._remote.list_folders()
        there = sorted([*self._remote.list_files(""), *folders])
        is_lance = "_versions" in folders
        if strange := [name for name in there if not is_of_export(name, is_lance=is_lance)]:
            raise TransferError(
                f"{self._remote.place} has other files ({few(strange, 3)}); choose another place"
            )
        if there and not overwrite:
            raise TransferError(
                f"{self._remote.place} exists; give --yes (overwrite=True) to replace it"
            )
        self._before = _files(self._remote)

    def put(self, path: Path) -> None:
        """Upload a file that is whole, and remove it here."""
        name = path.relative_to(self.folder).as_posix()
        data = path.read_bytes()
        self._remote.write(name, data)
        self._written.add(name)
        self.num_bytes += len(data)
        path.unlink()

    def finish(self) -> None:
        """Upload what is left, and remove what an earlier export had there and this one hasn't."""
        # Of Lance, `_versions` says which of the others count: it comes last in this order.
        for path in sorted(self.folder.rglob("*"), key=_turn):
            if path.is_file():
                self.put(path)
        for name in self._before:
            if name not in self._written:
                self._remote.remove(name)


@contextmanager
def uploading(url: str, *, overwrite: bool) -> Iterator[Upload]:
    """A folder for the files of an export, which are uploaded; at the end it vanishes.

    Raises:
        TransferError: Something is there that isn't to be replaced.
        RemoteError: The place can't be reached or refuses.
        CacheFullError: The disk here is full.
    """
    with tempfile.TemporaryDirectory(prefix="lmdbcache-export-") as folder:
        upload = Upload(url, Path(folder))
        upload.check(overwrite=overwrite)
        with translated_errors(Path(folder)):
            yield upload
            upload.finish()


def _turn(path: Path) -> tuple[bool, str]:
    return "_versions" in path.parts, str(path)


def _files(remote: Remote, folder: str = "") -> list[str]:
    inside = f"{folder}/" if folder else ""
    found = [f"{inside}{name}" for name in remote.list_files(folder)]
    for name in remote.list_folders(folder):
        found += _files(remote, f"{inside}{name}")
    return found

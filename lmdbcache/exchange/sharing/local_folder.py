"""What sharing keeps in a store's folder: shards on their way in, copies of what never changes.

The folder may be removed at any time: then a push and a pull read and fetch more, and the store
pushes under another id.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from lmdbcache.errors import IntegrityError, ReadOnlyCacheError, StorageError
from lmdbcache.exchange.sharing.remote import Remote
from lmdbcache.exchange.sharing.shards import ShardEntry, ShardHeader
from lmdbcache.files import check_folder, flocked, open_file, read_file, replace_file
from lmdbcache.storage import EXTRAS_NAME, translated_errors

FOLDER_NAME: Final = "sharing"
_LOCK_NAME: Final = "lock"
_WRITER_NAME: Final = "writer"
_PART_SUFFIX: Final = ".part"
_COPY_SUFFIX: Final = ".copy"
_WRITER: Final = re.compile(rb"[0-9a-f]{16}")


class LocalFolder:
    """The folder of one store.

    `store` may be set once it is known.

    Args:
        store: The store's folder; nothing is kept while it is missing.
        read_only: Keep nothing on disk.
    """

    def __init__(self, store: Path | None, *, read_only: bool = False) -> None:
        self.store = store
        self._read_only = read_only
        self._unwritten: dict[str, bytes] = {}

    def copy(self, name: str, sha256: str) -> bytes | None:
        """Return the bytes of a file that was read before, if they have this digest."""
        data = self._unwritten.get(name) or self._read(f"{name}{_COPY_SUFFIX}")
        return data if data is not None and hashlib.sha256(data).hexdigest() == sha256 else None

    def keep(self, name: str, data: bytes) -> None:
        """Keep a copy of a file, if that is possible."""
        if self.store is None or self._read_only or not self.store.is_dir():
            self._unwritten[name] = data
        else:
            self._write(f"{name}{_COPY_SUFFIX}", data)

    def tidy(self, names: Collection[str]) -> None:
        """Remove copies of other files, and what was fetched of shards and not asked for again."""
        wanted = {f"{name}{_COPY_SUFFIX}" for name in names}
        with contextlib.suppress(OSError):
            for path in self._path("").iterdir():
                if path.name.endswith((_COPY_SUFFIX, _PART_SUFFIX)) and path.name not in wanted:
                    path.unlink(missing_ok=True)

    def writer(self) -> str:
        """Return the random id under which this store pushes; it is kept if that is possible."""
        writer = self._read(_WRITER_NAME) or b""
        if not _WRITER.fullmatch(writer):
            writer = secrets.token_hex(8).encode()
            if not self._read_only:
                self._write(_WRITER_NAME, writer)
        return writer.decode()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder to pull into the store; other pulls wait.

        Raises:
            ReadOnlyCacheError: The folder can't be made.
        """
        folder = self._path("")
        with contextlib.ExitStack() as stack:
            try:
                check_folder(folder.parent)
                check_folder(folder)
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(flocked(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT))
            except StorageError:
                raise
            except OSError as error:
                raise ReadOnlyCacheError(f"{folder} can't be used ({error.strerror})") from None
            for name, data in self._unwritten.items():
                self._write(f"{name}{_COPY_SUFFIX}", data)
            self._unwritten.clear()
            yield

    def bytes_there(self, entry: ShardEntry) -> int:
        """Return how much of a shard is here: its header at least, which is kept by itself."""
        size = 0
        with contextlib.suppress(OSError):
            size = self._part(entry).lstat().st_size
        return min(max(size, entry.header_bytes), entry.num_bytes)

    def fetch(
        self,
        remote: Remote,
        entry: ShardEntry,
        header: ShardHeader,
        progress: Callable[[int], None],
    ) -> memoryview:
        """Return the bytes of a shard, mapped from a file; their digest is the listed one.

        Args:
            remote: The place.
            entry: The shard.
            header: Its beginning, which isn't fetched again.
            progress: Called with the bytes of each piece.

        Raises:
            IntegrityError: What is there isn't what was pushed.
            RemoteError: It can't be read.
            CacheFullError: The disk is full.
        """
        part = self._part(entry)
        path = f"{header.config.fingerprint}/{entry.path}"
        with translated_errors(part):
            for _ in range(2):  # it may be damaged on the way, or by a power cut here
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
                with os.fdopen(open_file(part, flags), "a+b") as file:
                    if file.seek(0, os.SEEK_END) < entry.header_bytes:
                        file.truncate(0)
                        file.write(header.encoded)
                    for piece in remote.pieces(path, file.tell(), entry.num_bytes):
                        file.write(piece)
                        progress(len(piece))
                    file.flush()
                    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                if hashlib.sha256(data).hexdigest() == entry.sha256:
                    return data
                part.unlink()
        raise IntegrityError(f"{entry.path} is damaged: its bytes don't have its digest")

    def discard(self, entry: ShardEntry) -> None:
        """Remove the file of a shard."""
        self._part(entry).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        if self.store is None:
            raise FileNotFoundError
        return self.store / EXTRAS_NAME / FOLDER_NAME / name

    def _part(self, entry: ShardEntry) -> Path:
        return self._path(f"{entry.sha256}{_PART_SUFFIX}")

    def _read(self, name: str) -> bytes | None:
        try:
            return read_file(self._path(name))
        except OSError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        with contextlib.suppress(OSError):
            folder = self._path("")
            for each in (folder.parent, folder):
                check_folder(each)
                each.mkdir(exist_ok=True)
            replace_file(folder / name, data)

"""Shards on their way into a store: fetched into files that a later pull goes on with."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from lmdbcache.errors import CacheFullError, IntegrityError, NotRegularFileError, ReadOnlyCacheError
from lmdbcache.exchange.sharing.remote import Remote
from lmdbcache.exchange.sharing.shards import ShardEntry
from lmdbcache.files import check_folder, flocked, open_file, remove_entry
from lmdbcache.storage import COMMIT_COPIES_NAME, CURRENT_NAME, PULLING_NAME

__all__ = ["Downloads"]

_logger: Final = logging.getLogger(__name__)
_LOCK_NAME: Final = "lock"
_PART_NAME: Final = re.compile(r"[0-9a-f]{64}\.part")
_STEP_BYTES: Final = 8 << 20


class Downloads:
    """The folder of one store that shards are fetched into.

    One process at a time pulls into a store; others wait. A file is removed when its shard is
    imported; what a killed pull has left is gone on with.

    Args:
        store: The store's folder.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self.folder: Final = store / PULLING_NAME

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder; waits for another pull.

        Raises:
            ReadOnlyCacheError: The folder can't be made.
        """
        while True:
            with self._locked() as is_the_one:
                # Whoever found nothing to do removes the folder, lock and all.
                if is_the_one:
                    try:
                        yield
                    finally:
                        self._leave_nothing()
                    return

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        path, stack = self.folder / _LOCK_NAME, contextlib.ExitStack()
        try:
            check_folder(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = stack.enter_context(flocked(path, os.O_RDWR | os.O_CREAT))
        except NotRegularFileError:
            raise
        except FileNotFoundError:
            yield False
            return
        except OSError as error:
            raise ReadOnlyCacheError(f"{path} can't be made ({error.strerror})") from None
        with stack:
            try:
                is_the_one = os.path.samestat(os.fstat(descriptor), path.lstat())
            except FileNotFoundError:
                is_the_one = False
            yield is_the_one

    def bytes_there(self, entry: ShardEntry) -> int:
        """How much of a shard an earlier pull has fetched."""
        try:
            return min(self._part(entry).lstat().st_size, entry.num_bytes)
        except OSError:
            return 0

    def fetch(
        self,
        remote: Remote,
        fingerprint: str,
        entry: ShardEntry,
        progress: Callable[[int], None],
    ) -> memoryview:
        """The bytes of a shard, mapped from a file; their digest is what the commit says.

        Args:
            remote: Where the shard is.
            fingerprint: Of the config.
            entry: The shard.
            progress: Called with the bytes of each piece.

        Raises:
            IntegrityError: What is there isn't what was pushed.
            RemoteError: It can't be read.
            CacheFullError: The disk is full; the piece that didn't fit is gone.
        """
        part, path = self._part(entry), f"{fingerprint}/{entry.path}"
        with self._translated(part):
            _append(remote, path, part, entry.num_bytes, progress)
            if _digest(part) != entry.sha256:
                # Damaged on the way, or here by a power cut, and not where it comes from.
                part.unlink()
                progress(-entry.num_bytes)
                _append(remote, path, part, entry.num_bytes, progress)
            if _digest(part) != entry.sha256:
                part.unlink()
                raise IntegrityError(f"{entry.path} is damaged: its bytes don't have its digest")
            with os.fdopen(open_file(part), "rb") as file:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def discard(self, entry: ShardEntry) -> None:
        """Remove the file of a shard."""
        self._part(entry).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what was fetched of shards that nobody asked for again."""
        for part in self._parts():
            part.unlink(missing_ok=True)

    def _leave_nothing(self) -> None:
        """Where nothing was imported or fetched, nothing is left behind."""
        if (self._store / CURRENT_NAME).exists() or self._parts():
            return
        for name in (COMMIT_COPIES_NAME, PULLING_NAME):
            remove_entry(self._store / name)
        with contextlib.suppress(OSError):
            self._store.rmdir()

    def _parts(self) -> list[Path]:
        try:
            return [one for one in self.folder.iterdir() if _PART_NAME.fullmatch(one.name)]
        except OSError:
            return []

    def _part(self, entry: ShardEntry) -> Path:
        return self.folder / f"{entry.sha256}.part"

    @contextlib.contextmanager
    def _translated(self, part: Path) -> Iterator[None]:
        try:
            yield
        except NotRegularFileError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                part.unlink(missing_ok=True)
                raise CacheFullError(
                    f"{self._store}: the disk is full. What was imported is stored; free space "
                    "and pull again to go on"
                ) from None
            raise ReadOnlyCacheError(f"{part} can't be written or read ({error})") from None


def _append(
    remote: Remote, path: str, part: Path, num_bytes: int, progress: Callable[[int], None]
) -> None:
    with os.fdopen(open_file(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
        remote.fetch(path, file, num_bytes, progress)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with os.fdopen(open_file(path), "rb") as file:
        while piece := file.read(_STEP_BYTES):
            digest.update(piece)
    return digest.hexdigest()

"""The lock next to a staging store: whoever uses it, on whichever machine, is alone with it.

A POSIX lock, which NFS passes on, ends with its process and isn't shared with forked workers. The
file stays: it shows that a process once had this store.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lmdbcache.errors import StorageError
from lmdbcache.files import open_file, read_file

_logger: Final = logging.getLogger(__name__)

RUNNING_SUFFIX: Final = ".running"
_POLL_SECONDS: Final = 0.25
_MAX_BYTES: Final = 4096
_NO_LOCKS: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held_store(store: Path, patience: float) -> Iterator[None]:
    """Keep a store to this process; its folder may not exist yet.

    Args:
        store: The store's folder.
        patience: How many seconds to wait for a process that is about to end.

    Raises:
        StorageError: Another process has it, or the lock file isn't a file.
        OSError: The lock file can't be written.
    """
    path = _file_beside(store)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
    try:
        if not _lock(descriptor, fcntl.LOCK_EX, time.monotonic() + patience):
            raise StorageError(_holder(path))
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def at_rest(store: Path, deadline: float) -> Iterator[None]:
    """Wait until the process that writes this store has ended; until then none begins.

    Args:
        store: The store's folder.
        deadline: Until when to wait, by `time.monotonic`.

    Raises:
        StorageError: It goes on.
        OSError: The lock file can't be read.
    """
    path = _file_beside(store)
    try:
        descriptor = open_file(path)
    except FileNotFoundError:
        yield  # copied from elsewhere, or no staging store at all
        return
    try:
        if not _lock(descriptor, fcntl.LOCK_SH, deadline):
            raise StorageError(
                f"it is being written ({_holder(path)}); try again when that has ended"
            )
        yield
    finally:
        os.close(descriptor)


def _file_beside(store: Path) -> Path:
    return store.with_name(store.name + RUNNING_SUFFIX)


def _lock(descriptor: int, kind: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _logger.debug("no locks here: %s", error)
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return read_file(path, _MAX_BYTES).decode("utf-8", "replace").strip() or "unknown"
    return "unknown"

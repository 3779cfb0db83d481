"""Locks (flock) on files that end with the process that took them, whatever it has forked.

A child shares the locks of its parent: one that outlives a killed parent would keep all others
waiting. So the files are closed in a child at once, and unlocked explicitly in the parent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lmdbcache.storage.regular_files import open_file

__all__ = ["opened_for_flock"]

_open: Final[set[int]] = set()
# Held by a fork, and from the opening of a file until it is in the set; never while waiting.
_gate = threading.RLock()


@contextlib.contextmanager
def opened_for_flock(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file to lock it with `fcntl.flock`; its lock ends with the block.

    Args:
        path: The file.
        flags: As for `os.open`.

    Raises:
        NotRegularFileError, OSError: It can't be opened.
    """
    with _gate:
        descriptor = open_file(path, flags)
        _open.add(descriptor)
    try:
        yield descriptor
    finally:
        _open.discard(descriptor)
        # Explicitly: closing alone leaves the lock to a child that was forked meanwhile.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _before_fork() -> None:
    _gate.acquire()


def _after_fork_in_parent() -> None:
    _gate.release()


def _after_fork_in_child() -> None:
    global _gate  # noqa: PLW0603 - module state of one process
    _gate = threading.RLock()
    for descriptor in _open:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)

"""When a store was last read: the time of a marker file in its folder.

A hint for people and for `prune`, never a reason to fail: where it can't be written it stays as it
is. Derived; may be removed.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from lmdbcache.errors import CacheError
from lmdbcache.files import open_file
from lmdbcache.storage.generations import current_generation

LAST_USE_NAME: Final = "last_used"
_SECONDS: Final = 3600.0  # between two touches by one process
_touched: Final[dict[Path, float]] = {}


def touch(store: Path) -> None:
    """Remember that the store is read now; at most once an hour per process and store."""
    now = time.monotonic()
    if now - _touched.get(store, -_SECONDS) < _SECONDS:
        return
    _touched[store] = now
    marker = store / LAST_USE_NAME
    # A read-only folder, a full disk, another user's marker: it stays as old as it is.
    with contextlib.suppress(OSError):
        try:
            if time.time() - _SECONDS < marker.lstat().st_mtime <= time.time():
                return  # another process was here
        except FileNotFoundError:
            os.close(open_file(marker, os.O_WRONLY | os.O_CREAT))
        os.utime(marker, follow_symlinks=False)


def last_used(store: Path) -> datetime | None:
    """When the store was last opened to be read, give or take an hour; None if that isn't known."""
    return _time_of(store / LAST_USE_NAME)


def last_written(store: Path) -> datetime | None:
    """When the store's newest commit was made; a compaction keeps that time."""
    with contextlib.suppress(CacheError):
        if (generation := current_generation(store)) is not None:
            return _time_of(generation / "data.mdb")
    return None


def _time_of(path: Path) -> datetime | None:
    try:
        seconds = path.lstat().st_mtime
        return datetime.fromtimestamp(seconds, timezone.utc)
    except (OSError, ValueError, OverflowError):
        return None

"""Opening one generation's data.mdb: look before LMDB does, then find a map size that fits."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, Final

import lmdb

from lmdbcache.errors import CacheFullError, IntegrityError, ReadOnlyCacheError, StorageError
from lmdbcache.storage.commit_record import contradiction, read_commit_record
from lmdbcache.storage.engine_errors import DAMAGE_REMEDY, LOSS_REMEDY
from lmdbcache.storage.meta_pages import newest, read_meta_pages

__all__ = ["check_file_size", "file_id", "file_problem", "open_environment"]

_logger: Final = logging.getLogger(__name__)

_MAX_READERS: Final = 2048
_LARGE_MAP: Final = 1 << 40  # sparse: costs address space only
_SMALL_MAP: Final = 1 << 26
_LOCK_FILE_BYTES: Final = 1 << 20

_LOOKS: Final = 5
_SECONDS_BETWEEN_LOOKS: Final = 0.002


def check_file_size(generation: Path) -> int:
    """Compare data.mdb with what its meta pages and the record of the newest commit say.

    The cheap guard against SIGBUS, and against a commit that is gone without a word.

    Returns:
        The file's size in bytes.

    Raises:
        IntegrityError: Missing, empty, truncated, not an LMDB 0.9 file, or its newest commit
            can't be read.
    """
    problem, size = file_problem(generation)
    if problem is not None:
        raise IntegrityError(f"{generation / 'data.mdb'} {problem}. {DAMAGE_REMEDY}")
    return size


def file_problem(generation: Path) -> tuple[str | None, int]:
    """What is wrong with data.mdb as a whole, or None; and its size in bytes.

    Raises:
        IntegrityError: It is missing.
    """
    before: object = None
    for _ in range(_LOOKS):
        # First: a commit in between makes the meta pages newer than this, which is fine.
        record = read_commit_record(generation)
        try:
            with (generation / "data.mdb").open("rb", buffering=0) as file:
                metas = read_meta_pages(file.fileno())
                # Last: a commit in between makes the file larger than the pages read here say.
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise IntegrityError(f"{generation / 'data.mdb'} is missing. {LOSS_REMEDY}") from None
        meta = newest(metas)
        if meta is None:
            problem: str | None = f"isn't an LMDB file ({size} bytes)"
        elif size < meta.needed_bytes:
            problem = f"is truncated: {size} bytes of {meta.needed_bytes}"
        else:
            problem = contradiction(record, metas)
        # A commit in the middle of a look can give any answer; the next look tells.
        if problem is None or (record, metas, size) == before:
            break
        before = (record, metas, size)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return problem, size


def file_id(generation: Path) -> tuple[int, int] | None:
    """Which file data.mdb is; a cleared and remade generation of the same name differs."""
    try:
        status = (generation / "data.mdb").stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def open_environment(generation: Path, *, write: bool, create: bool) -> lmdb.Environment:
    """Open a generation's LMDB environment with the largest map that the process may have.

    Raises:
        IntegrityError: The file is missing, truncated or foreign.
        ReadOnlyCacheError: This user may not read it.
        StorageError: No address space is left.
    """
    data = generation / "data.mdb"
    if not create and data.exists() and not os.access(data, os.R_OK):
        raise ReadOnlyCacheError(
            f"{data} isn't readable for this user. Ask its owner for read permission"
        )
    _check_room_for_lock_file(generation)
    # LMDB makes an empty environment of an empty file or folder, which would hide a loss.
    size = 0 if create else check_file_size(generation)
    map_size = max(_LARGE_MAP, 8 * size)
    while True:
        try:
            return _open_with(generation, map_size, write=write)
        except (MemoryError, lmdb.MemoryError):
            # Address space is limited (ulimit -v, or many stores): a smaller map will do.
            map_size //= 2
            if map_size < max(_SMALL_MAP, 2 * size):
                raise StorageError(
                    f"{generation}: no address space for a map of {2 * map_size >> 20} MiB. "
                    "Raise `ulimit -v`, or close readers of other stores"
                ) from None


def _check_room_for_lock_file(generation: Path) -> None:
    # LMDB would map a lock file that the disk can't hold, and die of SIGBUS.
    if (
        not (generation / "lock.mdb").exists()
        and os.access(generation, os.W_OK)
        and shutil.disk_usage(generation).free < _LOCK_FILE_BYTES
    ):
        raise CacheFullError(f"{generation}: no room for LMDB's lock file. Free space on the disk")


def _open_with(generation: Path, map_size: int, *, write: bool) -> lmdb.Environment:
    options: dict[str, Any] = {
        "map_size": map_size - map_size % 65536,
        "max_dbs": 4,
        "max_readers": _MAX_READERS,
        "mode": 0o666,
    }
    path = str(generation)
    if write:
        return lmdb.open(path, **options)
    try:
        environment = lmdb.open(path, readonly=True, create=False, **options)
    except (MemoryError, lmdb.MemoryError):
        raise
    except lmdb.Error as error:
        if os.access(generation, os.W_OK):
            raise
        # No right to take part in the reader table: sound only where nobody writes.
        _logger.info(
            "%s: read without a lock, values follow its writer (%s)", generation, str(error)
        )
        return lmdb.open(path, readonly=True, create=False, lock=False, **options)
    environment.reader_check()
    return environment

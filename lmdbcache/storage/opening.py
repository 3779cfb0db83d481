"""Opening one generation's data.mdb: look before LMDB does, then find a map size that fits."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import random
import resource
import time
from pathlib import Path
from typing import Any, Final

import lmdb
import lmdb._envid  # what lmdb.open imports when it is first called

from lmdbcache.errors import CacheFullError, IntegrityError, ReadOnlyCacheError, StorageError
from lmdbcache.files import (
    check_file,
    check_folder,
    free_bytes,
    occupy_standard_descriptors,
    open_file,
)
from lmdbcache.storage.engine_errors import DAMAGE_REMEDY, LOSS_REMEDY, truncated
from lmdbcache.storage.filesystems import check_local_for_reading, check_local_for_writing
from lmdbcache.storage.pages.commit_record import contradiction, read_commit_record
from lmdbcache.storage.pages.meta_pages import MetaPage, newest, read_meta_pages
from lmdbcache.storage.reader_slots import holders

_logger: Final = logging.getLogger(__name__)

_MAX_READERS: Final = 2048
# Maps are sparse and cost address space only, of which a process has 128 TiB or what `ulimit -v`
# leaves: a share of the rest each, so that hundreds of stores fit and the process has some left.
_WRITER_MAP = 1 << 40
_READER_MAP = 1 << 36
_LEAST_GROWTH = 1 << 20
_ADDRESS_SPACE: Final = 1 << 47
_SHARE_OF_THE_REST: Final = 16
_LOCK_FILE_BYTES: Final = 1 << 20

_LOOKS: Final = 5
_SECONDS_FOR_LOCK_FILE: Final = 2.0
_SECONDS_BETWEEN_LOOKS: Final = 0.002


def check_data_file(generation: Path) -> tuple[int, int]:
    """Compare data.mdb with what its meta pages and the record of the newest commit say.

    The cheap guard against SIGBUS, and against a commit that is gone without a word.

    Returns:
        The file's size in bytes, and the number of its newest commit.

    Raises:
        IntegrityError: Missing, empty, truncated, not an LMDB 0.9 file, or its newest commit
            can't be read.
    """
    problem, size, meta = file_problem(generation)
    if problem is not None or meta is None:
        raise IntegrityError(f"{generation / 'data.mdb'} {problem}. {DAMAGE_REMEDY}")
    return size, meta.transaction


def file_problem(generation: Path) -> tuple[str | None, int, MetaPage | None]:
    """Return what is wrong with data.mdb as a whole, or None; its size; its newest meta page.

    Raises:
        IntegrityError: It is missing.
    """
    before: object = None
    for _ in range(_LOOKS):
        # First: a commit in between makes the meta pages newer than this, which is fine.
        record = read_commit_record(generation)
        try:
            descriptor = open_file(f"{generation}/data.mdb")
        except FileNotFoundError:
            raise IntegrityError(f"{generation / 'data.mdb'} is missing. {LOSS_REMEDY}") from None
        try:
            metas = read_meta_pages(descriptor)
            # Last: a commit in between makes the file larger than the pages read here say.
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
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
    return problem, size, meta


def file_id(generation: Path) -> tuple[int, int] | None:
    """Which file data.mdb is; a cleared and remade generation of the same name differs."""
    status = data_status(generation)
    return None if status is None else (status.st_dev, status.st_ino)


def data_status(generation: Path) -> os.stat_result | None:
    """What the system says of data.mdb; None where there is none."""
    try:
        return os.lstat(f"{generation}/data.mdb")
    except OSError:
        return None


def check_still_whole(
    environment: lmdb.Environment, generation: Path, opened: tuple[int, int] | None, known: int
) -> int:
    """Notice that something has truncated data.mdb under an open environment.

    Args:
        environment: Open.
        generation: Its folder.
        opened: Which file is open, as of `file_id`.
        known: Bytes that the file has had before; LMDB never makes it shorter.

    Returns:
        Bytes that it has now.

    Raises:
        IntegrityError: It is shorter than before, or than its last page.
    """
    for is_first in (True, False):
        # Before the file's size: a commit in between makes the file larger.
        least = known if is_first else _used_bytes(environment)
        status = data_status(generation)
        if status is None or (status.st_dev, status.st_ino) != opened:
            return known  # unlinked: what is mapped stays as it is
        if status.st_size < least:
            raise IntegrityError(truncated(generation / "data.mdb", status.st_size, least))
        known = status.st_size
    return known


def _used_bytes(environment: lmdb.Environment) -> int:
    return int((environment.info()["last_pgno"] + 1) * environment.stat()["psize"])


def open_environment(
    generation: Path, *, write: bool, create: bool, min_map_size: int = 0
) -> lmdb.Environment:
    """Open a generation's LMDB environment with the largest map that suits the process.

    A commit that doesn't fit, of this or another process, has it opened again with a larger one.

    Args:
        generation: The generation's folder.
        write: For write transactions.
        create: Make a new environment in this empty folder.
        min_map_size: Bytes that the map should have, if there is address space for them.

    Raises:
        IntegrityError: The file is missing, truncated or foreign.
        NotRegularFileError: A link, pipe or device is in its place, or in the lock file's.
        ReadOnlyCacheError: This user may not read it.
        StorageError: No address space is left, or it lies on a network file system.
    """
    occupy_standard_descriptors()
    if write:
        check_local_for_writing(generation)
    _check_files(generation)
    # LMDB makes an empty environment of an empty file or folder, which would hide a loss.
    try:
        size, newest_commit = (0, None) if create else check_data_file(generation)
    except PermissionError:
        raise ReadOnlyCacheError(
            f"{generation / 'data.mdb'} isn't readable for this user. Ask its owner for read "
            "permission"
        ) from None
    least = size + _LEAST_GROWTH if write else size
    wanted = max(_WRITER_MAP if write else _READER_MAP, 8 * size)
    share = _address_space_left(is_small=not write) // _SHARE_OF_THE_REST
    map_size = max(least, min_map_size, min(wanted, share))
    while True:
        try:
            return _open_in_step(generation, map_size, newest_commit, write=write)
        except (lmdb.InvalidError, lmdb.InvalidParameterError):
            if not create:
                _blame_lock_file(generation)
            raise
        except (MemoryError, lmdb.MemoryError):
            if map_size <= least:
                raise StorageError(
                    f"{generation}: no address space for a map of {max(1, map_size >> 20)} MiB. "
                    "Raise `ulimit -v`, or close readers of other stores"
                ) from None
            map_size = max(least, map_size // 2)


def _address_space_left(*, is_small: bool) -> int:
    """Return the bytes that this process may still map, roughly.

    Args:
        is_small: A reader's map is asked for, of which thousands fit where there is no limit: what
            is used isn't looked up.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if is_small and limit == resource.RLIM_INFINITY:
        return _ADDRESS_SPACE
    used = 0
    with contextlib.suppress(OSError, ValueError):  # no /proc: halving finds a size
        used = int(Path("/proc/self/statm").read_bytes().split()[0]) * mmap.PAGESIZE
    space = _ADDRESS_SPACE if limit == resource.RLIM_INFINITY else min(limit, _ADDRESS_SPACE)
    return max(0, space - used)


def _blame_lock_file(generation: Path) -> None:
    """A sound store isn't lost to the advice for a damaged one, or to a pruning of those."""
    with contextlib.suppress(lmdb.Error):
        lmdb.open(os.fsencode(generation), readonly=True, create=False, lock=False).close()
        raise StorageError(
            f"{generation / 'lock.mdb'} was overwritten or cut while a process has the store open "
            f"({_users(generation)}). The data is sound: end that process, and the next one makes "
            "the lock file anew; removing it before would destroy the store"
        ) from None


def _users(generation: Path) -> str:
    return ", ".join(holders([generation / "lock.mdb"])) or "unknown"


def _check_files(generation: Path) -> None:
    # LMDB follows links, waits for a pipe's other end, and would map a lock file that the disk
    # can't hold, and die of SIGBUS.
    check_folder(generation)
    check_file(f"{generation}/data.mdb")
    if (
        not check_file(f"{generation}/lock.mdb")
        and os.access(generation, os.W_OK)
        and free_bytes(generation) < _LOCK_FILE_BYTES
    ):
        raise CacheFullError(f"{generation}: no room for LMDB's lock file. Free space on the disk")


def _open_in_step(
    generation: Path, map_size: int, newest_commit: int | None, *, write: bool
) -> lmdb.Environment:
    """Open it with a lock file that knows the newest commit.

    A process that is killed while it opens a store as the first one leaves a lock file that says
    "no commit yet" to those who open it at the same moment. A writer would take the store for an
    empty one and destroy it. It is set right by the next process that opens it while no other has.
    """
    deadline = time.monotonic() + _SECONDS_FOR_LOCK_FILE
    while True:
        environment = _open_with(generation, map_size, write=write)
        if newest_commit is None or _is_in_step(environment, newest_commit):
            return environment
        environment.close()
        if time.monotonic() > deadline:
            raise StorageError(
                f"{generation / 'lock.mdb'} doesn't know the newest commit: a process was killed "
                f"while it opened the store. The data is sound; end those who have it open "
                f"({_users(generation)}), and the next one sets the lock file right"
            )
        _logger.info("%s: the lock file is out of step, opening again", generation)
        time.sleep(random.uniform(0.001, 0.02))


def _is_in_step(environment: lmdb.Environment, transaction: int) -> bool:
    try:
        seen = int(environment.begin().id())
    except lmdb.Error:
        return True  # a full reader table or a map that is outgrown; who reads sees to it
    # One behind: a writer is between its meta page and the lock file, or was killed there.
    return seen >= transaction or 0 < seen == transaction - 1


def _open_with(generation: Path, map_size: int, *, write: bool) -> lmdb.Environment:
    options: dict[str, Any] = {
        "map_size": -(-map_size // 65536) * 65536,
        "max_dbs": 4,
        "max_readers": _MAX_READERS,
        "mode": 0o666,
    }
    path = os.fsencode(generation)
    if write:
        return lmdb.open(path, **options)
    if not check_local_for_reading(generation):
        return lmdb.open(path, readonly=True, create=False, lock=False, **options)
    try:
        environment = lmdb.open(path, readonly=True, create=False, **options)
    except (MemoryError, lmdb.MemoryError, lmdb.ReadersFullError):
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

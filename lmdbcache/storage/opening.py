"""Opening one generation's data.mdb: look before LMDB does, then find a map size that fits."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import resource
import shutil
import struct
from pathlib import Path
from typing import Any, Final, cast

import lmdb

from lmdbcache.errors import CacheFullError, IntegrityError, ReadOnlyCacheError, StorageError
from lmdbcache.storage.engine_errors import DAMAGE_REMEDY, truncated
from lmdbcache.storage.filesystems import check_local_for_reading, check_local_for_writing
from lmdbcache.storage.reader_slots import holders

__all__ = ["check_file_size", "check_still_whole", "file_id", "open_environment"]

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

# Page header (16 bytes), then: magic, version, address, map size, free DB with the page size in
# its first field, main DB, last page, transaction id. Native byte order.
_META: Final = struct.Struct("=16x IIQQ I44x 48x QQ")
_META_SIZE: Final = _META.size
_MAGIC, _VERSION, _PAGE_SIZE, _LAST_PAGE, _TXNID = 0, 1, 4, 5, 6


def check_file_size(generation: Path) -> int:
    """Compare data.mdb with what its newer meta page says; the cheap guard against SIGBUS.

    Returns:
        The file's size in bytes.

    Raises:
        IntegrityError: Missing, empty, truncated, or not an LMDB 0.9 file.
    """
    path = generation / "data.mdb"
    try:
        with path.open("rb") as file:
            head = file.read(_META_SIZE)
            page_size = _META.unpack(head)[_PAGE_SIZE] if len(head) == _META_SIZE else 0
            pages = [head] if 512 <= page_size <= 65536 else []
            if pages:
                file.seek(page_size)
                pages.append(file.read(_META_SIZE))
            # Last: a commit in between makes the file larger than the pages read here say.
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing. {DAMAGE_REMEDY}") from None
    metas = [_META.unpack(page) for page in pages if len(page) == _META_SIZE]
    metas = [meta for meta in metas if meta[_MAGIC] == 0xBEEFC0DE and meta[_VERSION] == 1]
    if not metas:
        raise IntegrityError(f"{path} isn't an LMDB file ({size} bytes). {DAMAGE_REMEDY}")
    needed = (max(metas, key=lambda meta: cast("int", meta[_TXNID]))[_LAST_PAGE] + 1) * page_size
    if size < needed:
        raise IntegrityError(truncated(path, size, needed))
    return size


def file_id(generation: Path) -> tuple[int, int] | None:
    """Which file data.mdb is; a cleared and remade generation of the same name differs."""
    try:
        status = (generation / "data.mdb").stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


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
    path = generation / "data.mdb"
    for is_first in (True, False):
        # Before the file's size: a commit in between makes the file larger.
        least = known if is_first else _used_bytes(environment)
        try:
            status = path.stat()
        except OSError:
            return known  # unlinked: what is mapped stays as it is
        if (status.st_dev, status.st_ino) != opened:
            return known
        if status.st_size < least:
            raise IntegrityError(truncated(path, status.st_size, least))
    return status.st_size


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
        ReadOnlyCacheError: This user may not read it.
        StorageError: No address space is left, or it lies on a network file system.
    """
    if write:
        check_local_for_writing(generation)
    data = generation / "data.mdb"
    if not create and data.exists() and not os.access(data, os.R_OK):
        raise ReadOnlyCacheError(
            f"{data} isn't readable for this user. Ask its owner for read permission"
        )
    _check_room_for_lock_file(generation)
    # LMDB makes an empty environment of an empty file or folder, which would hide a loss.
    size = 0 if create else check_file_size(generation)
    least = size + _LEAST_GROWTH if write else size
    wanted = max(_WRITER_MAP if write else _READER_MAP, 8 * size)
    map_size = max(least, min_map_size, min(wanted, _address_space_left() // _SHARE_OF_THE_REST))
    while True:
        try:
            return _open_with(generation, map_size, write=write)
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


def _address_space_left() -> int:
    """Bytes that this process may still map, roughly."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = 0
    with contextlib.suppress(OSError, ValueError):  # no /proc: halving finds a size
        used = int(Path("/proc/self/statm").read_bytes().split()[0]) * mmap.PAGESIZE
    space = _ADDRESS_SPACE if limit == resource.RLIM_INFINITY else min(limit, _ADDRESS_SPACE)
    return max(0, space - used)


def _blame_lock_file(generation: Path) -> None:
    """Nobody loses a sound store to the advice for a damaged one."""
    with contextlib.suppress(lmdb.Error):
        lmdb.open(str(generation), readonly=True, create=False, lock=False).close()
        found = ", ".join(holders(generation)) or "unknown"
        raise StorageError(
            f"{generation / 'lock.mdb'} was overwritten or cut while a process has the store open "
            f"({found}). The data is sound: end that process, and the next one makes the lock file "
            "anew; removing it before would destroy the store"
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
        "map_size": -(-map_size // 65536) * 65536,
        "max_dbs": 4,
        "max_readers": _MAX_READERS,
        "mode": 0o666,
    }
    path = str(generation)
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

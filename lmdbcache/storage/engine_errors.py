"""LMDB's and the system's errors, as ours."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

import lmdb

from lmdbcache.errors import (
    CacheError,
    CacheFullError,
    IntegrityError,
    ReadOnlyCacheError,
    StorageError,
)
from lmdbcache.files import few, free_bytes
from lmdbcache.storage.reader_slots import holders

_NAMED: Final = 4  # processes, in a message
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
DAMAGE_REMEDY: Final = (
    "Repair the store to keep what is sound and extract what isn't, or restore the file from a copy"
)
LOSS_REMEDY: Final = "Restore the file from a copy, or clear this store and extract again"


def truncated(path: Path, size: int, needed: int) -> str:
    """The message for a data file that is shorter than its last page."""
    return f"{path} is truncated: {size} bytes of {needed}. {DAMAGE_REMEDY}"


@contextlib.contextmanager
def translated_errors(where: Path, needed: int = 0) -> Iterator[None]:
    """Turn LMDB's and the system's errors into ours, with a remedy.

    Args:
        where: For the message.
        needed: Bytes that have to be free for what is done inside, where known.
    """
    try:
        yield
    except lmdb.MapFullError:
        raise CacheFullError(
            f"{where}: the memory map is full. Close all readers of this store in this process "
            "and open it again, so that a larger map is taken"
        ) from None
    except lmdb.ReadersFullError:
        raise StorageError(_readers_full(where)) from None
    except lmdb.ReadonlyError:
        raise ReadOnlyCacheError(
            f"{where} can't be written by this process. Check the permissions of the folder and "
            "of data.mdb"
        ) from None
    except (
        lmdb.CorruptedError,
        lmdb.InvalidError,
        lmdb.PageNotFoundError,
        lmdb.VersionMismatchError,
        lmdb.PanicError,
    ) as error:
        raise IntegrityError(f"{where} is damaged ({error}). {DAMAGE_REMEDY}") from None
    except CacheError:  # some are OSErrors, too
        raise
    except (lmdb.Error, OSError) as error:
        translated = _translated(error, where, needed)
        raise translated from (error if type(translated) is StorageError else None)


def _translated(error: Exception, where: Path, needed: int) -> CacheError:
    if _disk_is_full(error, where):
        free = free_bytes(where)
        wanted = f", {-(-needed >> 20)} MiB needed" if needed else ""
        return CacheFullError(
            f"{where}: the disk or this user's quota is full ({free >> 20} MiB free{wanted}). "
            "Free space and go on; what was committed is safe"
        )
    if isinstance(error, PermissionError):
        return ReadOnlyCacheError(
            f"{error.filename or where} can't be used by this user ({error.strerror}). "
            "Check the permissions"
        )
    if isinstance(error, lmdb.MemoryError):
        return StorageError(
            f"{where}: no memory ({error}). Raise `ulimit -v`, or commit and read less at a time"
        )
    if "already open in this process" in str(error):
        return StorageError(
            f"{where} is open in this process through lmdb itself, which allows one "
            "environment for a file. Close that lmdb.Environment first"
        )
    return StorageError(f"{where}: {error}")


def _readers_full(where: Path) -> str:
    found = holders([where / "lock.mdb", *where.glob("gen-*/lock.mdb")])
    named = f" (open in process {few(found, _NAMED)})" if found else ""
    return (
        f"{where}: all slots of LMDB's reader table are taken{named}. Close readers there, or end "
        "such a process, and try again; the table is made anew once no process has the store open"
    )


def raise_translated(error: BaseException, where: Path) -> NoReturn:
    """Raise an error as ours; for hot paths, where `translated_errors` costs too much."""
    with translated_errors(where):
        raise error
    raise error  # the context manager never swallows one


def _disk_is_full(error: Exception, where: Path) -> bool:
    if isinstance(error, lmdb.DiskError) or getattr(error, "errno", None) in _FULL:
        return True
    if os.strerror(errno.EDQUOT) in str(error):
        return True
    # A short write shows as EIO.
    if "Input/output error" in str(error):
        with contextlib.suppress(OSError):
            return free_bytes(where) < (1 << 20)
    return False

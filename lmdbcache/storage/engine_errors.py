"""LMDB's and the system's errors, as ours."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
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

__all__ = ["DAMAGE_REMEDY", "raise_translated", "translated_errors"]

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
DAMAGE_REMEDY: Final = "Clear this store and extract again, or restore the file from a copy"


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
        raise StorageError(
            f"{where}: all reader slots are taken by living processes. "
            "Close readers, or end processes that keep one open"
        ) from None
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
        if _disk_is_full(error, where):
            free = shutil.disk_usage(where).free
            wanted = f", {-(-needed >> 20)} MiB needed" if needed else ""
            raise CacheFullError(
                f"{where}: the disk or this user's quota is full ({free >> 20} MiB free{wanted}). "
                "Free space and go on; what was committed is safe"
            ) from None
        if isinstance(error, PermissionError):
            raise ReadOnlyCacheError(
                f"{error.filename or where} can't be used by this user ({error.strerror}). "
                "Check the permissions"
            ) from None
        raise StorageError(f"{where}: {error}") from error


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
            return shutil.disk_usage(where).free < (1 << 20)
    return False

"""Errors of file systems, each of which has its own, as ours."""

from __future__ import annotations

import errno
from typing import Final

from lmdbcache.errors import CacheFullError, MissingDependencyError, RemoteError

__all__ = ["first_line", "is_final", "missing_package", "translated"]

_EXTRAS: Final = {"s3": "lmdbcache[s3]", "s3a": "lmdbcache[s3]"}
_PACKAGES: Final = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "ssh": "sshfs",
    "sftp": "sshfs",
    "abfs": "adlfs",
    "az": "adlfs",
}
_FINAL_ERRNOS: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
)


def missing_package(protocol: str, why: str) -> MissingDependencyError:
    """What to install for this kind of URL."""
    package = _EXTRAS.get(protocol) or ("lmdbcache[share]" if why == "fsspec" else None)
    package = package or _PACKAGES.get(protocol)
    return MissingDependencyError(
        f"{protocol}://: {why}: pip install " + (f'"{package}"' if package else "what it names")
    )


def is_final(error: Exception) -> bool:
    """Whether trying again is no use."""
    if isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError)):
        return True
    if isinstance(error, (TypeError, NotImplementedError, MemoryError)) or _is_host_key(error):
        return True
    if isinstance(error, OSError) and error.errno in _FINAL_ERRNOS:
        return True
    return any(word in type(error).__name__ for word in ("Credentials", "Token", "Permission"))


def translated(error: Exception, place: str, tries: int) -> CacheFullError | RemoteError:
    """An error of ours for what a file system raised."""
    reason = first_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheFullError(f"{place}: the disk is full. Free space and go on")
    if "Credentials" in type(error).__name__:
        return RemoteError(
            f"{place}: no credentials ({reason}). Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or what this kind of place takes"
        )
    if isinstance(error, PermissionError) or "Permission" in type(error).__name__:
        return RemoteError(f"{place}: permission denied ({reason}). Check the credentials")
    if _is_host_key(error):
        return RemoteError(
            f"{place}: the host's key isn't the one in ~/.ssh/known_hosts, or isn't there "
            f"({reason}). Connect with `ssh` once, compare the key it shows, and try again"
        )
    often = f", tried {tries} times" if tries > 1 else ""
    return RemoteError(f"{place}: {reason}{often}. Check the URL and the connection, and try again")


def _is_host_key(error: Exception) -> bool:
    """Whether an SSH server isn't the one that is known by this name (asyncssh's error)."""
    return type(error).__name__ == "HostKeyNotVerifiable"


def first_line(error: BaseException) -> str:
    """An error's type and the beginning of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__

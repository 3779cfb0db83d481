"""The one way to open a file of a store: the file itself, or an error.

A store may come from elsewhere. A symbolic link in its folder could lead a read or a write out of
it, and a named pipe would keep the process waiting for the other end. The folder of the store and
the root may be links: the user made those.

Not covered: a process of the same user that swaps a file between a check here and LMDB's own open.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from lmdbcache.errors import NotRegularFileError
from lmdbcache.storage.standard_descriptors import occupy_standard_descriptors

__all__ = ["check_file", "check_folder", "open_file", "read_file", "replace_file"]

_KINDS: Final = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
}
_SAFELY: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file of a store.

    Args:
        path: The file; its last part isn't followed if it is a link.
        flags: As for `os.open`.

    Returns:
        A descriptor above 2, closed on exec.

    Raises:
        NotRegularFileError: Something else than a file is there.
        OSError: It can't be opened.
    """
    occupy_standard_descriptors()
    try:
        descriptor = os.open(path, flags | _SAFELY, 0o666)
    except OSError:
        check_file(path)
        raise
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refusal(path, mode, "a file")
    return descriptor


def read_file(path: Path, limit: int = -1) -> bytes:
    """Return the content of a file of a store.

    Args:
        path: The file.
        limit: Bytes to read at most; -1 reads all.

    Raises:
        NotRegularFileError, OSError: See `open_file`.
    """
    with os.fdopen(open_file(path), "rb", buffering=0) as file:
        return (file.read() if limit < 0 else file.read(limit)) or b""


def replace_file(path: Path, content: bytes, temporary: Path, *, durable: bool = False) -> None:
    """Write a file of a store at once or not at all.

    Args:
        path: The file.
        content: Its content from now on.
        temporary: A name beside it, for this process alone.
        durable: Bring the content to the disk before the file takes its name.

    Raises:
        NotRegularFileError, OSError: See `open_file`.
    """
    try:
        check_file(temporary, replaceable=True)
        temporary.unlink(missing_ok=True)  # a link is removed, never what it leads to
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(open_file(temporary, flags), "wb", buffering=0) as file:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
            if durable:
                os.fsync(file.fileno())
        check_file(path, replaceable=True)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def check_file(path: Path, *, replaceable: bool = False) -> None:
    """Refuse what isn't a file where a store's file belongs; for those that open by path.

    Args:
        path: The file; it may be missing.
        replaceable: A rename is going to replace it: only a folder is in the way.

    Raises:
        NotRegularFileError: Something else than a file is there.
    """
    mode = _mode(path)
    is_fine = stat.S_ISREG(mode) or not mode or (replaceable and not stat.S_ISDIR(mode))
    if not is_fine:
        raise _refusal(path, mode, "a file")


def check_folder(path: Path) -> None:
    """Refuse what isn't a folder, a link to one included; it may be missing.

    Raises:
        NotRegularFileError: Something else than a folder is there.
    """
    mode = _mode(path)
    if mode and not stat.S_ISDIR(mode):
        raise _refusal(path, mode, "a folder")


def _mode(path: Path) -> int:
    """0 if nothing is there."""
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0


def _refusal(path: Path, mode: int, expected: str) -> NotRegularFileError:
    kind = _KINDS.get(stat.S_IFMT(mode), "something unknown")
    hint = "; only the store's folder or the root may be a link" if stat.S_ISLNK(mode) else ""
    return NotRegularFileError(
        f"{path} is {kind} where {expected} of the store belongs{hint}. Find out who made it, "
        "and remove it"
    )

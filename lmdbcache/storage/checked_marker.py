"""Which machines know a generation: they made it, or have checked it.

The marker `checked` has one line per machine, `<digest of the machine> <inode of data.mdb>`, and
`structure` behind it where the values weren't looked at. A copy has another inode, so a copied
marker doesn't vouch for it. Where the folder can't be written the line is kept in a folder of the
user's: the cache directory, else one for temporary files. All are derived and may be removed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lmdbcache.errors import ConfigError
from lmdbcache.files import open_file, read_file, user_cache_folder
from lmdbcache.machine import boot_id
from lmdbcache.storage.pages.commit_record import read_commit_record

__all__ = ["is_known", "mark_known"]

_logger: Final = logging.getLogger(__name__)

_NAME: Final = "checked"
_STRUCTURE_ALONE: Final = b" structure"
_MAX_BYTES: Final = 1 << 16


def is_known(generation: Path, *, with_values: bool = True) -> bool:
    """Whether this machine made or checked the generation.

    Args:
        generation: Its folder.
        with_values: Whether its values have to be checked as well, not only LMDB's structure.
    """
    for path, line in _markers(generation):
        lines = _lines(path)
        if line in lines or (not with_values and line + _STRUCTURE_ALONE in lines):
            return True
    return False


def mark_known(generation: Path, *, with_values: bool = True) -> None:
    """Remember that this machine made the generation, or found it sound.

    Args:
        generation: Its folder.
        with_values: Whether its values were checked as well.
    """
    if is_known(generation, with_values=with_values):
        return
    for path, line in _markers(generation, make=True):
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            if path.exists() and path.stat().st_size > _MAX_BYTES // 2:
                flags |= os.O_TRUNC
            descriptor = open_file(path, flags)
            try:
                # In front, too: a line that was cut short doesn't spoil this one.
                ending = b"" if with_values else _STRUCTURE_ALONE
                os.write(descriptor, b"\n" + line + ending + b"\n")
            finally:
                os.close(descriptor)
            return
    _logger.warning(
        "%s: nowhere to remember that it was checked; the next process checks again. Let this user "
        "write to its home directory or to /tmp",
        generation,
    )


def _lines(path: Path) -> list[bytes]:
    try:
        return read_file(path, _MAX_BYTES).split(b"\n")
    except OSError:
        return []


def _markers(generation: Path, *, make: bool = False) -> Iterator[tuple[Path, bytes]]:
    """Where a generation may be remembered, the best place first, and by which line."""
    try:
        status = (generation / "data.mdb").lstat()
    except OSError:
        return
    line = f"{_machine()} {status.st_ino}"
    yield generation / _NAME, line.encode()
    # Another image may be mounted at this path, and have given its file the same inode.
    commit = hashlib.blake2b(repr(read_commit_record(generation)).encode(), digest_size=8)
    line += f" {status.st_size} {status.st_mtime_ns} {commit.hexdigest()}"
    name = hashlib.blake2b(os.fsencode(generation), digest_size=16).hexdigest()
    for folder in _own_folders(make=make):
        yield folder / name, line.encode()


def _own_folders(*, make: bool) -> Iterator[Path]:
    with contextlib.suppress(ConfigError):
        folder = user_cache_folder() / _NAME
        if make:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
        yield folder
    everybodys = (os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("TMPDIR"), "/tmp", "/dev/shm")
    for parent in dict.fromkeys(filter(None, everybodys)):
        folder = Path(parent) / f"lmdbcache-{os.geteuid()}"
        if make:
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_absolute() and _is_private(folder):
            yield folder


def _is_private(folder: Path) -> bool:
    """Return whether no other user can have put a marker or a link there."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and (status.st_uid, status.st_mode & 0o077) == (
        os.geteuid(),
        0,
    )


@functools.cache
def _machine() -> str:
    """A digest: the machine's id isn't for others to read."""
    identity = b""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            identity = identity or Path(path).read_bytes().strip()
    # Containers often have no id of their own; the kernel's is the host's, until the next boot.
    identity = identity or (boot_id() or platform.node()).encode("utf-8", "replace")
    return hashlib.blake2b(identity, digest_size=8, person=b"lmdbcache").hexdigest()

"""Which machines know a generation: they made it, or have checked all of it.

The marker `checked` has one line per machine, `<digest of the machine> <inode of data.mdb>`. A
copy has another inode, so a copied marker doesn't vouch for it. Where the folder can't be written
the line is kept in the user's cache directory. Both are derived and may be removed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
from pathlib import Path
from typing import Final

import platformdirs

from lmdbcache.storage.regular_files import open_file, read_file

__all__ = ["is_known", "mark_known"]

_logger: Final = logging.getLogger(__name__)

_NAME: Final = "checked"
_MAX_BYTES: Final = 1 << 16


def is_known(generation: Path) -> bool:
    """Whether this machine made or checked the generation."""
    line = _line(generation)
    if line is None:
        return False
    return any(line in _lines(path) for path in (generation / _NAME, _own_marker(generation)))


def mark_known(generation: Path) -> None:
    """Remember that this machine made the generation, or found all of it sound."""
    line = _line(generation)
    if line is None or is_known(generation):
        return
    for path in (generation / _NAME, _own_marker(generation)):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            if path.exists() and path.stat().st_size > _MAX_BYTES // 2:
                flags |= os.O_TRUNC
            descriptor = open_file(path, flags)
            try:
                # In front, too: a line that was cut short doesn't spoil this one.
                os.write(descriptor, b"\n" + line + b"\n")
            finally:
                os.close(descriptor)
            return
    _logger.warning("%s: can't remember that it was checked; the next process checks again", path)


def _lines(path: Path) -> list[bytes]:
    try:
        return read_file(path, _MAX_BYTES).split(b"\n")
    except OSError:
        return []


def _line(generation: Path) -> bytes | None:
    try:
        inode = (generation / "data.mdb").lstat().st_ino
    except OSError:
        return None
    return f"{_machine()} {inode}".encode()


def _own_marker(generation: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(generation), digest_size=16).hexdigest()
    return Path(platformdirs.user_cache_dir("lmdbcache")) / "checked" / name


@functools.cache
def _machine() -> str:
    """A digest: the machine's id isn't for others to read."""
    identity = b""
    # Containers often have no id of their own; the kernel's is the host's, until the next boot.
    kernel = "/proc/sys/kernel/random/boot_id"
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id", kernel):
        with contextlib.suppress(OSError):
            identity = identity or Path(path).read_bytes().strip()
    identity = identity or platform.node().encode("utf-8", "replace")
    return hashlib.blake2b(identity, digest_size=8, person=b"lmdbcache").hexdigest()

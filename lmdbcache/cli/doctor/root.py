"""The cache directory: file system, space, quota, permissions, umask."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lmdbcache.cli.doctor.findings import Finding, note, ok, problem
from lmdbcache.files import existing_parent
from lmdbcache.machine import NETWORK_VARIABLE, ROOT_VARIABLE
from lmdbcache.storage import RESERVE_BYTES, Mount, mount_of

_LITTLE_SPACE: Final = 1 << 30
_FEW_INODES: Final = 1000
_QUOTA_SECONDS: Final = 5
_GIB: Final = 1 << 30


def check_root(root: Path) -> Iterator[Finding]:
    """The cache directory, or the folder that it would be made in."""
    folder = existing_parent(root)
    yield _existence(root, folder)
    if not folder.is_dir():
        return
    mount = mount_of(folder)
    yield _file_system(mount)
    yield _space(folder)
    if (finding := _inodes(folder)) is not None:
        yield finding
    if (finding := _quota(mount)) is not None:
        yield finding
    yield _umask(folder)


def _existence(root: Path, folder: Path) -> Finding:
    if not folder.is_dir():
        return problem("root", f"{folder} is a file", "choose another root (--root)")
    may_write = os.access(folder, os.W_OK | os.X_OK)
    if folder == root:
        if may_write:
            return ok("root", f"{root}, can be written")
        if os.access(folder, os.R_OK | os.X_OK):
            return note("root", f"{root} can only be read by this user: nothing is stored there")
        remedy = "ask its owner, or choose another root (--root)"
        return problem("root", f"{root} can't be read by this user", remedy)
    if may_write:
        return ok("root", f"{root} isn't there yet; the first commit makes it")
    remedy = f"choose another root (--root, ${ROOT_VARIABLE})"
    return problem("root", f"{root} isn't there, and {folder} can't be written", remedy)


def _file_system(mount: Mount | None) -> Finding:
    if mount is None:
        return note("file system", "unknown; LMDB needs a local disk")
    text = f"{mount.kind} on {mount.point}"
    if not mount.is_network:
        return ok("file system", f"{text}, local")
    allowed = os.environ.get(NETWORK_VARIABLE)
    remedy = "put the root on a local disk (scratch, $TMPDIR) and copy finished stores"
    if allowed:
        text = f"{text}: a network file system, {NETWORK_VARIABLE}={allowed}"
        return note("file system", text, remedy)
    text = f"{text}: a network file system, where LMDB's locks don't hold; it is refused"
    return problem("file system", text, remedy)


def _space(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f}"
    remedy = "free space (`lmdbcache prune`, `lmdbcache compact --all`), or choose another root"
    if usage.free < RESERVE_BYTES:
        return problem("free space", f"{text}; no commit is possible", remedy)
    if usage.free < _LITTLE_SPACE:
        return note("free space", text, remedy)
    return ok("free space", text)


def _inodes(folder: Path) -> Finding | None:
    with contextlib.suppress(OSError):
        found = os.statvfs(folder)
        if found.f_files and found.f_favail < _FEW_INODES:
            remedy = "remove small files on this file system"
            return problem("free inodes", f"{found.f_favail} files can still be made", remedy)
    return None


def _quota(mount: Mount | None) -> Finding | None:
    """This user's quota, where the `quota` program prints it at once."""
    program = shutil.which("quota")
    if program is None or mount is None:
        return None
    try:
        result = subprocess.run(
            [program, "-w", "-p", "-l"],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_QUOTA_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in result.stdout.splitlines():
        # /dev/sda1  4711  100000  120000  0  …: blocks of 1 KiB; a `*` marks what is exceeded.
        fields = [field.rstrip("*") for field in line.split()]
        if len(fields) >= 4 and fields[0] == mount.source and all(map(str.isdigit, fields[1:4])):
            used, soft, hard = (1024 * int(field) for field in fields[1:4])
            limit = hard or soft
            if not limit:
                return None
            text = f"{used / _GIB:.1f} GiB used of {limit / _GIB:.1f}"
            if limit - used < RESERVE_BYTES:
                return problem("quota", text, "free space, or ask for more")
            return ok("quota", text)
    return None


def _umask(folder: Path) -> Finding:
    umask = os.umask(0o022)
    os.umask(umask)
    mode = folder.stat().st_mode
    text = f"{umask:03o}"
    if mode & stat.S_IWGRP and mode & stat.S_ISGID and umask & 0o020:
        text = f"{text}: the group may write to the root, and not to what this user makes there"
        return note("umask", text, "umask 002")
    return ok("umask", text)

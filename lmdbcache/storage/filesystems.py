"""Network file systems: LMDB's locks and its shared map don't work across machines there.

Known from /proc/self/mountinfo; where that doesn't exist, nothing is recognized.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from lmdbcache.errors import ReadOnlyCacheError, StorageError
from lmdbcache.files import existing_parent
from lmdbcache.machine import NETWORK_VARIABLE as NETWORK_VARIABLE

_logger: Final = logging.getLogger(__name__)

_NETWORK_TYPES: Final = re.compile(
    "9p|acfs|afpfs|afs|beegfs|ceph|cifs|coda|davfs|fhgfs|fuse|gfs2?|glusterfs|gpfs|juicefs|lustre|"
    r"mfs|ncpfs|nfs4?|ocfs2|orangefs|panfs|prl_fs|pvfs2|smb[23]|smbfs|vboxsf|virtiofs|wekafs|fuse\..*"
)
# A folder of this machine by way of a process: no other machine writes there.
_LOCAL_FUSE_TYPES: Final = re.compile(
    r"fuse\.(bindfs|cryfs|encfs|ext[24]|fuse-overlayfs|gocryptfs|lxcfs|mergerfs|ntfs|ntfs-3g|"
    "squashfuse|zfs)"
)
# Shared by a virtual machine's host. As the root they are the machine's own disk.
_HOST_TYPES: Final = frozenset(("9p", "virtiofs"))
# ext2 to 4, XFS, Btrfs, tmpfs, overlay, F2FS, ZFS: `f_type`, the first member of a statfs.
_LOCAL_KINDS: Final = frozenset(
    (0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x794C7630, 0xF2F52010, 0x2FC12FC1)
)
_STATFS_BYTES: Final = 256  # more than any system's
_KIND_BYTES: Final = ctypes.sizeof(ctypes.c_long)
_Statfs: Final = ctypes.c_char * _STATFS_BYTES
_statfs: Final = ctypes.CDLL(None).statfs if sys.platform == "linux" else None
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One mounted file system."""

    point: str
    kind: str
    source: str

    @property
    def is_network(self) -> bool:
        """Whether other machines may reach what lies there."""
        if self.kind in _HOST_TYPES and self.point == "/":
            return False
        is_local = _LOCAL_FUSE_TYPES.fullmatch(self.kind)
        return not is_local and _NETWORK_TYPES.fullmatch(self.kind) is not None


def check_local_for_writing(folder: Path) -> None:
    """Refuse to write where other machines may, unless `$LMDBCACHE_ALLOW_NETWORK` is 1.

    Args:
        folder: Where something will be written; need not exist yet.

    Raises:
        ReadOnlyCacheError: It lies on a network file system.
    """
    if (mount := network_mount(folder)) is None:
        return
    if not _is_allowed():
        raise ReadOnlyCacheError(
            f"{folder} lies on {mount.point}, a network file system ({mount.kind}), where LMDB's "
            "locks don't hold and a store can be destroyed. Put the cache root on a local disk "
            f"and copy the finished store over; or set {NETWORK_VARIABLE}=1 if only one machine "
            "ever uses it"
        )
    _warn(mount, "written")


def check_local_for_reading(folder: Path) -> bool:
    """Return whether to read with locks; without on a network file system, and only when asked.

    Raises:
        StorageError: It lies on a network file system and `$LMDBCACHE_ALLOW_NETWORK` isn't 1.
    """
    if (mount := network_mount(folder)) is None:
        return True
    if not _is_allowed():
        raise StorageError(
            f"{folder} lies on {mount.point}, a network file system ({mount.kind}), where LMDB's "
            "locks don't hold. Copy the store to a local disk; or, if no process writes to it, set "
            f"{NETWORK_VARIABLE}=1 to read it there without locks"
        )
    _warn(mount, "read without locks")
    return False


def network_mount(folder: Path) -> Mount | None:
    """Return the network file system that a folder lies on; None if it lies on another."""
    if _is_of_local_kind(folder):
        return None
    mount = mount_of(folder)
    return mount if mount is not None and mount.is_network else None


def _is_of_local_kind(folder: Path) -> bool:
    """Return whether the kernel names a kind that is never shared; a list of mounts is longer."""
    if _statfs is None:
        return False
    found = _Statfs()
    if _statfs(os.fsencode(folder), found) != 0:
        return False  # not there yet, or not ours to look at
    return int.from_bytes(found.raw[:_KIND_BYTES], sys.byteorder) in _LOCAL_KINDS


def mount_of(folder: Path) -> Mount | None:
    """Return the mount that a folder lies on, or would; None where that isn't known."""
    try:
        try:
            device = folder.stat().st_dev
        except (FileNotFoundError, NotADirectoryError):
            folder = existing_parent(folder)
            device = folder.stat().st_dev
        return _mount_of(device, os.fspath(folder))
    except OSError:  # not ours to look at
        return None


@lru_cache(maxsize=256)
def _mount_of(device: int, folder: str) -> Mount | None:
    """Also by device: what was mounted over the folder since is another one."""
    try:
        text = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return None
    # Of some tens of mounts, those of this device; a device that isn't listed has a number of its
    # file system's own making, and any of them may be the one.
    number = f" {os.major(device)}:{os.minor(device)} ".encode()
    own = b"\n".join(line for line in text.splitlines() if number in line[:40])
    mount = find_mount(parse_mounts(own or text), os.path.realpath(folder))
    _logger.debug("%s (device %d) lies on %s", folder, device, mount)
    return mount


def parse_mounts(text: bytes) -> list[Mount]:
    """Return the mounts that /proc/self/mountinfo lists, in its order, without unknown lines."""
    mounts = []
    for line in text.splitlines():
        before, dash, after = line.partition(b" - ")
        fields, types = before.split(b" "), after.split(b" ")
        if dash and len(fields) >= 6 and len(types) >= 2:
            point, source = _unescaped(fields[4]), _unescaped(types[1])
            mounts.append(Mount(point, types[0].decode("ascii", "replace"), source))
    return mounts


def find_mount(mounts: list[Mount], path: str) -> Mount | None:
    """Return the mount of an absolute path without links: the longest, of equal ones the last."""
    found = None
    for mount in mounts:
        inside = path == mount.point or path.startswith(mount.point.rstrip("/") + "/")
        if inside and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def _unescaped(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def _is_allowed() -> bool:
    return os.environ.get(NETWORK_VARIABLE, "").strip().lower() in ("1", "true", "yes", "on")


@lru_cache(maxsize=256)
def _warn(mount: Mount, use: str) -> None:
    _logger.warning(
        "%s is a network file system (%s); stores there are %s, which is sound only while no "
        "other machine writes to them",
        mount.point,
        mount.kind,
        use,
    )

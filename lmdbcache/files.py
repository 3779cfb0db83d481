"""Files of any room: paths and sizes, opening and replacing a file, locks on files, free space.

A store may come from elsewhere. A symbolic link in its folder could lead a read or a write out of
it, and a named pipe would keep the process waiting for the other end. So a file of ours is opened
by `open_file`: the file itself, or an error. The folder of a store and the root may be links: the
user made those. Not covered: a process of the same user that swaps a file between a check here and
LMDB's own open.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

import platformdirs

from lmdbcache.errors import ConfigError, NotRegularFileError
from lmdbcache.machine import ROOT_VARIABLE

_logger: Final = logging.getLogger(__name__)

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
_FIRST_FREE_DESCRIPTOR: Final = 3
_TEMPORARY: Final = re.compile(r"\.(.+)\.[0-9]+-[0-9]+\.tmp")
_OLD_SECONDS: Final = 3600.0  # a temporary file is written in a moment


# ---- paths, sizes, names


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading `~` replaced.

    Raises:
        ConfigError: That home directory isn't known.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)  # noqa: PTH111 - to Path, ./~ and ~ are the same
    if expanded.startswith("~"):
        raise ConfigError(
            f"{text}: there is no such home directory. Set HOME, write the whole path, "
            "or ./~… for a file whose name begins with ~"
        )
    return Path(expanded)


def user_cache_folder() -> Path:
    """Return the folder where this user's caches belong; it may not exist yet.

    Raises:
        ConfigError: The user has no home directory.
    """
    try:
        return Path(platformdirs.user_cache_dir("lmdbcache")).expanduser()
    except RuntimeError:
        raise ConfigError(
            "this user has no home directory (no HOME and no passwd entry), and so no default "
            f"cache root. Give the root, or set {ROOT_VARIABLE} or HOME"
        ) from None


def existing_parent(path: Path) -> Path:
    """Return the path itself if it exists, else the nearest folder above it that does."""
    for folder in (path, *path.parents):
        # A folder that this user may not look into raises in some Python versions.
        with contextlib.suppress(OSError):
            if folder.exists():
                return folder
    return path


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write where a folder lies, or would."""
    return shutil.disk_usage(existing_parent(folder)).free


def readable_size(num_bytes: float) -> str:
    """Return a size with a unit of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


def few(items: Collection[object], most: int = 10) -> str:
    """Return the first items for a message: `a, b, c and 7 more`."""
    shown = ", ".join(map(str, islice(items, most)))
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown


# ---- opening, replacing, removing


def open_file(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a file of ours.

    Args:
        path: The file; its last part isn't followed if it is a link.
        flags: As for `os.open`.

    Returns:
        A descriptor above 2, closed on exec.

    Raises:
        NotRegularFileError: Something other than a file is there.
        OSError: It can't be opened.
    """
    if flags & os.O_ACCMODE:  # nobody's message may go into it, not even for a moment
        occupy_standard_descriptors()
    try:
        descriptor = os.open(path, flags | _SAFELY, 0o666)
    except OSError:
        check_file(path)
        raise
    if descriptor < _FIRST_FREE_DESCRIPTOR:
        descriptor = _moved_up(descriptor)
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refusal(path, mode, "a file")
    return descriptor


def read_file(path: str | Path, limit: int = -1) -> bytes:
    """Return the content of a file of ours.

    Args:
        path: The file.
        limit: Bytes to read at most; -1 reads all.

    Raises:
        NotRegularFileError, OSError: See `open_file`.
    """
    with os.fdopen(open_file(path), "rb", buffering=0) as file:
        return file.read(limit)


def replace_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file of ours at once or not at all.

    Args:
        path: The file.
        content: Its content from now on.
        durable: Bring the content to the disk before the file takes its name. Its folder is left
            to the caller (`sync_file`).

    Raises:
        NotRegularFileError, OSError: See `open_file`.
    """
    # For this thread alone; `is_temporary` knows the name.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
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


def is_temporary(name: str, of: str | None = None) -> bool:
    """Return whether a file's name is one that `replace_file` writes under, for the file `of`."""
    match = _TEMPORARY.fullmatch(name)
    return match is not None and of in (None, match[1])


def is_old_temporary(path: Path) -> bool:
    """Return whether a process was killed in `replace_file` and left this file."""
    if not is_temporary(path.name):
        return False
    try:
        return time.time() - path.lstat().st_mtime > _OLD_SECONDS
    except OSError:
        return False


def sync_file(path: Path) -> None:
    """Bring a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_entry(path: Path) -> None:
    """Remove a file, a link and not what it leads to, or a folder with all that is in it.

    Raises:
        OSError: A file or link can't be removed; of a folder, what can't be removed stays.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_file(path: str | Path, *, replaceable: bool = False) -> bool:
    """Refuse what isn't a file where one of ours belongs; for those that open by path.

    Args:
        path: The file; it may be missing.
        replaceable: A rename is going to replace it: only a folder is in the way.

    Returns:
        Whether something is there.

    Raises:
        NotRegularFileError: Something other than a file is there.
    """
    mode = _mode(path)
    is_fine = stat.S_ISREG(mode) or not mode or (replaceable and not stat.S_ISDIR(mode))
    if not is_fine:
        raise _refusal(path, mode, "a file")
    return bool(mode)


def check_folder(path: str | Path) -> None:
    """Refuse what isn't a folder, a link to one included; it may be missing.

    Raises:
        NotRegularFileError: Something other than a folder is there.
    """
    mode = _mode(path)
    if mode and not stat.S_ISDIR(mode):
        raise _refusal(path, mode, "a folder")


def _mode(path: str | Path) -> int:
    """0 if nothing is there."""
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0


def _moved_up(descriptor: int) -> int:
    """Give a file that has taken the place of a standard descriptor a number above these."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_DESCRIPTOR)
    finally:
        os.close(descriptor)
        occupy_standard_descriptors()


def _refusal(path: str | Path, mode: int, expected: str) -> NotRegularFileError:
    kind = _KINDS.get(stat.S_IFMT(mode), "something unknown")
    hint = "; only the store's folder or the root may be a link" if stat.S_ISLNK(mode) else ""
    return NotRegularFileError(
        f"{path} is {kind} where {expected} of the store belongs{hint}. Find out who made it, "
        "and remove it"
    )


def occupy_standard_descriptors() -> None:
    """Open the null device in place of each of the descriptors 0, 1 and 2 that is closed.

    A process that was started with one of them closed (daemons, cron, `2>&-`) gives that number to
    the next file it opens. If that is data.mdb, each warning that a library prints is written into
    it. Call this before a file is opened and kept: a program may close one at any time. What the
    process prints to it is lost, as before.

    Raises:
        OSError: The null device can't be opened.
    """
    try:
        for descriptor in range(_FIRST_FREE_DESCRIPTOR):
            os.get_inheritable(descriptor)  # of all calls that fail for a closed one the fastest
    except OSError:
        while (descriptor := os.open(os.devnull, os.O_RDWR)) < _FIRST_FREE_DESCRIPTOR:
            os.set_inheritable(descriptor, True)  # noqa: FBT003 - has no name; for programs started here
        os.close(descriptor)


# ---- locks


@contextlib.contextmanager
def flocked(
    path: Path, flags: int = os.O_RDONLY, *, shared: bool = False, wait: bool = True
) -> Iterator[int]:
    """Hold a lock on a file until the end of the block, or of the process.

    A child shares the locks of its parent: one that outlives a killed parent would keep all others
    waiting. So the files are closed in a child at once, and unlocked explicitly in the parent.

    Args:
        path: The file.
        flags: As for `os.open`.
        shared: Others may hold a shared lock too.
        wait: Wait until others have released it.

    Raises:
        BlockingIOError: Another process holds it, and `wait` is False.
        NotRegularFileError, OSError: It can't be opened, or not be locked on this file system.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with _gate:
        descriptor = open_file(path, flags)
        _open_for_flock.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            _logger.info("waiting for the process that has locked %s", path)
            fcntl.flock(descriptor, kind)
        yield descriptor
    finally:
        _open_for_flock.discard(descriptor)
        # Explicitly: closing alone leaves the lock to a child that was forked in between.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


_open_for_flock: Final[set[int]] = set()
# Held by a fork, and from the opening of a file until it is in the set; never while waiting.
_gate = threading.RLock()


def _before_fork() -> None:
    _gate.acquire()


def _after_fork_in_parent() -> None:
    _gate.release()


def _after_fork_in_child() -> None:
    global _gate  # noqa: PLW0603 - module state of one process
    _gate = threading.RLock()
    for descriptor in _open_for_flock:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open_for_flock.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


def is_url(text: str) -> bool:
    """Return whether a text is meant as a URL, and not as a path or a name."""
    return "://" in text


def without_secrets(url: str) -> str:
    """Return a URL as it may be shown and kept: without the password, if it has one."""
    protocol, colon, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    user, at, name = host.rpartition("@")
    return f"{protocol}{colon}{user.partition(':')[0]}{at}{name}{slash}{path}"

"""The first opening of a store that this machine didn't write: look at all of it before LMDB does.

LMDB trusts its file: damaged pages of a copy would end the process or read wrong. So a machine
remembers which generations it made or checked. The marker `checked` has one line per machine,
`<digest of the machine> <inode of data.mdb>`, and `structure` behind it where the values weren't
looked at. A copy has another inode, so a copied marker doesn't vouch for it. Where the folder can't
be written the line is kept in a folder of the user's: the cache directory, else one for temporary
files. All are derived and may be removed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lmdbcache.errors import ConfigError, IntegrityError
from lmdbcache.files import flocked, open_file, read_file, user_cache_folder
from lmdbcache.machine import SKIP_VARIABLE, boot_id
from lmdbcache.storage.checks.checking import IntegrityReport, check_generation
from lmdbcache.storage.checks.value_checks import Progress
from lmdbcache.storage.pages.commit_record import read_commit_record

_logger: Final = logging.getLogger(__name__)

_LONG_BYTES: Final = 1 << 30
_SECONDS_BETWEEN_NEWS: Final = 15.0
_MARKER_NAME: Final = "checked"
_STRUCTURE_ALONE: Final = b" structure"
_MAX_MARKER_BYTES: Final = 1 << 16
_MAX_ID_BYTES: Final = 4096
_refused: Final[dict[tuple[int, ...], str]] = {}  # by this process


def check_first_opening(generation: Path) -> None:
    """Check a generation that this machine neither made nor checked before.

    Several processes that come at once wait for the one that checks.

    Raises:
        IntegrityError: It is damaged.
        StorageError: It is written to faster than it can be checked.
    """
    skipped = os.environ.get(SKIP_VARIABLE, "").lower()
    with_values = skipped != "values"
    if is_known(generation, with_values=with_values) or not (generation / "data.mdb").exists():
        return  # LMDB is never given a missing file either
    if skipped not in ("", "0", "values"):
        _logger.warning("%s is opened unchecked (%s=%s)", generation, SKIP_VARIABLE, skipped)
        return
    version = _version(generation)
    if version in _refused:  # so that asking sample by sample costs one check
        raise IntegrityError(_refused[version])
    with _one_at_a_time(generation):
        if not is_known(generation, with_values=with_values):
            try:
                _check(generation, with_values=with_values)
            except IntegrityError as error:
                _refused[version] = str(error)
                raise


def is_known(generation: Path, *, with_values: bool = True) -> bool:
    """Return whether this machine made or checked the generation.

    Args:
        generation: Its folder.
        with_values: Whether its values have to be checked as well, not only LMDB's structure.
    """
    for path, line in _markers(generation):
        try:
            lines = read_file(path, _MAX_MARKER_BYTES).split(b"\n")
        except OSError:
            continue
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
            descriptor = open_file(path, flags)
            try:
                if os.fstat(descriptor).st_size > _MAX_MARKER_BYTES // 2:
                    os.truncate(descriptor, 0)
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


def _version(generation: Path) -> tuple[int, ...]:
    """Changes with what the check looks at."""
    version: tuple[int, ...] = ()
    for name in ("data.mdb", "committed"):
        with contextlib.suppress(FileNotFoundError):
            status = (generation / name).stat()
            version += (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return version


def _check(generation: Path, *, with_values: bool) -> None:
    path = generation / "data.mdb"
    num_bytes = path.stat().st_size
    _logger.log(
        logging.WARNING if num_bytes > _LONG_BYTES else logging.INFO,
        "first opening of %s on this machine: checking %d MiB (%s=1 skips it)",
        generation.parent,
        num_bytes >> 20,
        SKIP_VARIABLE,
    )
    start = time.perf_counter()
    findings = check_generation(
        generation, with_values=with_values, progress=_logged(generation.parent)
    )
    if not findings.is_sound:
        raise IntegrityError(_described(findings))
    _logger.info("%s is sound (%.1f s)", generation.parent, time.perf_counter() - start)
    mark_known(generation, with_values=with_values)


def _logged(store: Path) -> Progress:
    last = time.monotonic()

    def log(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_NEWS:
            last = time.monotonic()
            _logger.warning("checked %d of %d embeddings of %s", done, total, store)

    return log


def _described(findings: IntegrityReport) -> str:
    parts = []
    if findings.structure:
        parts.append(findings.structure[0])
    bad = (*findings.damaged, *findings.missing)
    if bad:
        parts.append(f"{len(bad)} damaged embeddings, the first {bad[0]!r}")
    return (
        f"{findings.path} is damaged: {'; '.join(parts)}. Verify the store to list all of it, "
        "repair it to keep what is sound"
    )


@contextlib.contextmanager
def _one_at_a_time(generation: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        # No such file: the check says so. A file system without such locks: it is checked twice.
        with contextlib.suppress(OSError):
            # A descriptor for reading will do, and LMDB has no lock on this file.
            stack.enter_context(flocked(generation / "data.mdb"))
        yield


def _markers(generation: Path, *, make: bool = False) -> Iterator[tuple[str | Path, bytes]]:
    """Where a generation may be remembered, the best place first, and by which line."""
    try:
        status = os.lstat(f"{generation}/data.mdb")
    except OSError:
        return
    line = f"{_machine()} {status.st_ino}"
    yield f"{generation}/{_MARKER_NAME}", line.encode()
    # Another image may be mounted at this path, and have given its file the same inode.
    commit = hashlib.blake2b(repr(read_commit_record(generation)).encode(), digest_size=8)
    line += f" {status.st_size} {status.st_mtime_ns} {commit.hexdigest()}"
    name = hashlib.blake2b(os.fsencode(generation), digest_size=16).hexdigest()
    with contextlib.suppress(ConfigError, OSError):
        folder = user_cache_folder() / _MARKER_NAME
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        yield folder / name, line.encode()
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"lmdbcache-{os.geteuid()}"
        if make:
            folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        # No other user can have put a marker or a link there.
        if is_own and not status.st_mode & 0o077:
            yield folder / name, line.encode()


def _content(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a third of what Path's own takes
    try:
        return os.read(descriptor, _MAX_ID_BYTES)
    finally:
        os.close(descriptor)


@functools.cache
def _machine() -> str:
    """A digest: the machine's id isn't for others to read."""
    identity = b""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            identity = identity or _content(path).strip()
    # Containers often have no id of their own; the kernel's is the host's, until the next boot.
    identity = identity or (boot_id() or platform.node()).encode("utf-8", "replace")
    return hashlib.blake2b(identity, digest_size=8, person=b"lmdbcache").hexdigest()

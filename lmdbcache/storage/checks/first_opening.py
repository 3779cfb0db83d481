"""The first opening of a store that this machine didn't write: look at all of it before LMDB does.

LMDB trusts its file: damaged pages of a copy would end the process or read wrong. What was found
sound is remembered (`checked_marker`), so that it is looked at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lmdbcache.errors import IntegrityError
from lmdbcache.files import flocked
from lmdbcache.storage.checked_marker import is_known, mark_known
from lmdbcache.storage.checks.checking import Findings, check_generation
from lmdbcache.storage.checks.value_checks import Progress
from lmdbcache.storage.layout import sample_id_of_key

__all__ = ["SKIP_VARIABLE", "check_first_opening"]

_logger: Final = logging.getLogger(__name__)

# "1": open as it is; "values": check LMDB's structure alone.
SKIP_VARIABLE: Final = "LMDBCACHE_SKIP_FIRST_CHECK"
_LONG_BYTES: Final = 1 << 30
_SECONDS_BETWEEN_NEWS: Final = 15.0
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
        raise IntegrityError(_described(findings, generation.parent))
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


def _described(findings: Findings, store: Path) -> str:
    parts = []
    if findings.structure:
        parts.append(findings.structure[0])
    bad = (*findings.damaged, *findings.missing)
    if bad:
        parts.append(f"{len(bad)} damaged embeddings, the first {sample_id_of_key(bad[0])!r}")
    return (
        f"{store} is damaged: {'; '.join(parts)}. Verify the store to list all of it, repair it to "
        "keep what is sound"
    )


@contextlib.contextmanager
def _one_at_a_time(generation: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        # No such file: the check says so. A file system without such locks: it is checked twice.
        with contextlib.suppress(OSError):
            # A descriptor for reading will do, and LMDB has no lock on this file.
            stack.enter_context(flocked(generation / "data.mdb"))
        yield

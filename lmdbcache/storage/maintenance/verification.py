"""`verify`: all that is wrong with a store."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lmdbcache.errors import CacheNotFoundError, ReadOnlyCacheError
from lmdbcache.storage.checks.checking import (
    IntegrityReport,
    check_generation,
    check_values,
    placed_values,
    structure_findings,
)
from lmdbcache.storage.checks.first_opening import is_known, mark_known
from lmdbcache.storage.checks.value_checks import Progress
from lmdbcache.storage.environment import Snapshot, acquire, release
from lmdbcache.storage.forking import no_fork
from lmdbcache.storage.generations import current_generation, write_lock
from lmdbcache.storage.pages.page_file import PageFile


def verify(store: str | Path, progress: Progress | None = None) -> IntegrityReport:
    """Check a store without trusting it: a damaged file can't take the process down.

    LMDB gets to see the file only when its structure is found sound; writers wait until then.

    Args:
        store: The store's folder.
        progress: Called with (values done, values in all).

    Raises:
        CacheNotFoundError: Nothing is stored here.
        IntegrityError: data.mdb is missing, or nothing of it can be read.
        StorageError: It is written to faster than it can be checked, and this user can't make
            its writers wait.
    """
    store = Path(store).absolute()
    _generation(store)
    while True:
        findings = _checked(store, progress)
        if findings is not None:
            return findings


def _checked(store: Path, progress: Progress | None) -> IntegrityReport | None:
    """What is wrong; None if a writer of this process came in between."""
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(contextlib.ExitStack())
        try:
            lock.enter_context(write_lock(store))
        except ReadOnlyCacheError:
            return check_generation(_generation(store), progress=progress)
        generation = _generation(store)
        structure = structure_findings(generation)
        file = stack.enter_context(PageFile(generation / "data.mdb"))
        values = placed_values(file, is_sound=not structure)
        if structure or not is_known(generation):
            findings = check_values(file, values, structure, progress)
            if findings.is_sound:
                mark_known(generation)
            return findings
        environment = acquire(generation)
        stack.callback(release, environment)
        with no_fork:
            snapshot = Snapshot(environment)
        stack.callback(snapshot.end)
        # The snapshot keeps its pages from being used again: writers needn't wait any longer.
        lock.close()
        findings = check_values(file, values, progress=progress)
        is_pinned = snapshot.transaction is not None
        return findings if findings.is_sound or is_pinned else None


def _generation(store: Path) -> Path:
    generation = current_generation(store)
    if generation is None:
        raise CacheNotFoundError(f"nothing is stored in {store}")
    return generation

"""Compaction: copy what is live into a new generation, with readers and writers going on."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lmdb

from lmdbcache.errors import CacheNotFoundError, IntegrityError
from lmdbcache.files import open_file, sync_file
from lmdbcache.storage.checks.first_opening import mark_known
from lmdbcache.storage.checks.value_checks import Progress
from lmdbcache.storage.engine_errors import translated_errors
from lmdbcache.storage.environment import Environment, acquire, acquire_current, release
from lmdbcache.storage.forking import no_fork
from lmdbcache.storage.generations import (
    check_room,
    create_generation,
    current_generation,
    publish_generation,
    remove_other_generations,
    write_lock,
)
from lmdbcache.storage.report import Report

_logger: Final = logging.getLogger(__name__)

_LOCK_FILE_BYTES: Final = 1 << 20
_PROGRESS_SECONDS: Final = 0.1


@dataclass(frozen=True)
class CompactionResult(Report):
    """What a compaction did; sizes in bytes on disk."""

    path: Path
    bytes_before: int
    bytes_after: int
    num_embeddings: int


def compact(store: str | Path, *, progress: Progress | None = None) -> CompactionResult:
    """Rewrite a store without its unused pages.

    Writers wait. Readers go on with the old generation until they refresh; its space is
    given back when the last of them has. Interrupted at any point, by Ctrl-C too, the store is as
    before.

    Args:
        store: The store's folder.
        progress: Called now and then with the bytes copied and the bytes to copy.

    Raises:
        CacheNotFoundError: Nothing is stored here.
        CacheFullError: The disk can't hold the copy.
        IntegrityError: The copy doesn't hold what the store does; the store stays as it is.
    """
    store = Path(store).absolute()
    if current_generation(store) is None:
        raise CacheNotFoundError(f"nothing is stored in {store}")
    with write_lock(store), no_fork, translated_errors(store):
        old = current_generation(store)
        if old is None:
            raise CacheNotFoundError(f"nothing is stored in {store}")
        try:
            environment = acquire(old, write=True)
            try:
                new, num_embeddings = _copy(environment, store, progress)
                publish_generation(store, new)
                before, after = _allocated_bytes(old), _allocated_bytes(new)
            finally:
                release(environment)
        finally:
            _sweep(store)
    _logger.info("compacted %s: %d → %d bytes", store, before, after)
    return CompactionResult(store, before, after, num_embeddings)


def _sweep(store: Path) -> None:
    """Remove the old generation, or half a copy; Ctrl-C comes here as well as anywhere."""
    try:
        remove_other_generations(store)
    except BaseException:
        remove_other_generations(store)
        raise


def plan_compaction(store: str | Path) -> CompactionResult:
    """What `compact` would do, without doing it.

    Raises:
        CacheNotFoundError: Nothing is stored here.
        IntegrityError: The store is damaged.
    """
    store = Path(store).absolute()
    environment = acquire_current(store)
    try:
        with no_fork, translated_errors(store):
            snapshot = environment.begin_read()
            live = _live_bytes(environment, snapshot)
            num_embeddings = _count(environment, snapshot)[1] - 1
            del snapshot
        before = _allocated_bytes(environment.generation)
        data_bytes = (environment.generation / "data.mdb").stat().st_blocks * 512
        after = before - data_bytes + min(data_bytes, live)
        return CompactionResult(store, before, after, num_embeddings)
    finally:
        release(environment)


def _copy(environment: Environment, store: Path, progress: Progress | None) -> tuple[Path, int]:
    # A writer killed between its meta page and the lock file leaves the two in disagreement;
    # an empty write transaction mends that.
    environment.begin_write().abort()
    snapshot = environment.begin_read()
    environment.read_metadata(snapshot)  # what isn't a sound store is never copied over one
    entries = _count(environment, snapshot)
    size = _live_bytes(environment, snapshot)
    check_room(store, size + _LOCK_FILE_BYTES, "compaction")
    new = create_generation(store)
    _copy_pages(environment, snapshot, new / "data.mdb", progress or (lambda *_: None), size)
    times = (environment.generation / "data.mdb").stat()
    os.utime(new / "data.mdb", ns=(times.st_atime_ns, times.st_mtime_ns))  # nothing was added
    sync_file(new / "data.mdb")
    mark_known(new)
    copy = acquire(new)
    try:
        copied = _count(copy, copy.begin_read())
    finally:
        release(copy)
    if copied != entries:
        raise IntegrityError(
            f"{store}: the compacted copy has {copied} entries of {entries}. The store was left "
            "as it is; verify it"
        )
    return new, entries[1] - 1


def _copy_pages(
    environment: Environment,
    snapshot: lmdb.Transaction,
    path: Path,
    progress: Progress,
    size: int,
) -> None:
    """Let LMDB copy in a thread: its one long call reports nothing and can't be interrupted."""
    failures: list[Exception] = []

    def copy() -> None:
        try:
            environment.env.copyfd(target, compact=True, txn=snapshot)
        except (lmdb.Error, OSError) as error:
            failures.append(error)

    target = open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    thread = threading.Thread(target=copy, name="lmdbcache-compaction")
    try:
        thread.start()
        try:
            while thread.is_alive():
                thread.join(_PROGRESS_SECONDS)
                progress(min(os.fstat(target).st_size, size), size)
        except BaseException:
            _refuse_writes(target)
            raise
        finally:
            thread.join()
    finally:
        os.close(target)
    if failures:
        raise failures[0]


def _refuse_writes(descriptor: int) -> None:
    """Let the next write through this descriptor fail; closing it could hit another's number."""
    unwritable = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.dup2(unwritable, descriptor, inheritable=False)
    finally:
        os.close(unwritable)


def _live_bytes(environment: Environment, transaction: lmdb.Transaction) -> int:
    """Size of a data.mdb that holds just the live pages: two meta pages and both trees."""
    pages = 2
    for database in (None, environment.checksums):
        stat = transaction.stat(database) if database else transaction.stat()
        pages += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
    return int(pages * stat["psize"])


def _count(environment: Environment, transaction: object) -> tuple[int, int]:
    """Entries of the main database and of the checksums, in one transaction."""
    stat = transaction.stat  # type: ignore[attr-defined]
    return int(stat()["entries"]), int(stat(environment.checksums)["entries"])


def _allocated_bytes(generation: Path) -> int:
    return sum(file.lstat().st_blocks * 512 for file in generation.iterdir())

"""Compaction: copy what is live into a new generation, beside readers and writers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lmdbcache.errors import CacheNotFoundError, IntegrityError
from lmdbcache.storage.checked_marker import mark_known
from lmdbcache.storage.engine_errors import translated_errors
from lmdbcache.storage.environment import Environment, acquire, release
from lmdbcache.storage.forking import no_fork
from lmdbcache.storage.generations import (
    check_room,
    create_generation,
    current_generation,
    publish_generation,
    remove_other_generations,
    sync_file,
    write_lock,
)

__all__ = ["CompactionResult", "compact"]

_logger: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompactionResult:
    """What a compaction did; sizes in bytes on disk."""

    path: Path
    bytes_before: int
    bytes_after: int
    num_embeddings: int


def compact(store: str | Path) -> CompactionResult:
    """Rewrite a store without its unused pages.

    Writers wait meanwhile. Readers go on with the old generation until they refresh; its space is
    given back when the last of them has. Interrupted at any point, the store is as before.

    Raises:
        CacheNotFoundError: Nothing is stored here.
        CacheFullError: The disk can't hold the copy.
        IntegrityError: The copy doesn't hold what the store does; the store stays as it is.
    """
    store = Path(store).absolute()
    if current_generation(store) is None:
        raise CacheNotFoundError(f"nothing is stored in {store}")
    with write_lock(store), no_fork:
        old = current_generation(store)
        if old is None:
            raise CacheNotFoundError(f"nothing is stored in {store}")
        environment = acquire(old, write=True)
        try:
            new, num_embeddings = _copy(environment, store)
            publish_generation(store, new)
        finally:
            release(environment)
        before, after = _allocated_bytes(old), _allocated_bytes(new)
        remove_other_generations(store)
    _logger.info("compacted %s: %d → %d bytes", store, before, after)
    return CompactionResult(store, before, after, num_embeddings)


def _copy(environment: Environment, store: Path) -> tuple[Path, int]:
    with translated_errors(store):
        # A writer killed between its meta page and the lock file leaves the two in disagreement;
        # an empty write transaction mends that.
        environment.begin_write().abort()
        snapshot = environment.begin_read()
        entries = _count(environment, snapshot)
        info = environment.env.info()
        needed = (info["last_pgno"] + 1) * environment.env.stat()["psize"]
        check_room(store, needed, "compaction")
        new = create_generation(store)
        environment.env.copy(str(new), compact=True, txn=snapshot)
    sync_file(new / "data.mdb")
    mark_known(new)
    copy = acquire(new)
    try:
        with translated_errors(store):
            copied = _count(copy, copy.begin_read())
    finally:
        release(copy)
    if copied != entries:
        raise IntegrityError(
            f"{store}: the compacted copy has {copied} entries of {entries}. The store was left "
            "as it is; run `lmdbcache verify`"
        )
    return new, entries[1] - 1


def _count(environment: Environment, transaction: object) -> tuple[int, int]:
    """Entries of the main database and of the checksums, in one transaction."""
    stat = transaction.stat  # type: ignore[attr-defined]
    return int(stat()["entries"]), int(stat(environment.checksums)["entries"])


def _allocated_bytes(generation: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in generation.iterdir())

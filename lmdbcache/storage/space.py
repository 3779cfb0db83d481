"""How a store's file is used: what writers may reuse, and what old snapshots keep from them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import lmdb

from lmdbcache.storage.environment import Snapshot
from lmdbcache.storage.gather import MappedFile
from lmdbcache.storage.pages.pages import UnreadablePagesError, read_free_pages
from lmdbcache.storage.reader_slots import slots


@dataclass(frozen=True)
class SpaceUse:
    """Unused pages of a store's file and the snapshots held of it.

    Args:
        free_bytes: Unused by the newest commit; a compaction gives them back.
        pinned_bytes: Those of them that writers can't reuse, because a process reads an old
            snapshot.
        readers: Process id → how many commits its oldest snapshot is behind the newest.
    """

    free_bytes: int = 0
    pinned_bytes: int = 0
    readers: Mapping[int, int] = field(default_factory=dict)


def space_use(snapshot: Snapshot, transaction: lmdb.Transaction) -> SpaceUse:
    """How the file of a pinned snapshot is used; its lock is held."""
    environment = snapshot.environment.env
    oldest: dict[int, int] = {}
    for process, held in slots(environment):
        oldest[process] = min(held, oldest.get(process, held))
    readers = {process: max(0, snapshot.id - held) for process, held in oldest.items()}
    free = pinned = 0
    # Two newer commits since: the figures are left at 0, the next look has them.
    with contextlib.suppress(UnreadablePagesError, OSError, ValueError):
        file = MappedFile(snapshot.environment.generation / "data.mdb")
        if file.file_id != snapshot.environment.file:
            return SpaceUse(readers=readers)
        transactions, counts = read_free_pages(file.data, snapshot.id)
        page_size = int(transaction.stat()["psize"])
        free = int(counts.sum()) * page_size
        # What the newest commit has freed serves the one before it; nobody is to blame for that.
        kept = (transactions >= min(oldest.values(), default=snapshot.id)) & (
            transactions < snapshot.id
        )
        pinned = int(counts[kept].sum()) * page_size
    return SpaceUse(free, pinned, readers)

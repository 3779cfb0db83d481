"""Which stores under a root may go: too old, unused, empty, damaged, or too much in all."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Final

from lmdbcache.cache.embedding_cache import EmbeddingCache
from lmdbcache.cache.records import RECORD_FILES
from lmdbcache.cache.store_info import StoreInfo, users_of
from lmdbcache.errors import CacheNotFoundError, StorageError
from lmdbcache.storage import (
    Leftover,
    Report,
    find_leftovers,
    remove_leftovers,
    writers_of,
)

_LONG_AGO: Final = datetime.fromtimestamp(0, timezone.utc)


@dataclass(frozen=True)
class PrunePolicy:
    """The conditions under which a store is removed.

    Of the ages given both must hold, and of the kinds given (`empty`, `damaged`) one: each further
    age, and kinds in addition to ages, select fewer stores. The size is looked at after that.

    Args:
        written_before: The newest commit is older.
        used_before: Neither read nor written since.
        empty: Stores without embeddings.
        damaged: Damaged stores; not those that can't be opened for another reason.
        max_bytes: What all stores together may take; over that, those unused for longest go.
    """

    written_before: datetime | None = None
    used_before: datetime | None = None
    empty: bool = False
    damaged: bool = False
    max_bytes: int | None = None

    def reason(self, store: StoreInfo) -> str | None:
        """Return why this store goes, sizes aside; None if it stays."""
        kinds = [
            kind
            for kind, wanted, holds in (
                ("empty", self.empty, store.damage is None and store.num_embeddings == 0),
                ("damaged", self.damaged, store.is_damaged),
            )
            if wanted and holds
        ]
        if (self.empty or self.damaged) and not kinds:
            return None
        reasons = list(kinds)
        for limit, time, verb in (
            (self.written_before, store.last_written, "written"),
            (self.used_before, store.last_touched, "used"),
        ):
            if limit is not None:
                if time is None or time >= limit:
                    return None
                reasons.append(f"last {verb} {time.astimezone():%Y-%m-%d %H:%M}")
        return ", ".join(reasons) or None


@dataclass(frozen=True)
class Verdict:
    """One store, and why it goes or stays."""

    store: StoreInfo
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return the store's values and the reason, for JSON."""
        return {**self.store.to_dict(), "reason": self.reason}


@dataclass(frozen=True)
class PrunePlan(Report):
    """The stores under a root that a policy removes.

    Args:
        removed: Stores to remove, or removed.
        kept: Stores that the policy would remove and another process uses.
        bytes_left: What the remaining stores take.
    """

    derived: ClassVar = ("bytes_freed",)

    removed: tuple[Verdict, ...]
    kept: tuple[Verdict, ...]
    bytes_left: int

    @property
    def bytes_freed(self) -> int:
        """What the removed stores take, or took."""
        return sum(verdict.store.size_bytes for verdict in self.removed)


def plan_pruning(cache: EmbeddingCache, policy: PrunePolicy, *, force: bool = False) -> PrunePlan:
    """Return what would be removed; nothing is.

    Args:
        cache: The root.
        policy: The conditions.
        force: Take stores that are in use as well.
    """
    stores = cache.stores()
    removed: dict[Path, Verdict] = {}
    kept: dict[Path, Verdict] = {}

    def judge(store: StoreInfo, reason: str) -> None:
        user = None if force else _use_of(store)
        verdicts, text = (removed, reason) if user is None else (kept, user)
        verdicts[store.path] = Verdict(store, text)

    for store in stores:
        if reason := policy.reason(store):
            judge(store, reason)
    left = sum(store.size_bytes for store in stores if store.path not in removed)
    if policy.max_bytes is not None:
        rest = [store for store in stores if store.path not in removed and store.path not in kept]
        for store in sorted(rest, key=lambda store: store.last_touched or _LONG_AGO):
            if left <= policy.max_bytes:
                break
            judge(store, "over the size in all, unused for longest")
            left -= store.size_bytes if store.path in removed else 0
    return PrunePlan(tuple(removed.values()), tuple(kept.values()), left)


def prune(cache: EmbeddingCache, plan: PrunePlan, *, force: bool = False) -> PrunePlan:
    """Remove what a plan says, but for what was used since.

    Returns:
        What was removed and what was kept.
    """
    removed, kept, left = [], list(plan.kept), plan.bytes_left
    for verdict in plan.removed:
        store = verdict.store
        try:
            gone = cache.remove(store, unless_used=not force)
        except CacheNotFoundError:
            continue  # another process has removed it
        except StorageError as error:
            kept.append(Verdict(store, str(error)))
            left += store.size_bytes
        else:
            removed.append(Verdict(gone, verdict.reason))
    return PrunePlan(tuple(removed), tuple(kept), left)


def leftovers_under(root: Path, *, remove: bool = False) -> list[Leftover]:
    """Return what crashes have left in the folders under a root.

    Args:
        root: The cache directory.
        remove: Remove it, but for stores that a process writes to now; returns what was removed.
    """
    try:
        folders = sorted(child for child in root.iterdir() if child.is_dir())
    except OSError:
        return []
    found = []
    for folder in folders:
        try:
            look = remove_leftovers if remove else find_leftovers
            found += look(folder, RECORD_FILES)
        except StorageError:  # a process writes there
            if not remove:
                raise
    return found


def _use_of(store: StoreInfo) -> str | None:
    """Return how other processes use the store now, in words; None if none does."""
    if writers := writers_of(store.path):
        return f"being written to by {', '.join(writers)}"
    if users := users_of(store):
        return f"in use by {', '.join(users)}"
    return None

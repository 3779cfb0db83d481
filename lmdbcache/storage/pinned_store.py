"""One reader's hold on a snapshot: pinned at the first read, moved on, given back."""

from __future__ import annotations

import contextlib
import json
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError, CacheNotFoundError
from lmdbcache.storage.engine_errors import raise_translated
from lmdbcache.storage.environment import Environment, Holder, Snapshot, acquire_current, release
from lmdbcache.storage.forking import no_fork, process_id
from lmdbcache.storage.generations import current_generation
from lmdbcache.storage.statistics import family, join_family

__all__ = ["PinnedStore", "reduce_for_child"]

_T = TypeVar("_T")


class PinnedStore:
    """What a reader needs of its store: the newest snapshot, in whatever process it finds itself.

    Args:
        store: The store's folder.
        config: Refuse the store if it was written for another config; None takes what is there.
    """

    def __init__(self, store: str | Path, config: CacheConfig | None = None) -> None:
        self._store = Path(store).absolute()
        self._expected_config = config
        self._reset()

    def _reset(self) -> None:
        self._process_id = process_id()
        self._pin_lock = threading.RLock()
        self._snapshot: Snapshot | None = None
        self._holder = Holder(self)

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._store

    def refresh(self) -> bool:
        """Move to the newest commit.

        Returns:
            Whether there was a newer one.

        Raises:
            CacheNotFoundError: The store has been cleared.
        """
        snapshot = self.pinned()
        snapshot.environment.check_whole()
        live = snapshot.environment.is_live(current_generation(self._store))
        if live and snapshot.num_newer_commits() == 0:
            return False
        self._pin(instead_of=snapshot)
        return True

    def close(self) -> None:
        """Give back the snapshot and the environment. Reading again opens them again."""
        if self._process_id != process_id():
            self._reset()
        with self._pin_lock:
            if self._snapshot is not None:
                self._snapshot.end()
                self._snapshot = None
            self._holder.drop()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # Text: what equals pickles to equal bytes, in every process, which some use as a cache key.
        config = self._expected_config
        fields = None if config is None else json.dumps(config.to_dict())
        return {"store": str(self._store), "config": fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fields = state["config"]
        config = None if fields is None else CacheConfig.from_dict(json.loads(fields))
        PinnedStore.__init__(self, state["store"], config)

    def pinned(self) -> Snapshot:
        """Return the snapshot to read, pinned now if it isn't yet."""
        no_fork.wait_for_fork()
        snapshot = self._snapshot
        if snapshot is not None and snapshot.transaction and not snapshot.may_be_overwritten():
            return snapshot
        return self._pin(instead_of=snapshot)

    def _pin(self, instead_of: Snapshot | None) -> Snapshot:
        if self._process_id != process_id():
            self._reset()  # a lock or snapshot inherited over a fork is the parent's
            instead_of = None
        with self._pin_lock, no_fork:
            if self._snapshot is not None and self._snapshot is not instead_of:
                return self._snapshot  # another thread was faster
            environment, snapshot = self._newest()
            if self._snapshot is not None:
                self._snapshot.end()
            self._snapshot = snapshot
            self._holder.take(environment)
            return snapshot

    def _newest(self) -> tuple[Environment, Snapshot]:
        while True:
            environment = acquire_current(self._store)
            try:
                snapshot = Snapshot(environment)
                snapshot.metadata.check_config(self._expected_config, self._store)
            except BaseException as error:
                release(environment)
                # A compaction may have removed it meanwhile.
                moved = not environment.is_live(current_generation(self._store))
                if not (moved and isinstance(error, CacheError)):
                    raise
            else:
                return environment, snapshot

    def read_pinned(
        self,
        read: Callable[[Snapshot, lmdb.Transaction], _T],
        is_miss: Callable[[_T], bool] | None = None,
    ) -> _T:
        """Call `read` under a pinned snapshot; after a miss, again under the newest."""
        while True:
            snapshot = self.pinned()
            with snapshot.lock:
                transaction = snapshot.transaction
                if transaction is None:  # ended between the two lines, by another thread
                    continue
                try:
                    found = read(snapshot, transaction)
                except BaseException as error:  # noqa: BLE001 - raised again below
                    # Whoever keeps the error must not keep the transaction and its slot.
                    traceback.clear_frames(error.__traceback__)
                    transaction = None
                    raise_translated(error, self._store)
                finally:
                    transaction = None
            if snapshot.may_be_overwritten():
                continue
            if is_miss is None or not is_miss(found) or not self._newer_than(snapshot):
                return found

    def _newer_than(self, snapshot: Snapshot) -> bool:
        if self._snapshot is not snapshot:
            return True
        # A store that was cleared is no reason to fail here: its samples are missing.
        with contextlib.suppress(CacheNotFoundError):
            if self.refresh():
                newest = self.pinned()
                # The commits of a cleared and remade store count from one again.
                return (newest.environment, newest.id) != (snapshot.environment, snapshot.id)
        return False


def reduce_for_child(reader: PinnedStore) -> tuple[Any, ...]:
    """How multiprocessing pickles a reader: with the place where the child's reads count."""
    return _in_child, (type(reader), reader.__getstate__(), family())


def _in_child(kind: type[PinnedStore], state: dict[str, Any], folder: str | None) -> PinnedStore:
    join_family(folder)
    reader = kind.__new__(kind)
    reader.__setstate__(state)
    return reader

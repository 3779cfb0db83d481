"""The LMDB environments that this process has open, and the snapshots pinned in them.

LMDB wants one environment per file and process; py-lmdb refuses a second one, and a forked child
inherits that refusal. So every reader and writer here shares one `Environment` per generation.

A forked child must not close what it inherited: LMDB's close clears the reader slots that carry
the *parent's* pid, and the parent's pinned snapshots are then no longer protected from reuse of
their pages. It drops its references instead (py-lmdb then leaves the inherited transactions alone)
and opens its own. The references of other threads would outlive them in the child, so a fork waits
until no thread is inside LMDB.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final, TypeVar

import lmdb

from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError, CacheNotFoundError, IntegrityError, StorageError
from lmdbcache.storage.checks.first_opening import check_first_opening
from lmdbcache.storage.engine_errors import LOSS_REMEDY, translated_errors
from lmdbcache.storage.forking import no_fork, process_id
from lmdbcache.storage.generations import current_generation
from lmdbcache.storage.layout import CHECKSUMS_NAME, METADATA_KEY
from lmdbcache.storage.metadata import StoreMetadata, checksum
from lmdbcache.storage.opening import check_still_whole, data_status, file_id, open_environment

_logger: Final = logging.getLogger(__name__)
_T = TypeVar("_T")


class Environment:
    """One generation's LMDB environment in this process. Use `acquire` and `release`.

    Read-only until a writer of this process needs it: a read-only environment opens the
    checksums database without waiting for the write lock of other processes.
    """

    def __init__(self, generation: Path, *, write: bool, create: bool) -> None:
        self.generation = generation
        self.users = 0
        self.process_id = process_id()
        self.snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self.writable = write
        self.is_open = True
        # The newest record that was read, and what it says; replaced as one, as threads read it.
        self._unpacked: tuple[bytes, StoreMetadata] | None = None
        if not create:
            check_first_opening(generation)
        self.env: lmdb.Environment = open_environment(generation, write=write, create=create)
        self.checksums: Any = None
        try:
            if not create:
                self._open_checksums()
            status = data_status(generation)
            if status is None:
                raise IntegrityError(f"{generation / 'data.mdb'} was removed while it was opened")
            self.file = status.st_dev, status.st_ino
            self._size = status.st_size  # when last looked at
        except BaseException:
            self.env.close()
            raise

    def is_live(self, generation: Path | None) -> bool:
        """Whether this is that generation, and not one of the same name that was cleared."""
        return generation is not None and file_id(generation) == self.file

    def check_whole(self) -> None:
        """Notice that something has truncated the file: LMDB would die of SIGBUS.

        Raises:
            IntegrityError: It has become shorter.
        """
        with no_fork, _lock:
            if self.is_open:
                self._size = check_still_whole(self.env, self.generation, self.file, self._size)

    def _open_checksums(self) -> None:
        with contextlib.suppress(lmdb.NotFoundError, lmdb.ReadonlyError):
            self.checksums = self._with_slot(lambda: self.env.open_db(CHECKSUMS_NAME, create=False))

    def create_databases(self, transaction: lmdb.Transaction) -> None:
        """Create the named database in a new environment."""
        self.checksums = self.env.open_db(CHECKSUMS_NAME, txn=transaction)

    def make_writable(self) -> None:
        """Open again for writing; readers in this process pin a new snapshot at their next read."""
        with no_fork, _lock, translated_errors(self.generation):
            if self.writable and self.is_open:
                return
            try:
                self._reopen(write=True)
            finally:
                if not self.writable:  # its readers go on
                    self._reopen(write=False)

    def grow(self) -> None:
        """Open again with twice the map; readers in this process pin a new snapshot.

        Not `set_mapsize`: that turns the addresses of living snapshots into SIGBUS, and leaves an
        environment without a map behind where the address space is used up.
        """
        with no_fork, _lock, translated_errors(self.generation):
            before = int(self.env.info()["map_size"])
            self._reopen(write=self.writable, min_map_size=2 * before)
            after = int(self.env.info()["map_size"])
            _logger.debug("%s: a map of %d bytes instead of %d", self.generation, after, before)
            if after <= before:
                raise StorageError(
                    f"{self.generation}: no address space for a map above {before >> 20} MiB. "
                    "Raise `ulimit -v`, or close readers of other stores, and commit again"
                )

    def _reopen(self, *, write: bool, min_map_size: int = 0) -> None:
        self.drop_snapshots()
        self.is_open = False
        self.env.close()
        self.env = open_environment(
            self.generation, write=write, create=False, min_map_size=min_map_size
        )
        self._open_checksums()
        self.is_open, self.writable = True, write

    def begin_read(self) -> lmdb.Transaction:
        """A read transaction on the newest commit, whatever others did to map or slots."""
        if not self.is_open and self.users:  # there was no address space the last time
            self._reopen(write=self.writable)
        try:
            return self._with_slot(lambda: self.env.begin(buffers=True))
        except lmdb.MapResizedError:
            # Another process has made the file larger than our map.
            self._reopen(write=self.writable)
        return self._with_slot(lambda: self.env.begin(buffers=True))

    def _with_slot(self, begin: Callable[[], _T]) -> _T:
        """Call what takes a reader slot; again without the dead readers if there is none."""
        try:
            return begin()
        except lmdb.ReadersFullError:
            _logger.info("%s: reader table full, clearing dead readers", self.generation)
            gc.collect()
            self.env.reader_check()
        return begin()

    def begin_write(self) -> lmdb.Transaction:
        """A write transaction, whatever others did to the map. Hold the store's writer lock."""
        with _lock:
            if not self.is_open and self.users:
                self._reopen(write=True)
            try:
                return self.env.begin(write=True)
            except lmdb.MapResizedError:
                self._reopen(write=True)
                return self.env.begin(write=True)

    def newest_metadata(self) -> StoreMetadata:
        """The metadata record of the newest commit."""
        with no_fork, _lock, translated_errors(self.generation):
            return self.read_metadata(self.begin_read())

    def read_metadata(
        self, transaction: lmdb.Transaction, expected_config: CacheConfig | None = None
    ) -> StoreMetadata:
        """The metadata record, compared with its checksum.

        Args:
            transaction: Where to read.
            expected_config: See `StoreMetadata.unpack`.

        Raises:
            IntegrityError: Missing or damaged.
        """
        record = transaction.get(METADATA_KEY)
        if record is None or self.checksums is None:
            raise IntegrityError(
                f"{self.generation} is an LMDB environment but not a store of lmdbcache "
                "(no metadata). Move it away and extract again"
            )
        expected = transaction.get(METADATA_KEY, db=self.checksums)
        if expected is None or bytes(expected) != checksum(METADATA_KEY, record):
            raise IntegrityError(
                f"{self.generation}: the metadata record is damaged. {LOSS_REMEDY}"
            )
        known = self._unpacked
        if known is None or known[0] != record:
            packed = bytes(record)
            known = packed, StoreMetadata.unpack(packed, self.generation, expected_config)
            self._unpacked = known
        return known[1]

    def stored(self, keys: Collection[bytes]) -> set[bytes]:
        """Those of the keys that the newest commit has."""
        with no_fork, _lock, translated_errors(self.generation):
            transaction, checksums = self.begin_read(), self.checksums
            # A store that is filled in order has none of them.
            if not keys or min(keys) > last_key(transaction, checksums):
                return set()
            get = transaction.get
            return {key for key in keys if get(key, db=checksums) is not None}

    def drop_snapshots(self) -> None:
        """End every snapshot; their owners pin a new one at the next read."""
        for snapshot in list(self.snapshots):
            snapshot.end()

    def close(self) -> None:
        """Close; only ever in the process that opened it."""
        self.drop_snapshots()
        self.is_open = False
        self.env.close()


class Snapshot:
    """A pinned read transaction. Reads through it hold `lock`; `transaction` is None once ended."""

    def __init__(
        self, environment: Environment, expected_config: CacheConfig | None = None
    ) -> None:
        self.environment = environment
        self.lock = threading.Lock()
        self.transaction: lmdb.Transaction | None = None
        # Where its values lie, once somebody has found out (`value_table`).
        self.values: Any = None
        self.is_unlocatable = False
        # The same with their checksums (`verified_reads.prepare`).
        self.verified: Any = None
        with _lock, translated_errors(environment.generation):
            transaction = environment.begin_read()
            self.metadata = environment.read_metadata(transaction, expected_config)
            self.id: int = transaction.id()
            self.is_protected = bool(environment.env.flags()["lock"])
            self.transaction = transaction
            environment.snapshots.add(self)

    def num_newer_commits(self) -> int:
        """How many commits this generation has seen since."""
        try:
            with no_fork:
                return int(self.environment.env.info()["last_txnid"]) - self.id
        except lmdb.Error:
            return 1

    def may_be_overwritten(self) -> bool:
        """Whether writers may have reused pages of this snapshot.

        Without the lock file nothing holds them back, and they reuse what the last commit but one
        has freed.
        """
        return not self.is_protected and self.num_newer_commits() > 1

    def end(self) -> None:
        """Give the reader slot back: the transaction's last reference must go as well."""
        with self.lock:
            if self.transaction is not None:
                self.transaction.abort()
                self.transaction = None
                self.values = self.verified = None


_environments: dict[tuple[int, int] | None, Environment] = {}
_abandoned: deque[Environment] = deque()
_lock = threading.RLock()
_locked_for_fork: list[Snapshot] = []


def last_key(transaction: lmdb.Transaction, database: Any) -> bytes:
    """Return the greatest key of a database; empty where it has none."""
    with transaction.cursor(db=database) as cursor:
        return bytes(cursor.key()) if cursor.last() else b""


def acquire(generation: Path, *, write: bool = False, create: bool = False) -> Environment:
    """This process's environment of a generation, opened if need be. Pair with `release`.

    Args:
        generation: The generation's folder.
        write: For write transactions.
        create: Make a new environment in this empty folder.

    Raises:
        IntegrityError: The files are truncated or not ours.
        StorageError: LMDB can't open them.
    """
    with no_fork, _lock, translated_errors(generation):
        # By file, not by path: a cleared and remade generation has the same name, and one
        # generation has several through links.
        environment = None if create else _environments.get(file_id(generation))
        if environment is None:
            environment = Environment(generation, write=write, create=create)
            _environments[environment.file] = environment
        elif write:
            environment.make_writable()
        else:
            environment.check_whole()
        environment.users += 1
        return environment


def acquire_current(store: Path) -> Environment:
    """This process's environment of the live generation.

    Raises:
        CacheNotFoundError: Nothing is stored here.
        IntegrityError, StorageError: See `acquire`.
    """
    generation = current_generation(store)
    while generation is not None:
        try:
            return acquire(generation)
        except (CacheError, OSError):
            # A compaction may have removed it after we read its name.
            newer = current_generation(store)
            if newer == generation:
                raise
            generation = newer
    raise CacheNotFoundError(f"nothing is stored in {store}")


def release(environment: Environment) -> None:
    """Give back what `acquire` returned; the last user closes it."""
    if environment.process_id != process_id():
        return  # inherited over a fork
    with no_fork, _lock:
        environment.users -= 1
        if environment.users == 0:
            if _environments.get(environment.file) is environment:
                del _environments[environment.file]
            environment.close()


class Holder:
    """The environment that one reader or writer has acquired; given back with its owner."""

    def __init__(self, owner: object) -> None:
        self.environment: Environment | None = None
        weakref.finalize(owner, self._abandon)

    def take(self, environment: Environment) -> None:
        """Hold this one instead of another."""
        self.drop()
        self.environment = environment

    def drop(self) -> None:
        """Give back what is held."""
        environment, self.environment = self.environment, None
        if environment is not None:
            release(environment)

    def _abandon(self) -> None:
        # The garbage collector calls this anywhere, in the middle of `acquire`, too: never wait.
        environment, self.environment = self.environment, None
        if environment is not None:
            _abandoned.append(environment)
        _release_abandoned()


def _release_abandoned() -> None:
    if _abandoned and no_fork.depth == 0 and no_fork.enter(wait=False):
        try:
            if _lock.acquire(blocking=False):
                try:
                    while _abandoned:
                        release(_abandoned.popleft())
                finally:
                    _lock.release()
        finally:
            no_fork.leave()


no_fork.on_leave = _release_abandoned


def _before_fork() -> None:
    no_fork.close()
    for environment in list(_environments.values()):
        for snapshot in list(environment.snapshots):
            snapshot.lock.acquire()
            _locked_for_fork.append(snapshot)


def _after_fork_in_parent() -> None:
    while _locked_for_fork:
        _locked_for_fork.pop().lock.release()
    no_fork.open()


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 - module state of one process
    _lock = threading.RLock()
    _locked_for_fork.clear()
    _abandoned.clear()
    for environment in _environments.values():
        for snapshot in list(environment.snapshots):
            snapshot.transaction = snapshot.values = snapshot.verified = None
        del environment.env, environment.checksums
    _environments.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)

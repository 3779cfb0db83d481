"""One commit to a store: take turns, find the live generation, one write transaction."""

from __future__ import annotations

import contextlib
import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import lmdb
import numpy as np
import numpy.typing as npt

from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheNotFoundError, DuplicateSampleError
from lmdbcache.storage.engine_errors import translated_errors
from lmdbcache.storage.environment import Environment, Holder, acquire, acquire_current
from lmdbcache.storage.filesystems import check_local_for_writing
from lmdbcache.storage.forking import no_fork
from lmdbcache.storage.generations import (
    RESERVE_BYTES,
    check_room,
    create_generation,
    current_generation,
    publish_generation,
    write_lock,
)
from lmdbcache.storage.layout import METADATA_KEY, sample_id_of_key
from lmdbcache.storage.metadata import StoreMetadata, checksum
from lmdbcache.storage.pages.commit_record import record_commit
from lmdbcache.storage.values import check_shape
from lmdbcache.storage.writing.pending import PendingEmbeddings

__all__ = ["BeforeCommit", "Committer"]

_COMMITS_PER_READER_CHECK: Final = 64
_logger: Final = logging.getLogger(__name__)
Shape = tuple[int | None, ...]
# Sample id → checksums of the embedding that is replaced, if there is one, and of the new one.
BeforeCommit = Callable[[Mapping[str, tuple[bytes | None, bytes]]], None]


class Committer:
    """Commits to one store, whichever generation is live and whoever else writes.

    Used by one thread at a time, but for `stored`.

    Args:
        store: The store's folder.
        config: The store's identity.
        on_duplicate: See `EmbeddingWriter`.
        provenance: See `EmbeddingWriter`.
        without_provenance: See `EmbeddingWriter`.
        dataset_root: Kept in the metadata of a new store.
        replaced: Keys that are overwritten whatever `on_duplicate` says.
        before_commit: See `EmbeddingWriter`.
    """

    def __init__(
        self,
        store: Path,
        config: CacheConfig,
        *,
        on_duplicate: str,
        provenance: Mapping[str, str],
        without_provenance: bool = False,
        dataset_root: str,
        replaced: Collection[bytes] = frozenset(),
        before_commit: BeforeCommit | None = None,
    ) -> None:
        check_local_for_writing(store)
        self.store = store
        self._config = config
        self._on_duplicate = on_duplicate
        self._overwrites = on_duplicate == "overwrite" or bool(replaced)
        self._replaced = replaced
        self._provenance = dict(provenance)
        self._without_provenance = without_provenance
        self._known: StoreMetadata | None = None
        self._dataset_root = dataset_root
        self._before_commit = before_commit
        self._num_commits = 0
        # Shape of the embeddings that are stored; None while there are none.
        self.embedding_shape: Shape | None = None
        self._environment_lock = threading.Lock()
        self._is_writing = False
        self._holder = Holder(self)
        StoreMetadata.new(config, dataset_root).with_provenance(self._provenance, "").pack()
        with contextlib.suppress(CacheNotFoundError), no_fork:
            self._adopt(acquire_current(store))

    def check_stated(self) -> None:
        """Refuse early what `commit` would refuse: embeddings of unstated weights.

        Raises:
            ProvenanceMismatchError: See `EmbeddingWriter`.
        """
        if self._known is not None and not self._without_provenance:
            self._known.check_stated(self._provenance, self.store)

    def stored(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys that the newest commit has; from any thread."""
        # In the order of `commit`, or a fork by a third thread would stop all three.
        with no_fork, self._environment_lock:
            found = self._stored(keys)
            if found and not self._is_writing and not self._is_live():
                # Cleared or compacted since: only the live generation tells.
                self._holder.drop()
                with contextlib.suppress(CacheNotFoundError):
                    self._adopt(acquire_current(self.store))
                found = self._stored(keys)
            return found

    def _stored(self, keys: Sequence[bytes]) -> set[bytes]:
        environment = self._holder.environment
        return set() if environment is None else environment.stored(keys)

    def _is_live(self) -> bool:
        environment = self._holder.environment
        return environment is not None and environment.is_live(current_generation(self.store))

    def commit(self, pending: PendingEmbeddings, shape: Shape | None) -> int:
        """Write all of them in one transaction; durable when this returns.

        Args:
            pending: What to write; those that turn out to be stored are dropped from it, if that
                is an error.
            shape: Shape of the embeddings, if the store is new.

        Returns:
            The number of embeddings written.

        Raises:
            CacheFullError, DuplicateSampleError, ProvenanceMismatchError: See
                `EmbeddingWriter.commit`.
        """
        needed = 2 * pending.num_bytes + RESERVE_BYTES
        with write_lock(self.store), no_fork:
            return self._write_with_room(
                lambda environment: self._write(environment, pending, shape), needed, "this commit"
            )

    def remove(self, keys: Iterable[bytes]) -> int:
        """Remove embeddings with their checksums in one transaction; durable when this returns.

        Args:
            keys: Those that aren't stored are passed over.

        Returns:
            The number of embeddings removed.

        Raises:
            CacheFullError: No room for the pages that change; nothing was removed.
        """
        keys = sorted(keys)
        if current_generation(self.store) is None or not keys:
            return 0  # nothing to remove is no reason to make a folder
        with write_lock(self.store), no_fork:
            if current_generation(self.store) is None:
                return 0
            return self._write_with_room(
                lambda environment: self._remove(environment, keys), RESERVE_BYTES, "removal"
            )

    def close(self) -> None:
        """Give back the environment."""
        with no_fork, self._environment_lock:
            self._holder.drop()

    # ---- the transaction

    def _write_with_room(
        self, write: Callable[[Environment], int], needed: int, purpose: str
    ) -> int:
        """What one write transaction gives. Under the writer lock."""
        try:
            with translated_errors(self.store, needed):
                # First: LMDB dies of SIGBUS where the disk has no room for its lock file.
                check_room(self.store, needed, purpose)
                with self._environment_lock:
                    environment = self._attach()
                    self._is_writing = True
                while True:
                    try:
                        number = write(environment)
                        break
                    except lmdb.MapFullError:
                        environment.grow()
        finally:
            self._is_writing = False
        self._num_commits += 1
        return number

    def _write(
        self, environment: Environment, pending: PendingEmbeddings, shape: Shape | None
    ) -> int:
        # One thread begins and commits: LMDB's write lock belongs to the thread.
        transaction = environment.begin_write()
        try:
            stored = environment.read_metadata(transaction)
            stored.check_config(self._config, self.store)
            if not self._without_provenance:
                stored.check_stated(self._provenance, self.store)
            if stored.embedding_shape is not None:
                shape = stored.embedding_shape
            metadata = replace(
                stored.with_provenance(self._provenance, self.store), embedding_shape=shape
            )
            # Another process may have settled the shape of a new store meanwhile.
            examples = {value.shape: key for key, value in pending.values.items()}
            for value_shape, key in examples.items():
                check_shape(sample_id_of_key(key), value_shape, shape)
            replaced = self._checksums(environment, transaction, pending.values)
            is_overwriting = self._on_duplicate == "overwrite"
            written, duplicates = _put_embeddings(
                environment,
                transaction,
                pending.values,
                replaced=pending.values if is_overwriting else self._replaced,
            )
            if duplicates and self._on_duplicate == "error":
                pending.drop(duplicates)
                names = ", ".join(sample_id_of_key(key) for key in duplicates[:3])
                raise DuplicateSampleError(
                    f"{len(duplicates)} samples ({names}, …) were stored in {self.store} by "
                    "another process meanwhile; the rest is kept for the next commit"
                )
            if metadata != stored:
                _put_metadata(environment, transaction, metadata)
            if self._before_commit is not None:
                new = self._checksums(environment, transaction, replaced.keys() - duplicates)
                self._before_commit(
                    {sample_id_of_key(key): (replaced[key], new[key] or b"") for key in new}
                )
            transaction.commit()
        except BaseException:
            with contextlib.suppress(lmdb.Error):
                transaction.abort()
            raise
        if warning := stored.mixing(metadata.provenance):
            _logger.warning("%s %s", self.store, warning)
        record_commit(environment.generation, overwrites=self._overwrites)
        self.embedding_shape = shape
        return written

    def _checksums(
        self, environment: Environment, transaction: lmdb.Transaction, keys: Iterable[bytes]
    ) -> dict[bytes, bytes | None]:
        """The checksums that are stored of these; nothing if nobody asks for them."""
        if self._before_commit is None:
            return {}
        found = {key: transaction.get(key, db=environment.checksums) for key in keys}
        return {key: None if value is None else bytes(value) for key, value in found.items()}

    def _remove(self, environment: Environment, keys: list[bytes]) -> int:
        transaction = environment.begin_write()
        try:
            environment.read_metadata(transaction).check_config(self._config, self.store)
            removed = 0
            for key in keys:
                removed += transaction.delete(key)
                transaction.delete(key, db=environment.checksums)
            transaction.commit()
        except BaseException:
            with contextlib.suppress(lmdb.Error):
                transaction.abort()
            raise
        # Pages with removed values may stay in the file: a repair must not bring them back.
        record_commit(environment.generation, overwrites=True)
        return removed

    def _attach(self) -> Environment:
        """The live generation's environment, made if there is none. Under the writer lock."""
        generation = current_generation(self.store)
        environment = self._holder.environment
        if generation is None:
            environment = self._create()
        elif environment is None or not environment.is_live(generation):
            environment = self._adopt(acquire(generation, write=True))
        else:
            environment.make_writable()
        if self._num_commits % _COMMITS_PER_READER_CHECK == 0:
            # Writers don't clear the slots of readers that were killed.
            environment.env.reader_check()
        return environment

    def _adopt(self, environment: Environment) -> Environment:
        self._holder.take(environment)
        metadata = environment.newest_metadata()
        metadata.check_config(self._config, self.store)
        metadata.with_provenance(self._provenance, self.store)
        self._known = metadata
        self.embedding_shape = metadata.embedding_shape
        return environment

    def _create(self) -> Environment:
        self._holder.drop()
        generation = create_generation(self.store)
        environment = acquire(generation, write=True, create=True)
        self._holder.take(environment)
        self._known = None
        self.embedding_shape = None
        metadata = StoreMetadata.new(self._config, self._dataset_root)
        with translated_errors(self.store), environment.env.begin(write=True) as transaction:
            environment.create_databases(transaction)
            _put_metadata(environment, transaction, metadata)
        publish_generation(self.store, generation)
        return environment


def _put_embeddings(
    environment: Environment,
    transaction: lmdb.Transaction,
    values: Mapping[bytes, npt.NDArray[Any]],
    *,
    replaced: Collection[bytes],
) -> tuple[int, list[bytes]]:
    """Put embeddings of the stored dtype in key order, each with its checksum.

    Returns:
        How many were put, and the keys that were there already and were left alone.
    """
    left_alone = []
    checksums, put = environment.checksums, transaction.put
    keys = sorted(values)
    last = max(_last_key(transaction, None), _last_key(transaction, checksums))
    num_inserted = bisect_right(keys, last)
    for key in keys[:num_inserted]:
        value = _bytes_of(values[key])
        if put(key, value, overwrite=key in replaced):
            put(key, checksum(key, value), db=checksums)
        else:
            left_alone.append(key)
    # Appended keys fill their pages; inserted ones leave them half empty.
    appended = [(key, _bytes_of(values[key])) for key in keys[num_inserted:]]
    if appended:
        with transaction.cursor() as cursor:
            cursor.putmulti(appended, append=True)
        with transaction.cursor(db=checksums) as cursor:
            cursor.putmulti([(key, checksum(key, value)) for key, value in appended], append=True)
    return len(keys) - len(left_alone), left_alone


def _bytes_of(value: npt.NDArray[Any]) -> memoryview:
    return value.reshape(-1).view(np.uint8).data


def _put_metadata(
    environment: Environment, transaction: lmdb.Transaction, metadata: StoreMetadata
) -> None:
    """Put the metadata record with its checksum."""
    record = metadata.pack()
    transaction.put(METADATA_KEY, record)
    transaction.put(METADATA_KEY, checksum(METADATA_KEY, record), db=environment.checksums)


def _last_key(transaction: lmdb.Transaction, database: Any) -> bytes:
    with transaction.cursor(db=database) as cursor:
        return bytes(cursor.key()) if cursor.last() else b""

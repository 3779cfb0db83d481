"""Writing one store: transactional batches, in turn with other processes."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import lmdb

from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheNotFoundError,
    ConfigError,
    DuplicateSampleError,
    InvalidEmbeddingError,
    WriterClosedError,
)
from lmdbcache.storage.committing import put_embeddings, put_metadata
from lmdbcache.storage.engine_errors import translated_errors
from lmdbcache.storage.environment import (
    Environment,
    Holder,
    acquire,
    acquire_current,
)
from lmdbcache.storage.forking import no_fork, process_id
from lmdbcache.storage.generations import (
    check_room,
    create_generation,
    current_generation,
    publish_generation,
    write_lock,
)
from lmdbcache.storage.layout import sample_id_of_key, sample_key
from lmdbcache.storage.metadata import StoreMetadata
from lmdbcache.storage.pending import CommitLimits, PendingEmbeddings
from lmdbcache.storage.values import as_stored, check_shape

__all__ = ["EmbeddingWriter", "OnDuplicate"]

OnDuplicate = Literal["skip", "overwrite", "error"]

_COMMITS_PER_READER_CHECK: Final = 64
_RESERVE_BYTES: Final = 16 << 20
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 256, 8 << 20


class EmbeddingWriter:
    """Collects embeddings and commits them in transactions.

    A commit happens when enough has been collected, by bytes, count or time, at `commit`, and at a
    clean exit of the `with` block; an exception discards what wasn't committed. Committed
    embeddings survive a killed process and a power cut. Nothing is created before the first commit.

    Several processes may write to one store: each commit waits for its turn. Threads may share a
    writer. It belongs to the process that made it and doesn't pickle.

    Args:
        store: The store's folder; made when needed.
        config: The store's identity.
        on_duplicate: For a sample that is stored already: `"skip"` keeps the stored one,
            `"overwrite"` replaces it, `"error"` refuses it.
        ragged: Let the first dimension differ between embeddings. Only looked at when the store
            is new.
        provenance: Kept in the metadata; other weights than the store's are refused.
        dataset_root: Kept in the metadata of a new store.
        commit_bytes: Commit when this much is collected.
        commit_records: Commit when this many embeddings are collected.
        commit_seconds: Commit at the first `put` this long after the oldest uncommitted one.
    """

    def __init__(
        self,
        store: str | Path,
        config: CacheConfig,
        *,
        on_duplicate: OnDuplicate = "skip",
        ragged: bool = False,
        provenance: Mapping[str, str] | None = None,
        dataset_root: str | Path = "",
        commit_bytes: int = 64 << 20,
        commit_records: int = 4096,
        commit_seconds: float = 10.0,
    ) -> None:
        if on_duplicate not in ("skip", "overwrite", "error"):
            raise ConfigError(
                f"on_duplicate: {on_duplicate!r}; known are 'skip', 'overwrite', 'error'"
            )
        self._store = Path(store).absolute()
        self._config = config
        self._on_duplicate = on_duplicate
        self._ragged = ragged
        self._provenance = {str(name): str(value) for name, value in (provenance or {}).items()}
        self._dataset_root = str(dataset_root)
        StoreMetadata.new(config, self._dataset_root).with_provenance(self._provenance, "").pack()
        self._limits = CommitLimits(commit_bytes, commit_records, commit_seconds)
        self._pending = PendingEmbeddings()
        self._holder = Holder(self)
        self._metadata: StoreMetadata | None = None
        self._shape: tuple[int | None, ...] | None = None
        self._num_commits = 0
        self._num_written = 0
        self._closed = False
        self._owner = process_id()
        self._lock = threading.RLock()
        with contextlib.suppress(CacheNotFoundError), no_fork:
            self._adopt(acquire_current(self._store))

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._store

    @property
    def config(self) -> CacheConfig:
        """The store's identity."""
        return self._config

    @property
    def num_written(self) -> int:
        """Embeddings committed by this writer; what was skipped doesn't count."""
        return self._num_written

    @property
    def num_pending(self) -> int:
        """Embeddings that the next commit will write."""
        return len(self._pending.values)

    def put(self, sample_id: str, embedding: Any) -> bool:
        """Add one embedding to the next commit.

        Args:
            sample_id: `file_id:class`.
            embedding: numpy array or torch tensor (any device, with or without grad) of the
                store's shape; cast to the stored dtype.

        Returns:
            False if the sample is stored already and is skipped.

        Raises:
            InvalidSampleIdError: Not a usable sample id.
            InvalidEmbeddingError: NaN, Inf, or another shape than the store's.
            DuplicateSampleError: Stored already, with `on_duplicate="error"`.
        """
        key = sample_key(sample_id)
        with self._usable():
            if self._on_duplicate != "overwrite" and self._known([key]):
                if self._on_duplicate == "error":
                    raise DuplicateSampleError(
                        f"{sample_id} is stored in {self._store} already. Leave it out, or write "
                        "with on_duplicate='skip' or 'overwrite'"
                    )
                return False
            value = as_stored(sample_id, embedding, self._config.dtype)
            self._check_shape(sample_id, value.shape)
            self._pending.put(key, value)
            if self._pending.is_due(self._limits):
                self.commit()
            return True

    def put_batch(self, sample_ids: Iterable[str], embeddings: Iterable[Any]) -> int:
        """Add several embeddings.

        Args:
            sample_ids: `(n,)` sample ids.
            embeddings: One for each. An array or tensor `(n, *embedding_shape)` is checked and
                cast as a whole, which is several times faster than one by one.

        Returns:
            How many weren't stored already.

        Raises:
            InvalidEmbeddingError: Not as many embeddings as sample ids; and see `put`.
        """
        sample_ids = list(sample_ids)
        if not hasattr(embeddings, "shape"):
            embeddings = list(embeddings)
        if len(embeddings) != len(sample_ids):  # type: ignore[arg-type]
            raise InvalidEmbeddingError(
                f"{len(embeddings)} embeddings for {len(sample_ids)} sample ids"  # type: ignore[arg-type]
            )
        if isinstance(embeddings, list):
            return sum([self.put(i, row) for i, row in zip(sample_ids, embeddings, strict=True)])
        row_bytes = 4 * math.prod(embeddings.shape[1:])
        step = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(1, row_bytes)))
        added = 0
        for start in range(0, len(sample_ids), step):
            part = slice(start, start + step)
            added += self._put_rows(sample_ids[part], embeddings[part])  # type: ignore[index]
        return added

    def _put_rows(self, sample_ids: list[str], rows: Any) -> int:
        keys = [sample_key(sample_id) for sample_id in sample_ids]
        with self._usable():
            known = self._known(keys) if self._on_duplicate != "overwrite" else set()
            try:
                if known and self._on_duplicate == "error":
                    raise InvalidEmbeddingError
                values = as_stored(f"{sample_ids[0]} …", rows, self._config.dtype)
            except InvalidEmbeddingError:  # one by one, the culprit is named
                return sum([self.put(i, row) for i, row in zip(sample_ids, rows, strict=True)])
            self._check_shape(sample_ids[0], values.shape[1:])
            before = self._pending.num_put
            for key, value in zip(keys, values, strict=True):
                if key not in known:
                    self._pending.put(key, value, replace=self._on_duplicate == "overwrite")
            added = self._pending.num_put - before
            if self._pending.is_due(self._limits):
                self.commit()
            return added

    def commit(self) -> int:
        """Write what was collected in one transaction. It is durable when this returns.

        Returns:
            The number of embeddings written.

        Raises:
            CacheFullError: No room; nothing was written, what was collected is kept, and the next
                commit tries again.
            DuplicateSampleError: Another process stored some of them meanwhile, with
                `on_duplicate="error"`; the others are kept for the next commit.
            ProvenanceMismatchError: The store was filled with other weights.
        """
        with self._usable():
            if not self._pending.values:
                return 0
            with write_lock(self._store), no_fork:
                # First: LMDB dies of SIGBUS where the disk has no room for its lock file.
                needed = 2 * self._pending.num_bytes + _RESERVE_BYTES
                check_room(self._store, needed, "this commit")
                environment = self._attach()
                with translated_errors(self._store):
                    written = self._write(environment)
            self._num_commits += 1
            self._num_written += written
            self.discard()
            return written

    def discard(self) -> None:
        """Drop what was collected since the last commit."""
        with self._lock:
            self._pending.clear()
            if self._metadata is None or self._metadata.embedding_shape is None:
                self._shape = None

    def close(self) -> None:
        """Commit what is left and give back the environment."""
        if self._owner != process_id():
            return  # the lock is the parent's, too
        with self._lock:
            if self._closed:
                return
            try:
                self.commit()
            finally:
                self._closed = True
                self._holder.drop()

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._owner == process_id():
            self.discard()
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._store)!r}, {self.num_pending} pending)"

    def __del__(self) -> None:
        pending = getattr(self, "_pending", None)
        if pending and pending.values and not self._closed and self._owner == process_id():
            warnings.warn(
                f"{self!r} was dropped without commit or close: its pending embeddings are lost",
                ResourceWarning,
                stacklevel=2,
            )

    def __reduce__(self) -> Any:
        raise TypeError("a writer doesn't pickle; open one in the process that writes")

    # ---- the transaction

    def _write(self, environment: Environment) -> int:
        # One thread begins and commits: LMDB's write lock belongs to the thread.
        transaction = environment.env.begin(write=True)
        try:
            stored = environment.read_metadata(transaction)
            stored.check_config(self._config, self._store)
            shape = self._shape if stored.embedding_shape is None else stored.embedding_shape
            metadata = replace(
                stored.with_provenance(self._provenance, self._store), embedding_shape=shape
            )
            # Another process may have settled the shape of a new store meanwhile.
            for key, value in self._pending.values.items():
                check_shape(sample_id_of_key(key), value.shape, shape)
            written, duplicates = put_embeddings(
                environment,
                transaction,
                self._pending.values,
                overwrite=self._on_duplicate == "overwrite",
            )
            if duplicates and self._on_duplicate == "error":
                self._pending.drop(duplicates)
                names = ", ".join(sample_id_of_key(key) for key in duplicates[:3])
                raise DuplicateSampleError(
                    f"{len(duplicates)} samples ({names}, …) were stored in {self._store} by "
                    "another process meanwhile; the rest is kept for the next commit"
                )
            if metadata != stored:
                put_metadata(environment, transaction, metadata)
            transaction.commit()
        except BaseException:
            with contextlib.suppress(lmdb.Error):
                transaction.abort()
            raise
        self._metadata, self._shape = metadata, shape
        return written

    def _attach(self) -> Environment:
        """The live generation's environment, made if there is none. Under the writer lock."""
        generation = current_generation(self._store)
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
        with translated_errors(self._store):
            metadata = environment.read_metadata(environment.begin_read())
        metadata.check_config(self._config, self._store)
        metadata.with_provenance(self._provenance, self._store)
        if metadata.embedding_shape is not None:
            self._shape = metadata.embedding_shape
        self._metadata = metadata
        return environment

    def _create(self) -> Environment:
        self._holder.drop()
        generation = create_generation(self._store)
        environment = acquire(generation, write=True, create=True)
        self._holder.take(environment)
        self._metadata = StoreMetadata.new(self._config, self._dataset_root)
        with translated_errors(self._store), environment.env.begin(write=True) as transaction:
            environment.create_databases(transaction)
            put_metadata(environment, transaction, self._metadata)
        publish_generation(self._store, generation)
        return environment

    # ---- checks

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        if self._owner != process_id():
            raise WriterClosedError(
                f"this writer of {self._store} belongs to process {self._owner}; open one in "
                "this process"
            )
        with self._lock:
            if self._closed:
                raise WriterClosedError(f"this writer of {self._store} is closed; open another")
            yield

    def _check_shape(self, sample_id: str, shape: tuple[int, ...]) -> None:
        if self._shape is None:
            self._shape = (None, *shape[1:]) if self._ragged and shape else shape
        check_shape(sample_id, shape, self._shape)

    def _known(self, keys: list[bytes]) -> set[bytes]:
        """Those of the keys that are stored or will be by the next commit."""
        environment = self._holder.environment
        stored = set() if environment is None else environment.stored(keys)
        if environment and stored and not environment.is_live(current_generation(self._store)):
            # Cleared or compacted since: only the live generation tells.
            self._holder.drop()
            with contextlib.suppress(CacheNotFoundError), no_fork:
                self._adopt(acquire_current(self._store))
            return self._known(keys)
        return stored.union(key for key in keys if key in self._pending.values)

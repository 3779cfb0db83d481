"""Writing one store: transactional batches, in turn with other processes."""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, get_args

import lmdb
import numpy as np
import numpy.typing as npt

from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    CacheNotFoundError,
    ConfigError,
    DuplicateSampleError,
    InvalidEmbeddingError,
    StorageError,
    WriterClosedError,
)
from lmdbcache.files import few
from lmdbcache.storage.checks.first_opening import mark_known
from lmdbcache.storage.commit import (
    Batch,
    checksums_in,
    put_embeddings,
    put_metadata,
    transaction_in,
)
from lmdbcache.storage.engine_errors import translated_errors
from lmdbcache.storage.environment import Environment, Holder, acquire, acquire_current
from lmdbcache.storage.filesystems import check_local_for_writing
from lmdbcache.storage.forking import no_fork, process_id
from lmdbcache.storage.generations import (
    RESERVE_BYTES,
    check_room,
    create_generation,
    current_generation,
    publish_generation,
    write_lock,
)
from lmdbcache.storage.layout import sample_id_of_key, sample_key, sample_keys
from lmdbcache.storage.metadata import StoreMetadata
from lmdbcache.storage.pages.commit_record import record_commit
from lmdbcache.storage.values import as_read, as_stored, check_shape, stored_form
from lmdbcache.storage.windows import (
    check_window_key,
    first_windows_of,
    keys_of_windows,
    window_range,
)

OnDuplicate = Literal["skip", "overwrite", "error"]
# Sample id → checksums of the embedding that is replaced, if there is one, and of the new one.
BeforeCommit = Callable[[Mapping[str, tuple[bytes | None, bytes]]], None]

_logger: Final = logging.getLogger(__name__)

_COMMITTED_AT_ONCE_BYTES: Final = 8 << 20
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 512, 8 << 20
_BACKGROUND_FROM_BYTES: Final = 32 << 20  # below, handing over costs what it gains
_COMMITS_PER_READER_CHECK: Final = 64


def check_on_duplicate(on_duplicate: str) -> None:
    """Refuse an unknown choice.

    Raises:
        ConfigError: It is unknown.
    """
    known = get_args(OnDuplicate)
    if on_duplicate not in known:
        raise ConfigError(f"on_duplicate: {on_duplicate!r}; known are {', '.join(known)}")


class EmbeddingWriter:
    """Collects embeddings and commits them in transactions.

    A commit happens when enough has been collected, by bytes, count or time, at `commit`, and at a
    clean exit of the `with` block; an exception discards what wasn't committed. Committed
    embeddings survive a killed process and a power cut. Nothing is created before the first commit.

    A commit of much data that `put` starts goes on in a thread while more is collected; the next
    one, `commit` and `close` wait for it, and raise what went wrong with it.

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
        without_provenance: Add to a store with a `weights_digest` although `provenance` states
            none. Otherwise that is refused, as the embeddings could be another model's.
        dataset_root: Kept in the metadata of a new store.
        commit_bytes: Commit when this much is collected.
        commit_records: Commit when this many embeddings are collected.
        commit_seconds: Commit at the first `put` this long after the oldest uncommitted one.
        overwritten: Sample ids that are overwritten whatever `on_duplicate` says.
        before_commit: Called inside each commit, maybe from a thread, maybe again for the same
            samples: sample id → (checksum of the embedding it replaces or None, of the new one).
    """

    def __init__(
        self,
        store: str | Path,
        config: CacheConfig,
        *,
        on_duplicate: OnDuplicate = "skip",
        ragged: bool = False,
        provenance: Mapping[str, str] | None = None,
        without_provenance: bool = False,
        dataset_root: str | Path = "",
        commit_bytes: int = 64 << 20,
        commit_records: int = 2048,
        commit_seconds: float = 10.0,
        overwritten: Iterable[str] = (),
        before_commit: BeforeCommit | None = None,
    ) -> None:
        check_on_duplicate(on_duplicate)
        self._store = Path(store).absolute()
        self._config = config
        self._on_duplicate = on_duplicate
        self._overwritten = frozenset(sample_key(sample_id) for sample_id in overwritten)
        self._ragged = ragged
        self._provenance = {str(name): str(value) for name, value in (provenance or {}).items()}
        self._without_provenance = without_provenance
        self._dataset_root = str(dataset_root)
        self._limits = (commit_bytes, commit_records, commit_seconds)
        self._before_commit = before_commit
        check_local_for_writing(self._store)

        self._lock = threading.RLock()
        self._owner = process_id()
        self._closed = False
        self._pending = Batch()
        self._in_background: Batch | None = None
        self._borrows = False
        self._is_together = False
        self._num_written = 0

        self._environment_lock = threading.Lock()
        self._is_writing = False
        self._holder = Holder(self)
        self._num_commits = 0
        self._known: StoreMetadata | None = None
        new = StoreMetadata.new(config, self._dataset_root)
        new.with_provenance(self._provenance, "").pack()  # refuses what couldn't be read back
        with contextlib.suppress(CacheNotFoundError), no_fork:
            self._adopt(acquire_current(self._store))
        # Of what is stored or will be first; None while there is nothing.
        self._shape = self._stored_shape

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
        """Embeddings that aren't committed yet."""
        in_background = self._in_background
        return len(self._pending.values) + (len(in_background.values) if in_background else 0)

    # ---- collecting

    def put(self, sample_id: str, embedding: Any) -> bool:
        """Add one embedding to the next commit.

        Args:
            sample_id: `file_id:class`.
            embedding: numpy array or torch tensor (any device, with or without grad) of the
                store's shape; cast to the stored dtype. int8 is made of float32.

        Returns:
            False if the sample is stored already and is skipped.

        Raises:
            InvalidSampleIdError: Not a usable sample id.
            InvalidEmbeddingError: NaN, Inf, or another shape than the store's.
            DuplicateSampleError: Stored already, with `on_duplicate="error"`.
            ProvenanceMismatchError: See `check_provenance`.
        """
        key = sample_key(sample_id)
        check_window_key(key, self._config)
        with self._usable():
            if not self._overwrites(key) and self._known_of([key]):
                if self._on_duplicate == "error":
                    raise DuplicateSampleError(
                        f"{sample_id} is stored in {self._store} already. Leave it out, or write "
                        'with `on_duplicate="skip"` or `on_duplicate="overwrite"`'
                    )
                return False
            self._check_stated()
            value = as_stored(sample_id, embedding, self._config.dtype, copy=not self._borrows)
            self._check_shape(sample_id, value.shape)
            self._pending.put(key, value)
            self._commit_if_due()
            return True

    def put_batch(self, sample_ids: Iterable[str], embeddings: Iterable[Any]) -> int:
        """Add several embeddings. From 8 MiB on they are committed before this returns.

        They may be committed in several transactions. Inside `together` they are committed in one,
        at the end of its block or later.

        Args:
            sample_ids: `(n,)` sample ids.
            embeddings: One for each. An array or tensor `(n, *embedding_shape)` is checked and
                cast as a whole; for small embeddings that is several times faster than one by one.

        Returns:
            How many weren't stored already.

        Raises:
            InvalidEmbeddingError: Not as many embeddings as sample ids, or a sparse tensor; and see
                `put`.
        """
        sample_ids = list(sample_ids)
        if not hasattr(embeddings, "shape"):
            embeddings = list(embeddings)
        elif not hasattr(embeddings, "itemsize"):  # a table: iterating it gives its columns' names
            embeddings = np.asarray(embeddings)
        elif str(getattr(embeddings, "layout", "")).startswith("torch.sparse"):
            raise InvalidEmbeddingError(
                "embeddings: a sparse tensor; give a dense one (`to_dense`)"
            )
        if len(embeddings) != len(sample_ids):  # type: ignore[arg-type]
            raise InvalidEmbeddingError(
                f"{len(embeddings)} embeddings for {len(sample_ids)} sample ids"  # type: ignore[arg-type]
            )
        with self._usable(), self._borrowing(embeddings):
            if isinstance(embeddings, list):
                pairs = zip(sample_ids, embeddings, strict=True)
                return sum([self.put(sample_id, row) for sample_id, row in pairs])
            row_bytes = 4 * math.prod(embeddings.shape[1:])
            _, commit_records, _ = self._limits
            step = min(_ROWS_AT_ONCE, commit_records, _BYTES_AT_ONCE // max(1, row_bytes))
            step = max(1, step)
            added = 0
            for start in range(0, len(sample_ids), step):
                part = slice(start, start + step)
                added += self._put_rows(sample_ids[part], embeddings[part])  # type: ignore[index]
            return added

    def put_stored(
        self,
        keys: Sequence[bytes],
        values: Sequence[npt.NDArray[Any]],
        checksums: Sequence[bytes],
    ) -> None:
        """Add embeddings that were checked where they come from; nothing is checked again.

        They aren't copied either: commit before their memory changes.

        Args:
            keys: `(n,)` keys, each once; see `sample_key`.
            values: One for each, as `as_stored` gives them.
            checksums: `(n,)` checksums of what `encoded` makes of them; see `checksum`.

        Raises:
            InvalidEmbeddingError: Another shape than the store's; here or at the commit.
            ProvenanceMismatchError: See `check_provenance`.
        """
        with self._usable():
            self._check_stated()
            if self._shape is None and keys:
                self._check_shape(sample_id_of_key(keys[0]), values[0].shape)
            self._pending.put_rows(keys, values, replaced=keys, checksums=checksums)
            self._commit_if_due()

    def _put_rows(self, sample_ids: list[str], rows: Any) -> int:
        keys = sample_keys(sample_ids)
        if self._config.window is not None:
            for key in keys:
                check_window_key(key, self._config)
        overwrites_all = self._on_duplicate == "overwrite"
        replaced = frozenset(keys) if overwrites_all else self._overwritten
        asked = [key for key in keys if key not in replaced] if replaced else keys
        known = self._known_of(asked)
        if len(known) < len(set(keys)):
            self._check_stated()
        try:
            if known and self._on_duplicate == "error":
                raise InvalidEmbeddingError
            first, copy = f"{sample_ids[0]} …", not self._borrows
            values = as_stored(first, rows, self._config.dtype, copy=copy)
        except InvalidEmbeddingError:  # one by one, the culprit is named
            return sum([self.put(i, row) for i, row in zip(sample_ids, rows, strict=True)])
        self._check_shape(sample_ids[0], values.shape[1:])
        # Not scalars of numpy, where an embedding is one number.
        each = list(values) if values.ndim > 1 else [values[n, ...] for n in range(len(keys))]
        if known:
            each = [row for key, row in zip(keys, each, strict=True) if key not in known]
            keys = [key for key in keys if key not in known]
        added = self._pending.put_rows(keys, each, replaced=replaced)
        self._commit_if_due()
        return added

    @contextlib.contextmanager
    def _borrowing(self, embeddings: Any) -> Iterator[None]:
        """Collect large embeddings without a copy, and commit them while they are the caller's."""
        if isinstance(embeddings, list):
            num_bytes = sum(map(_num_bytes, embeddings))
        else:
            num_bytes = _num_bytes(embeddings)
        if num_bytes < _COMMITTED_AT_ONCE_BYTES or self._borrows or self._is_together:
            yield
            return
        self._borrows = True
        try:
            yield
            self.commit()
        except BaseException:
            self._pending.own()
            raise
        finally:
            self._borrows = False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is put inside goes into one transaction: all of it is stored, or nothing.

        A commit that becomes due waits for the end of the block. An exception drops what the block
        has put; what was collected before is kept. Don't commit inside.
        """
        with self._usable():
            before = self._pending.copied()
            self._is_together = True
            try:
                yield
            except BaseException:
                self._pending = before
                raise
            finally:
                self._is_together = False
            if self._pending.values:
                self._commit_if_due()

    def uncommitted(self, sample_id: str) -> npt.NDArray[Any] | None:
        """Return what waits to be committed of a sample, as it will be read; not to be changed."""
        with self._usable():
            key, in_background = sample_key(sample_id), self._in_background
            value = self._pending.values.get(key)
            if value is None and in_background is not None:
                value = in_background.values.get(key)
            return None if value is None else as_read(value, self._config.dtype)

    def discard(self) -> None:
        """Drop what was collected since the last commit."""
        with self._lock:
            # What it failed with doesn't matter any more.
            with contextlib.suppress(Exception):
                self._settle()
            self._forget_pending()

    def check_provenance(self) -> None:
        """Refuse before anything is computed what `put` would refuse: unstated weights.

        Raises:
            ProvenanceMismatchError: The store has a `weights_digest`, and `provenance` states none.
        """
        with self._usable():
            self._check_stated()

    # ---- committing

    def commit(self) -> int:
        """Write what was collected in one transaction. It is durable when this returns.

        Returns:
            The number of embeddings written, with those that a thread was writing.

        Raises:
            CacheFullError: No room; nothing was written, what was collected is kept, and the next
                commit tries again.
            DuplicateSampleError: Another process has stored some of them since, with
                `on_duplicate="error"`; the others are kept for the next commit.
            ProvenanceMismatchError: The store was filled with other weights.
        """
        with self._usable():
            written = self._settle()
            if self._pending.values:
                committed = self._write(self._pending)
                self._count(committed)
                written += committed
                self._forget_pending()
            return written

    def remove(self, sample_ids: Iterable[str]) -> int:
        """Remove embeddings with their checksums in one transaction; durable when this returns.

        What was collected of them is also dropped. Readers in other processes keep what their
        snapshot has. Later commits reuse the space; `compact` gives it back.

        In a store of windows, the id of a recording means all of its windows, and the first window
        goes with any other: a recording without all of its windows isn't stored.

        Returns:
            How many were stored; others are passed over.

        Raises:
            CacheFullError: No room for the pages that change; nothing was removed.
            StorageError: Called inside `together`.
        """
        keys = sorted({sample_key(sample_id) for sample_id in sample_ids})
        with self._usable():
            if self._is_together:
                raise StorageError(
                    f"{self._store}: remove() inside together() would be a separate transaction. "
                    "Call it before or after the block"
                )
            self._settle()
            removed = 0
            # Without a store there is nothing to remove, and no reason to make a folder.
            if keys and current_generation(self._store) is not None:
                with write_lock(self._store), no_fork:
                    if current_generation(self._store) is not None:
                        removed = self._with_room(
                            lambda environment: self._remove_from(environment, keys),
                            RESERVE_BYTES,
                            "removal",
                        )
            self._pending.drop(keys)
            return removed

    def close(self) -> None:
        """Commit what is left and give back the environment."""
        if self._owner != process_id():
            return  # the lock is the parent's, too
        with self._lock:
            if self._closed:
                return
            try:
                self._commit_last()
            finally:
                # LMDB can't be closed under a thread's commit, whoever is in a hurry.
                batch = self._in_background
                while batch is not None and not batch.is_done:
                    with contextlib.suppress(KeyboardInterrupt):
                        batch.wait()
                self._closed = True
                with no_fork, self._environment_lock:
                    self._holder.drop()

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is not None and self._owner == process_id():
                self.discard()
        finally:
            self.close()

    def __del__(self, process_id: Callable[[], int] = process_id) -> None:
        # An argument: at the end of the interpreter the module's own names are None.
        if not hasattr(self, "_num_commits") or self._closed or self._owner != process_id():
            return
        in_background = self._in_background
        has_failed = in_background is not None and in_background.error is not None
        if self._pending.values or has_failed:
            warnings.warn(
                f"{self!r} was dropped without commit or close: its pending embeddings are lost",
                ResourceWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._store)!r}, {self.num_pending} pending)"

    def __reduce__(self) -> Any:
        raise TypeError("a writer doesn't pickle; open one in the process that writes")

    def _commit_if_due(self) -> None:
        if self._is_together:
            return
        if self._in_background is not None and self._in_background.is_done:
            self._settle()
        num_bytes, num_records, seconds = self._limits
        pending = self._pending
        is_due = pending.num_bytes >= num_bytes or len(pending.values) >= num_records
        if not (is_due or time.monotonic() - pending.since >= seconds):
            return
        if self._borrows or pending.num_bytes < _BACKGROUND_FROM_BYTES:
            self.commit()
            return
        self._settle()
        # In this order: Ctrl-C between two of these lines loses nothing.
        batch = self._pending
        self._in_background, self._pending = batch, Batch()
        batch.start(self._write)

    def _settle(self) -> int:
        """Wait for the commit in the background; if it failed, take its embeddings back."""
        if self._in_background is None:
            return 0
        self._in_background.wait()
        batch, self._in_background = self._in_background, None
        if batch.error is not None:
            self._pending.put_back(batch)
            raise batch.error
        self._count(batch.written)
        return batch.written

    def _commit_last(self) -> None:
        """Commit what is left; what failed in the background gets a second try."""
        failure: CacheError | None = None
        try:
            self._settle()
        except CacheError as error:
            failure = error
        self.commit()
        if isinstance(failure, DuplicateSampleError):
            raise failure

    def _forget_pending(self) -> None:
        self._pending = Batch()
        self._shape = self._stored_shape

    def _count(self, written: int) -> None:
        self._num_written += written
        self._shape = self._stored_shape

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

    # ---- what is known of the store

    def _overwrites(self, key: bytes) -> bool:
        return self._on_duplicate == "overwrite" or key in self._overwritten

    def _check_shape(self, sample_id: str, shape: tuple[int, ...]) -> None:
        if self._shape is None:
            first: tuple[int | None, ...] = (None, *shape[1:]) if self._ragged and shape else shape
            stored_form(first, self._config.dtype)  # refuses one without rows
            self._shape = first
        check_shape(sample_id, shape, self._shape)

    def _check_stated(self) -> None:
        if self._known is not None and not self._without_provenance:
            self._known.check_stated(self._provenance, self._store)

    @property
    def _stored_shape(self) -> tuple[int | None, ...] | None:
        return None if self._known is None else self._known.embedding_shape

    def _known_of(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys that are stored or will be by the next commit."""
        if not keys:
            return set()
        pending, in_background = self._pending.values, self._in_background
        known = pending.keys() & keys
        if in_background is not None:
            known |= in_background.values.keys() & keys
        return known | self._stored(keys)

    def _stored(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys that the newest commit has; also during a commit in the background."""
        # In the order of a commit, or a fork by a third thread would stop all three.
        with no_fork, self._environment_lock:
            environment = self._holder.environment
            found = environment.stored(keys) if environment else set()
            if not environment or not found or self._is_writing:
                return found
            if environment.is_live(current_generation(self._store)):
                return found
            # Cleared or compacted since: only the live generation tells.
            self._holder.drop()
            with contextlib.suppress(CacheNotFoundError):
                return self._adopt(acquire_current(self._store)).stored(keys)
            return set()

    def _adopt(self, environment: Environment) -> Environment:
        self._holder.take(environment)
        metadata = environment.newest_metadata()
        metadata.check_config(self._config, self._store)
        metadata.with_provenance(self._provenance, self._store)
        self._known = metadata
        return environment

    # ---- one transaction; in the thread of a background commit too

    def _write(self, batch: Batch) -> int:
        """Write a batch in one transaction; durable when this returns."""
        with write_lock(self._store), no_fork:
            return self._with_room(
                lambda environment: self._write_to(environment, batch),
                2 * batch.num_bytes + RESERVE_BYTES,
                "this commit",
            )

    def _with_room(self, write: Callable[[Environment], int], needed: int, purpose: str) -> int:
        """What one write transaction gives. Under the writer lock."""
        try:
            with translated_errors(self._store, needed):
                # First: LMDB dies of SIGBUS where the disk has no room for its lock file.
                check_room(self._store, needed, purpose)
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

    def _create(self) -> Environment:
        self._holder.drop()
        generation = create_generation(self._store)
        environment = acquire(generation, write=True, create=True)
        self._holder.take(environment)
        self._known = None
        metadata = StoreMetadata.new(self._config, self._dataset_root)
        with translated_errors(self._store), environment.env.begin(write=True) as transaction:
            environment.create_databases(transaction)
            put_metadata(environment, transaction, metadata)
        mark_known(generation)
        publish_generation(self._store, generation)
        return environment

    def _write_to(self, environment: Environment, batch: Batch) -> int:
        with transaction_in(environment) as transaction:
            stored = environment.read_metadata(transaction)
            stored.check_config(self._config, self._store)
            if not self._without_provenance:
                stored.check_stated(self._provenance, self._store)
            shape = self._shape if stored.embedding_shape is None else stored.embedding_shape
            metadata = replace(
                stored.with_provenance(self._provenance, self._store), embedding_shape=shape
            )
            # Another process may have settled the shape of a new store since.
            shapes = map(operator.attrgetter("shape"), batch.values.values())
            for value_shape, key in dict(zip(shapes, batch.values, strict=True)).items():
                check_shape(sample_id_of_key(key), value_shape, shape)
            asks = self._before_commit is not None
            before = checksums_in(environment, transaction, batch.values if asks else ())
            overwrites_all = self._on_duplicate == "overwrite"
            replaced = batch.values if overwrites_all else self._overwritten
            written, duplicates = put_embeddings(
                environment, transaction, batch, self._config.dtype, replaced=replaced
            )
            if duplicates and self._on_duplicate == "error":
                batch.drop(duplicates)
                names = few([sample_id_of_key(key) for key in duplicates], 3)
                raise DuplicateSampleError(
                    f"{len(duplicates)} samples ({names}) were stored in {self._store} by "
                    "another process; the rest is kept for the next commit"
                )
            metadata = metadata.with_quantization_error(batch.quantization_error)
            if metadata != stored:
                put_metadata(environment, transaction, metadata)
            if self._before_commit is not None:
                left_alone, new = set(duplicates), batch.checksums
                self._before_commit(
                    {
                        sample_id_of_key(key): (old, new[key])
                        for key, old in before.items()
                        if key not in left_alone
                    }
                )
        if warning := stored.mixing(metadata.provenance):
            _logger.warning("%s %s", self._store, warning)
        record_commit(environment.generation)
        self._known = metadata
        return written

    def _remove_from(self, environment: Environment, keys: list[bytes]) -> int:
        with transaction_in(environment) as transaction:
            environment.read_metadata(transaction).check_config(self._config, self._store)
            removed = 0
            if self._config.window is not None:
                keys = _with_windows(environment, transaction, keys)
            for key in keys:
                removed += transaction.delete(key)
                transaction.delete(key, db=environment.checksums)
        record_commit(environment.generation)
        return removed


def _with_windows(
    environment: Environment, transaction: lmdb.Transaction, keys: Sequence[bytes]
) -> list[bytes]:
    """Return what goes with these keys: a recording's windows, and the first with any other."""
    windows: list[bytes] = []
    with transaction.cursor(db=environment.checksums) as cursor:
        for key in keys:
            first, end = window_range(key)
            following = map(bytes, cursor.iternext(values=False) if cursor.set_range(first) else ())
            windows += keys_of_windows(key, list(takewhile(partial(operator.gt, end), following)))
    return sorted({*keys, *windows, *first_windows_of(keys)})


def _num_bytes(value: Any) -> int:
    # Not its nbytes: that of a sparse tensor raises.
    return math.prod(getattr(value, "shape", ())) * getattr(value, "itemsize", 0)

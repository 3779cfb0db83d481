"""Writing one store: transactional batches, in turn with other processes."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

import numpy.typing as npt

from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    ConfigError,
    DuplicateSampleError,
    InvalidEmbeddingError,
    WriterClosedError,
)
from lmdbcache.storage.background import BackgroundCommit
from lmdbcache.storage.committing import BeforeCommit, Committer
from lmdbcache.storage.forking import process_id
from lmdbcache.storage.layout import sample_key
from lmdbcache.storage.pending import CommitLimits, PendingEmbeddings
from lmdbcache.storage.values import as_stored, check_shape

__all__ = ["EmbeddingWriter", "OnDuplicate"]

OnDuplicate = Literal["skip", "overwrite", "error"]

_BACKGROUND_FROM_BYTES: Final = 32 << 20  # below, handing over costs what it gains
_COMMITTED_AT_ONCE_BYTES: Final = 8 << 20
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 256, 8 << 20


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
        dataset_root: Kept in the metadata of a new store.
        commit_bytes: Commit when this much is collected.
        commit_records: Commit when this many embeddings are collected.
        commit_seconds: Commit at the first `put` this long after the oldest uncommitted one.
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
        dataset_root: str | Path = "",
        commit_bytes: int = 64 << 20,
        commit_records: int = 2048,
        commit_seconds: float = 10.0,
        before_commit: BeforeCommit | None = None,
    ) -> None:
        if on_duplicate not in ("skip", "overwrite", "error"):
            raise ConfigError(
                f"on_duplicate: {on_duplicate!r}; known are 'skip', 'overwrite', 'error'"
            )
        self._store = Path(store).absolute()
        self._config = config
        self._on_duplicate = on_duplicate
        self._ragged = ragged
        self._committer = Committer(
            self._store,
            config,
            on_duplicate=on_duplicate,
            provenance={str(name): str(value) for name, value in (provenance or {}).items()},
            dataset_root=str(dataset_root),
            before_commit=before_commit,
        )
        self._limits = CommitLimits(commit_bytes, commit_records, commit_seconds)
        self._pending = PendingEmbeddings()
        self._borrows = False
        self._in_background: BackgroundCommit | None = None
        self._shape = self._committer.embedding_shape
        self._num_written = 0
        self._closed = False
        self._owner = process_id()
        self._lock = threading.RLock()

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
        return len(self._pending.values) + (len(in_background) if in_background else 0)

    def uncommitted(self, sample_id: str) -> npt.NDArray[Any] | None:
        """What waits to be committed of a sample, not to be changed; None if nothing does."""
        with self._usable():
            key, in_background = sample_key(sample_id), self._in_background
            value = self._pending.values.get(key)
            if value is None and in_background is not None:
                value = in_background.pending.values.get(key)
            return value

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
            value = as_stored(sample_id, embedding, self._config.dtype, copy=not self._borrows)
            self._check_shape(sample_id, value.shape)
            self._pending.put(key, value)
            self._commit_if_due()
            return True

    def put_batch(self, sample_ids: Iterable[str], embeddings: Iterable[Any]) -> int:
        """Add several embeddings. From 8 MiB on they are committed before this returns.

        Args:
            sample_ids: `(n,)` sample ids.
            embeddings: One for each. An array or tensor `(n, *embedding_shape)` is checked and
                cast as a whole; for small embeddings that is several times faster than one by one.

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
        with self._usable(), self._borrowing(embeddings):
            if isinstance(embeddings, list):
                pairs = zip(sample_ids, embeddings, strict=True)
                return sum([self.put(sample_id, row) for sample_id, row in pairs])
            row_bytes = 4 * math.prod(embeddings.shape[1:])
            step = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(1, row_bytes)))
            added = 0
            for start in range(0, len(sample_ids), step):
                part = slice(start, start + step)
                added += self._put_rows(sample_ids[part], embeddings[part])  # type: ignore[index]
            return added

    def _put_rows(self, sample_ids: list[str], rows: Any) -> int:
        keys = [sample_key(sample_id) for sample_id in sample_ids]
        known = self._known(keys) if self._on_duplicate != "overwrite" else set()
        try:
            if known and self._on_duplicate == "error":
                raise InvalidEmbeddingError
            first, copy = f"{sample_ids[0]} …", not self._borrows
            values = as_stored(first, rows, self._config.dtype, copy=copy)
        except InvalidEmbeddingError:  # one by one, the culprit is named
            return sum([self.put(i, row) for i, row in zip(sample_ids, rows, strict=True)])
        self._check_shape(sample_ids[0], values.shape[1:])
        before = self._pending.num_put
        for key, value in zip(keys, values, strict=True):
            if key not in known:
                self._pending.put(key, value, replace=self._on_duplicate == "overwrite")
        added = self._pending.num_put - before
        self._commit_if_due()
        return added

    @contextlib.contextmanager
    def _borrowing(self, embeddings: Any) -> Iterator[None]:
        """Collect large embeddings without a copy, and commit them while they are the caller's."""
        if isinstance(embeddings, list):
            num_bytes = sum([getattr(row, "nbytes", 0) for row in embeddings])
        else:
            num_bytes = embeddings.nbytes
        if num_bytes < _COMMITTED_AT_ONCE_BYTES or self._borrows:
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

    def commit(self) -> int:
        """Write what was collected in one transaction. It is durable when this returns.

        Returns:
            The number of embeddings written, with those that a thread was writing.

        Raises:
            CacheFullError: No room; nothing was written, what was collected is kept, and the next
                commit tries again.
            DuplicateSampleError: Another process stored some of them meanwhile, with
                `on_duplicate="error"`; the others are kept for the next commit.
            ProvenanceMismatchError: The store was filled with other weights.
        """
        with self._usable():
            written = self._settle()
            if self._pending.values:
                committed = self._committer.commit(self._pending, self._shape)
                self._count(committed)
                written += committed
                self._forget_pending()
            return written

    def remove(self, sample_ids: Iterable[str]) -> int:
        """Remove embeddings with their checksums in one transaction; durable when this returns.

        What was collected of them is dropped, too. Readers in other processes keep what their
        snapshot has. Later commits reuse the space; `compact` gives it back.

        Returns:
            How many were stored; others are passed over.

        Raises:
            CacheFullError: No room for the pages that change; nothing was removed.
        """
        keys = {sample_key(sample_id) for sample_id in sample_ids}
        with self._usable():
            self._settle()
            removed = self._committer.remove(keys)
            self._pending.drop(keys)
            return removed

    def discard(self) -> None:
        """Drop what was collected since the last commit."""
        with self._lock:
            # What it failed with doesn't matter any more.
            with contextlib.suppress(Exception):
                self._settle()
            self._forget_pending()

    def _forget_pending(self) -> None:
        self._pending.clear()
        self._shape = self._committer.embedding_shape

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
                self._wait_out()
                self._closed = True
                self._committer.close()

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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._store)!r}, {self.num_pending} pending)"

    def __del__(self, process_id: Callable[[], int] = process_id) -> None:
        # An argument: at the end of the interpreter the module's own names are None.
        if not hasattr(self, "_owner") or self._closed or self._owner != process_id():
            return
        in_background = self._in_background
        has_failed = in_background is not None and in_background.error is not None
        if self._pending.values or has_failed:
            warnings.warn(
                f"{self!r} was dropped without commit or close: its pending embeddings are lost",
                ResourceWarning,
                stacklevel=2,
            )

    def __reduce__(self) -> Any:
        raise TypeError("a writer doesn't pickle; open one in the process that writes")

    # ---- commits

    def _commit_if_due(self) -> None:
        if self._in_background is not None and self._in_background.is_done:
            self._settle()
        if not self._pending.is_due(self._limits):
            return
        if self._borrows or self._pending.num_bytes < _BACKGROUND_FROM_BYTES:
            self.commit()
            return
        self._settle()
        # In this order: Ctrl-C between two of these lines loses nothing.
        self._in_background = BackgroundCommit(self._committer, self._pending, self._shape)
        self._pending = PendingEmbeddings()
        self._in_background.start()

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

    def _wait_out(self) -> None:
        """LMDB can't be closed under a thread's commit, whoever is in a hurry."""
        commit = self._in_background
        while commit is not None and not commit.is_done:
            with contextlib.suppress(KeyboardInterrupt):
                commit.wait()

    def _settle(self) -> int:
        """Wait for the commit in the background; if it failed, take its embeddings back."""
        if self._in_background is None:
            return 0
        self._in_background.wait()
        commit, self._in_background = self._in_background, None
        if commit.error is not None:
            self._pending.put_back(commit.pending)
            raise commit.error
        self._count(commit.written)
        return commit.written

    def _count(self, written: int) -> None:
        self._num_written += written
        self._shape = self._committer.embedding_shape

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

    def _known(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys that are stored or will be by the next commit."""
        pending, in_background = self._pending.values, self._in_background
        known = {key for key in keys if key in pending}
        if in_background is not None:
            known |= {key for key in keys if key in in_background.pending.values}
        return known | self._committer.stored(keys)

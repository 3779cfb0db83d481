"""What a writer has collected, and when it is committed: at once or in a thread, and at its end."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy.typing as npt

from lmdbcache.errors import CacheError, DuplicateSampleError, WriterClosedError
from lmdbcache.storage.forking import process_id
from lmdbcache.storage.layout import sample_key
from lmdbcache.storage.writing.background import BackgroundCommit
from lmdbcache.storage.writing.committing import Committer
from lmdbcache.storage.writing.pending import CommitLimits, PendingEmbeddings

__all__ = ["CollectedEmbeddings"]

_BACKGROUND_FROM_BYTES: Final = 32 << 20  # below, handing over costs what it gains


class CollectedEmbeddings:
    """What a writer needs beside its `put`: a collection that is committed when it is due.

    Args:
        store: The store's folder.
        committer: Writes it.
        limits: When it is due.
    """

    def __init__(self, store: Path, committer: Committer, limits: CommitLimits) -> None:
        self._store = store
        self._committer = committer
        self._limits = limits
        self._pending = PendingEmbeddings()
        self._borrows = False
        self._is_together = False
        self._in_background: BackgroundCommit | None = None
        self._shape = committer.embedding_shape
        self._num_written = 0
        self._closed = False
        self._owner = process_id()
        self._lock = threading.RLock()

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

    # ---- commits

    def _commit_if_due(self) -> None:
        if self._is_together:
            return
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

    def _known(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys that are stored or will be by the next commit."""
        if not keys:
            return set()
        pending, in_background = self._pending.values, self._in_background
        known = {key for key in keys if key in pending}
        if in_background is not None:
            known |= {key for key in keys if key in in_background.pending.values}
        return known | self._committer.stored(keys)

"""The store behind an encoder: what it holds, and what is computed but not committed yet."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.util
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.cache import EmbeddingCache, Source, SourceRecorder
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError, CacheNotFoundError, ConfigError, SampleNotFoundError
from lmdbcache.storage import EmbeddingReader, EmbeddingWriter

_logger: Final = logging.getLogger(__name__)


def find_stored(
    reader: EmbeddingReader, sample_ids: Sequence[str], *, are_refused: bool = False
) -> tuple[npt.NDArray[Any] | None, npt.NDArray[np.bool_]]:
    """Return the embeddings of these samples that a store has; each counts once, hit or miss.

    Args:
        reader: Of the store.
        sample_ids: Sample ids; repeats are fine. One that can't be stored is a miss.
        are_refused: Whether a read of these has just failed, so that its misses are counted.

    Returns:
        `(hits, *embedding_shape)` in the order asked for, owned, or None without a hit; and which
        samples these are, `(len(sample_ids),)`.

    Raises:
        InvalidEmbeddingError: The embeddings have several shapes.
        CacheNotFoundError: The store was removed.
    """
    while True:
        if not are_refused:
            with contextlib.suppress(SampleNotFoundError):
                return reader.get_batch(sample_ids), np.ones(len(sample_ids), np.bool_)
        absent = set(reader.missing(sample_ids))
        is_hit = np.fromiter((i not in absent for i in sample_ids), bool, len(sample_ids))
        hits = [i for i in sample_ids if i not in absent]
        with contextlib.suppress(SampleNotFoundError):  # cleared and filled again in between
            return reader.get_batch(hits) if hits or not sample_ids else None, is_hit
        are_refused = False


class StoredEmbeddings:
    """A look-up of whatever is stored; a store that doesn't exist yet isn't an error.

    New commits of any process are seen at the first miss after them. Picklable, fork-safe.

    Args:
        cache: Where to look.
        config: Identity of the store.

    Raises:
        ConfigError: It has windows, which a clip has several of.
    """

    def __init__(self, cache: EmbeddingCache, config: CacheConfig) -> None:
        if config.window is not None:
            raise ConfigError(
                "window: a store of windows has no embedding of a clip as a whole. Read it with an "
                "EmbeddingDataset, of windows or of `RecordingView(reader)`"
            )
        self.cache: Final = cache
        self.config: Final = config
        self._reader: EmbeddingReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def find(
        self, sample_ids: Sequence[str], *, are_refused: bool = False
    ) -> tuple[npt.NDArray[Any] | None, npt.NDArray[np.bool_]]:
        """Return the embeddings of these samples that are stored; see `find_stored`."""
        while (reader := self.reader()) is not None:
            try:
                return find_stored(reader, sample_ids, are_refused=are_refused)
            except CacheNotFoundError:
                self.close()
        return None, np.zeros(len(sample_ids), np.bool_)

    def reader(self) -> EmbeddingReader | None:
        """Return the reader, if anything is stored."""
        if self._reader is None and self.config in self.cache:
            self._reader = self.cache.reader(self.config)
        return self._reader

    def close(self) -> None:
        """Give back the snapshot; the next look-up opens it again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


@dataclass
class Found:
    """The embeddings of a batch that are known.

    Args:
        stored: `(hits, *embedding_shape)`, or None.
        is_stored: `(batch,)`, which those are.
        waiting: Position → embedding that is computed but not committed yet.
    """

    stored: npt.NDArray[Any] | None
    is_stored: npt.NDArray[np.bool_]
    waiting: dict[int, npt.NDArray[Any]]

    @property
    def missing(self) -> list[int]:
        """Positions of the samples that have to be computed."""
        absent = np.flatnonzero(~self.is_stored).tolist()
        return [position for position in absent if position not in self.waiting]

    def completed(self, computed: Mapping[int, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return the whole batch in order, given the missing ones by position."""
        others = {**self.waiting, **computed}
        if self.stored is not None and not others:
            return self.stored
        if not others:
            return np.empty((0,), np.float32)
        first = next(iter(others.values()))
        batch = np.empty((len(self.is_stored), *first.shape), first.dtype)
        if self.stored is not None:
            batch[self.is_stored] = self.stored
        for position, embedding in others.items():
            batch[position] = embedding
        return batch


class WriteBack:
    """The store that one encoder reads from and writes to.

    A writer belongs to a process: a forked or spawned copy opens its own at its first miss. What
    isn't committed at the end of a process is committed by its exit handlers.

    Args:
        cache: Where the store is.
        config: Its identity.
        commit_seconds: Commit at least this often while there is something to commit and the
            encoder is used.
    """

    def __init__(self, cache: EmbeddingCache, config: CacheConfig, commit_seconds: float) -> None:
        self.stored: Final = StoredEmbeddings(cache, config)
        self._commit_seconds = commit_seconds
        self._process_id = -1
        self._writer: EmbeddingWriter | None = None
        self._take_over()

    def __getstate__(self) -> dict[str, Any]:
        stored = self.stored
        return {
            "cache": stored.cache,
            "config": stored.config,
            "commit_seconds": self._commit_seconds,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        WriteBack.__init__(self, **state)

    def _take_over(self) -> None:
        """Make this process the owner; what was inherited over a fork is the parent's."""
        if self._process_id != os.getpid():
            self._writer = None
            self._since: float | None = None
            self._lock = threading.RLock()
            self._process_id = os.getpid()

    @property
    def lock(self) -> threading.RLock:
        """Held from a look-up until what it lacked is added, so that nothing is computed twice."""
        self._take_over()
        return self._lock

    def find(self, sample_ids: Sequence[str], *, are_refused: bool = False) -> Found:
        """Return what is stored, or computed already, of these samples; see `find_stored`."""
        if self._since is not None and time.monotonic() - self._since >= self._commit_seconds:
            self.flush()
        stored, is_stored = self.stored.find(sample_ids, are_refused=are_refused)
        waiting = {}
        if self._writer is not None and not is_stored.all():
            for position in np.flatnonzero(~is_stored).tolist():
                embedding = self._writer.uncommitted(sample_ids[position])
                if embedding is not None:
                    waiting[position] = embedding
        return Found(stored, is_stored, waiting)

    def open_writer(self, provenance: Mapping[str, str]) -> None:
        """Open the writer of this process, before anything is computed for it.

        Raises:
            ProvenanceMismatchError: The store was filled with other weights, or with known ones
                and the provenance states none.
            ReadOnlyCacheError: This user may not write there.
        """
        if self._writer is None:
            cache, config = self.stored.cache, self.stored.config
            cache.check_writable(config)
            self._recorder = SourceRecorder(cache.path(config))
            self._writer = cache.writer(
                config,
                provenance=provenance,
                commit_seconds=self._commit_seconds,
                before_commit=self._recorder,
            )
            self._writer.check_provenance()

    def add(
        self,
        sample_ids: Sequence[str],
        embeddings: npt.NDArray[Any],
        lengths: Mapping[str, int],
    ) -> None:
        """Have these committed before long; from now on `find` has them.

        Args:
            sample_ids: `(n,)`.
            embeddings: `(n, *embedding_shape)`, stored dtype.
            lengths: Sample id → how many samples of its clip aren't padding, where that is known.

        Raises:
            InvalidEmbeddingError: Another shape than the store's.
            CacheFullError: No room; they are kept in memory and committed when there is.
        """
        if self._writer is None:  # closed by another thread
            return
        if self._since is None:
            self._since = time.monotonic()
        for sample_id, length in lengths.items():
            if 0 < length <= self.stored.config.num_samples:
                source = Source("", 0, None, None, num_valid=length)
                self._recorder.note(sample_id, source)
        try:
            self._writer.put_batch(sample_ids, embeddings)
        finally:
            self._note_pending()

    def flush(self) -> None:
        """Commit what is computed; durable when this returns."""
        with self.lock:
            if self._writer is not None:
                try:
                    self._writer.commit()
                finally:
                    self._note_pending()

    def close(self) -> None:
        """Commit what is computed, and give back reader and writer; used again, they reopen."""
        with self.lock:
            writer, self._writer = self._writer, None
            try:
                if writer is not None:
                    writer.close()
            finally:
                _unfinished.discard(self)
                self._since = None
                self.stored.close()

    def _note_pending(self) -> None:
        if self._writer is not None and self._writer.num_pending:
            _unfinished.add(self)
            _flush_at_exit()
        else:
            _unfinished.discard(self)
            self._since = None


# Encoders of this process with something to commit, unreferenced ones included: a
# commit out of a finalizer could meet another one half done in its own thread.
_unfinished: set[WriteBack] = set()
_has_exit_handler_in = -1


def _flush_at_exit() -> None:
    """Have `_flush_all` called at the end of this process, be it multiprocessing's child or not."""
    global _has_exit_handler_in  # noqa: PLW0603 - module state of one process
    if _has_exit_handler_in != os.getpid():
        multiprocessing.util.Finalize(None, _flush_all, exitpriority=10)
        _has_exit_handler_in = os.getpid()


def _flush_all() -> None:
    for write_back in list(_unfinished):
        try:
            write_back.close()
        except (CacheError, OSError) as error:
            _logger.error("computed embeddings couldn't be committed at exit: %s", str(error))


os.register_at_fork(after_in_child=_unfinished.clear)

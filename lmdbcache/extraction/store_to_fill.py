"""One store that a run fills: what it lacks, what is put into it, and what became of its clips."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.audio import AudioSource
from lmdbcache.cache import (
    ClipFailure,
    EmbeddingCache,
    SourceRecorder,
    changed_clips,
    num_suspects,
)
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import AudioModel, ModuleEmbedder, module_digest, moved_weights
from lmdbcache.errors import CacheError, InvalidEmbeddingError
from lmdbcache.extraction.staging import Staging
from lmdbcache.extraction.summary import Outcomes
from lmdbcache.storage import (
    EmbeddingReader,
    EmbeddingWriter,
    first_window,
    is_first_window,
    recording_of,
)

if TYPE_CHECKING:
    from lmdbcache.extraction.decoding import FeatureBatch

_logger: Final = logging.getLogger(__name__)


class StoreToFill:
    """One of the stores of a run.

    Args:
        cache: Where to store.
        config: The identity of the embeddings.
        paths: The clips of this process: sample id → audio file or source.
        failures: Of clips that are in no unit.
        staging: Where a rank stores instead of `cache`.
        dataset_root: See `extract`.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        config: CacheConfig,
        *,
        paths: Mapping[str, str | AudioSource],
        failures: Iterable[ClipFailure] = (),
        staging: Staging | None = None,
        dataset_root: str | Path = "",
    ) -> None:
        self.cache: Final = cache if staging is None else staging.cache
        self.config: Final = config
        self.path: Final = self.cache.path(config)
        self.outcomes: Final = Outcomes(failures)
        self.missing: set[str] = set()  # what the plan has found, less what others have stored
        self.changed: set[str] = set()
        self.to_be_written: set[str] = set()  # by all ranks that fill this store
        self.num_cached = 0
        self.num_extracted = 0
        self.num_windows: int | None = None
        self.num_suspects = 0
        self.moved_model = ""
        self.has_company = False
        self._paths = paths
        self._staging = staging
        self._dataset_root = dataset_root
        self._recorder = SourceRecorder(self.path, dataset_root)
        self._reader: EmbeddingReader | None = None
        self._writer: EmbeddingWriter | None = None
        self._num_put = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep a staging store to this process, and the reader open.

        Raises:
            StorageError: The same rank is running already.
            ReadOnlyCacheError: The staging folder can't be written.
        """
        with ExitStack() as stack:
            if self._staging is not None:
                stack.enter_context(self._staging.held())
            stack.callback(self.close_reader)
            yield

    # ---- the plan

    def plan(
        self, asked: Collection[str], stored: Collection[str], *, recompute_changed: bool
    ) -> set[str]:
        """Return the samples of this process that are to be computed for this store.

        Args:
            asked: Those of all processes that fill this store.
            stored: Those that are stored where this process can't see them.
            recompute_changed: See `ExtractionRun.plan`.

        Raises:
            CacheError: The store or, with `recompute_changed`, its records can't be read.
        """
        missing = self._not_stored(set(asked).difference(stored))
        if self._staging is not None:
            missing -= self._staging.stored(missing)
        self.to_be_written = missing
        self.missing = missing.intersection(self._paths)
        self._look_at_sources(recompute_changed=recompute_changed)
        self.missing |= self.changed
        self.num_cached = len(self._paths) - len(self.missing)
        return self.missing

    def _look_at_sources(self, *, recompute_changed: bool) -> None:
        """Count the cached clips whose file isn't as it was, or note those that changed."""
        cached = {
            self._stored_as(sample_id): source
            for sample_id, source in self._paths.items()
            if isinstance(source, str) and sample_id not in self.missing
        }
        if not cached:
            return
        if recompute_changed:
            self.changed = set(map(self._clip_of, changed_clips(self.path, cached)))
            return
        with suppress(CacheError):  # `check_sources` reports what is wrong with the records
            self.num_suspects = num_suspects(self.path, cached)
            if self._staging is not None:
                self.num_suspects += num_suspects(self._staging.root_store, cached)

    def _stored_as(self, clip: str) -> str:
        """The sample id that is stored of a clip."""
        return clip

    def _clip_of(self, sample_id: str) -> str:
        """The clip that a stored sample id is of."""
        return sample_id

    def compare_weights(self, model: str | os.PathLike[str] | AudioModel) -> None:
        """Compare the weights of a model that won't run with those that filled the store.

        A Hub name that means other weights now is a warning: only the name is known. Of a module at
        hand it is an error, as hits would pass for its embeddings.

        Raises:
            ProvenanceMismatchError: A module with other weights.
        """
        reader = self._open_reader()
        if reader is not None and isinstance(model, ModuleEmbedder):
            digest = module_digest(model.module)
            reader.metadata.with_provenance({"weights_digest": digest}, reader.path)
        elif reader is not None and isinstance(model, (str, os.PathLike)):
            self.moved_model = moved_weights(model, reader.metadata.provenance, reader.path)
            if self.moved_model:
                _logger.warning("%s", self.moved_model)

    # ---- what is stored, by the one reader of the store

    def _open_reader(self) -> EmbeddingReader | None:
        if self._reader is None and self.config in self.cache:
            self._reader = self.cache.reader(self.config, track_usage=False)
        return self._reader

    def close_reader(self) -> None:
        """Close the reader; the next question opens another."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _not_stored(self, sample_ids: Collection[str]) -> set[str]:
        reader = self._open_reader()
        return set(sample_ids if reader is None else reader.missing(sample_ids))

    def known_shape(self) -> tuple[int, ...] | None:
        """Return the shape of the store's embeddings; None while it is empty."""
        reader = self._open_reader()
        shape = None if reader is None else reader.embedding_shape
        if shape is None and self._staging is not None:
            shape = self._staging.shape()
        return None if shape is None or None in shape else tuple(size or 0 for size in shape)

    # ---- the work

    def wants(self, sample_ids: Collection[str]) -> bool:
        """Look once more, right before a unit is decoded, whether another run has stored it."""
        ours = self.missing.intersection(sample_ids)
        if not ours:
            return False
        if self._not_stored(ours) or not self.changed.isdisjoint(ours):
            return True
        self.has_company = True
        self.outcomes.settled.update(ours)
        self.missing -= ours
        return False

    def open_writer(self, provenance: Mapping[str, str], commit_seconds: float) -> EmbeddingWriter:
        """Open the writer.

        Raises:
            ProvenanceMismatchError: The store was filled with other weights or features.
        """
        if self._staging is not None:
            self._staging.check_provenance(provenance)
        self._writer = self.cache.writer(
            self.config,
            provenance=provenance,
            dataset_root=self._dataset_root,
            overwritten=self.changed,  # and nothing else: another run's bits stay
            commit_seconds=commit_seconds,
            before_commit=self._recorder,
        )
        return self._writer

    def lacking(self, unit: FeatureBatch) -> tuple[str, ...]:
        """Return the clips of a unit that are to be computed for this store."""
        return tuple(one for one in unit.sample_ids if one in self.missing)

    def put(self, batch: FeatureBatch, embeddings: Iterable[Any]) -> None:
        """Add what was computed together, to be stored together.

        The rest of a unit, computed by another run, would be another batch.

        Args:
            batch: The clips.
            embeddings: Those of `batch.sample_ids`, in order.
        """
        writer = self._open_one()
        with writer.together():
            for sample_id, embedding in zip(batch.sample_ids, embeddings, strict=True):
                self._recorder.note(sample_id, batch.sources.get(sample_id))
                try:
                    writer.put(sample_id, embedding)
                except InvalidEmbeddingError as error:
                    path = str(self._paths[sample_id])
                    self.outcomes.failures.append(ClipFailure(sample_id, path, str(error)))
                else:
                    self._num_put += 1
                    self.outcomes.note_stored(sample_id, embedding, batch)
        # What another run has stored before us is skipped.
        self.has_company |= writer.num_written + writer.num_pending < self._num_put
        self.outcomes.note(batch.sample_ids, batch.failures)

    def finish(self, unit: FeatureBatch) -> None:
        """Note what failed of a unit, all of which has been put."""
        self.outcomes.note((), [one for one in unit.failures if one.sample_id in self.missing])

    def _open_one(self) -> EmbeddingWriter:
        if self._writer is None:
            raise RuntimeError("open_writer comes first")
        return self._writer

    def discard(self) -> None:
        """Drop what isn't committed."""
        if self._writer is not None:
            self._writer.discard()

    def commit(self) -> None:
        """Commit what was put."""
        if self._writer is not None:
            self._writer.commit()

    def commit_in_spite_of(self, error: BaseException) -> None:
        """Commit what can be committed while an error ends the run.

        Each embedding is whole: what was computed is worth keeping.
        """
        writer = self._writer
        if writer is None or not writer.num_pending:
            return
        try:
            writer.commit()
        except CacheError as another:
            if not isinstance(error, CacheError):
                _logger.error(
                    "%d embeddings couldn't be committed: %s", writer.num_pending, another
                )

    def count(self) -> None:
        """Take down how many embeddings the writer has committed."""
        self.num_extracted = self._writer.num_written if self._writer else 0


class StoreOfWindowsToFill(StoreToFill):
    """A store of windows: its clips are recordings, which are stored in full or missing.

    The first window of a recording is put behind all others, as it says that they are there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stored: dict[str, frozenset[str]] = {}  # windows of the missing recordings
        self._outdated: set[str] = set()  # recordings with windows of another content
        self._first: dict[str, tuple[Any, FeatureBatch]] = {}  # embeddings, and their batches
        self._failed: set[str] = set()
        self._finished: list[str] = []

    def _stored_as(self, clip: str) -> str:
        return first_window(clip)

    def _clip_of(self, sample_id: str) -> str:
        return recording_of(sample_id)

    def stored_windows(self, recording: str) -> frozenset[str]:
        """Return the windows that needn't be computed of a recording that is missing."""
        if recording not in self._stored:
            reader = self._open_reader()
            found = [] if reader is None else reader.window_ids(recording)
            path = self._paths[recording]
            is_outdated = recording in self.changed
            if found and isinstance(path, str) and not is_outdated:
                is_outdated = bool(changed_clips(self.path, dict.fromkeys(found, path)))
            if is_outdated:
                self._outdated.add(recording)
            self._stored[recording] = frozenset(() if is_outdated else found)
        return self._stored[recording]

    def lacking(self, unit: FeatureBatch) -> tuple[str, ...]:
        """Return the windows of a batch, all or none: part of a batch would have other bits."""
        if unit.recording not in self.missing or unit.recording in self._failed:
            return ()
        needed = set(unit.sample_ids).difference(self.stored_windows(unit.recording))
        return tuple(unit.sample_ids) if needed else ()

    def put(self, batch: FeatureBatch, embeddings: Iterable[Any]) -> None:
        """Add what was computed together, but for the recording's first window."""
        recording, rows = batch.recording, list(zip(batch.sample_ids, embeddings, strict=True))
        writer = self._open_one()
        if recording in self._outdated:
            writer.remove([recording])
            self._outdated.discard(recording)
        self._fail(batch.failures)
        stored = self._stored[recording]
        with writer.together():
            for sample_id, embedding in rows:
                if is_first_window(sample_id):
                    # A row of the batch would keep all of it.
                    self._first[recording] = embedding.clone(), replace(batch, features=None)
                elif sample_id not in stored:
                    self._put(sample_id, embedding, batch)
        self.has_company |= writer.num_written + writer.num_pending < self._num_put

    def finish(self, unit: FeatureBatch) -> None:
        """Behind the last batch of a recording: add its first window, if all others are there."""
        recording = unit.recording
        if not unit.is_last or recording not in self.missing:
            return
        first, batch = self._first.pop(recording, (None, unit))
        self._fail(unit.failures)
        if first is None or recording in self._failed:
            return
        with self._open_one().together():
            self._put(first_window(recording), first, batch)
        if recording not in self._failed:
            self._finished.append(recording)
            self.outcomes.note_finished(unit)

    def _put(self, sample_id: str, embedding: Any, batch: FeatureBatch) -> None:
        recording = recording_of(sample_id)
        source = batch.sources.get(sample_id)
        self._recorder.note(sample_id, source)
        try:
            self._open_one().put(sample_id, embedding)
        except InvalidEmbeddingError as error:
            self._fail([ClipFailure(recording, str(self._paths[recording]), str(error))])
        else:
            self._num_put += 1
            self.outcomes.note_stored(sample_id, embedding, batch)

    def _fail(self, failures: Iterable[ClipFailure]) -> None:
        """Note recordings that aren't whole, each with its first failure."""
        for failure in failures:
            if failure.sample_id not in self._failed and failure.sample_id in self.missing:
                self._failed.add(failure.sample_id)
                self.outcomes.note((), [failure])

    def count(self) -> None:
        """Take down how many recordings, and windows in all, have been committed."""
        self.num_extracted = len(self._finished) - len(self._not_stored(self._finished))
        self.num_windows = self._writer.num_written if self._writer else 0

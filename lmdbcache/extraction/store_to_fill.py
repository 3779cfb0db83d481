"""One store that a run fills: what it lacks, what is put into it, and what became of its clips."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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
from lmdbcache.storage import EmbeddingReader, EmbeddingWriter, first_window, is_first_window

if TYPE_CHECKING:
    from lmdbcache.extraction.decoding import FeatureBatch

_logger: Final = logging.getLogger(__name__)


class StoreToFill:
    """One of the stores of a run.

    With windows a clip is a recording, which is stored in full or missing: its first window is put
    behind all others, as it says that they are there.

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
        self._failed: set[str] = set()
        self._stored: dict[str, frozenset[str]] = {}  # windows of the missing recordings
        self._outdated: set[str] = set()  # recordings with windows of another content

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
        clips = {
            clip if self.config.window is None else first_window(clip): clip
            for clip, source in self._paths.items()
            if isinstance(source, str) and clip not in self.missing
        }
        cached = {sample_id: str(self._paths[clip]) for sample_id, clip in clips.items()}
        if not cached:
            return
        if recompute_changed:
            self.changed = {clips[sample_id] for sample_id in changed_clips(self.path, cached)}
            return
        with suppress(CacheError):  # `check_sources` reports what is wrong with the records
            self.num_suspects = num_suspects(self.path, cached)
            if self._staging is not None:
                self.num_suspects += num_suspects(self._staging.root_store, cached)

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
        """Return what of a unit is to be computed for this store.

        Of windows all or none: part of a batch would have other bits.
        """
        if not unit.recording:
            return tuple(one for one in unit.sample_ids if one in self.missing)
        if unit.recording not in self.missing or unit.recording in self._failed:
            return ()
        stored = self.stored_windows(unit.recording)
        return () if stored.issuperset(unit.sample_ids) else tuple(unit.sample_ids)

    def put(self, batch: FeatureBatch, embeddings: Iterable[Any]) -> None:
        """Add what was computed together, to be stored together.

        The rest of a unit, computed by another run, would be another batch.

        Args:
            batch: The clips or windows.
            embeddings: Those of `batch.sample_ids`, in order.
        """
        writer = self._open_one()
        if batch.recording in self._outdated:
            writer.remove([batch.recording])
            self._outdated.discard(batch.recording)
        self._fail(batch.failures)
        stored = self._stored.get(batch.recording, frozenset())
        rows = zip(batch.sample_ids, embeddings, strict=True)
        with writer.together():
            for sample_id, embedding in sorted(rows, key=lambda row: is_first_window(row[0])):
                clip = batch.recording or sample_id
                if sample_id in stored or (is_first_window(sample_id) and clip in self._failed):
                    continue
                self._recorder.note(sample_id, batch.sources.get(sample_id))
                try:
                    writer.put(sample_id, embedding)
                except InvalidEmbeddingError as error:
                    self._fail([ClipFailure(clip, str(self._paths[clip]), str(error))])
                else:
                    self._num_put += 1
                    self.outcomes.note_stored(sample_id, embedding, batch.audio.get(sample_id))
        # What another run has stored before us is skipped.
        self.has_company |= writer.num_written + writer.num_pending < self._num_put

    def finish(self, unit: FeatureBatch) -> None:
        """Note what became of the clips that nothing follows of, all of which has been put."""
        self._fail(unit.failures)
        finished = self.missing.intersection(unit.finished) - self._failed
        self.outcomes.note_finished(finished, unit)

    def _fail(self, failures: Iterable[ClipFailure]) -> None:
        """Note clips that failed, each with its first failure."""
        for failure in failures:
            if failure.sample_id not in self._failed and failure.sample_id in self.missing:
                self._failed.add(failure.sample_id)
                self.outcomes.note_failed(failure)

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
        """Take down how many clips, and windows in all, have been committed."""
        self.num_extracted = self._writer.num_written if self._writer else 0
        if self.config.window is not None:
            self.num_windows = self.num_extracted
            done = self.missing.intersection(self.outcomes.settled) - self._failed
            self.num_extracted = len(done) - len(self._not_stored(done))

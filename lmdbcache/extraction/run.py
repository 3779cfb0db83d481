"""One extraction: what is missing, and the loop over its batches."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.audio import AudioSource, decoder_of
from lmdbcache.cache import ClipFailure, EmbeddingCache, SourceRecorder, changed_clips, num_suspects
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import Embedder, FrontEnd, folder_provenance
from lmdbcache.errors import (
    AudioDecodeError,
    CacheError,
    InvalidEmbeddingError,
    MissingDependencyError,
    ModuleError,
)
from lmdbcache.extraction.outcomes import Outcomes
from lmdbcache.extraction.rank_share import RankShare
from lmdbcache.extraction.samples import distinct_clips
from lmdbcache.extraction.space import check_space
from lmdbcache.extraction.staging import Staging
from lmdbcache.extraction.summary import ExtractionSummary
from lmdbcache.extraction.turns import order_of_units
from lmdbcache.extraction.units import units_of
from lmdbcache.storage import EmbeddingWriter

if TYPE_CHECKING:
    from lmdbcache.extraction.feature_batch import FeatureBatch
    from lmdbcache.extraction.forward_passes import ForwardPasses

__all__ = ["ExtractionRun", "Progress"]

_logger: Final = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class ExtractionRun:
    """One extraction: its plan, and what became of its clips."""

    def __init__(
        self,
        cache: EmbeddingCache,
        config: CacheConfig,
        *,
        progress: Progress | None = None,
        dataset_root: str | Path = "",
        share: RankShare | None = None,
    ) -> None:
        self.cache = cache
        self.config = config
        self._progress = progress
        self._num_done = 0
        self._stored_elsewhere: Collection[str] = ()
        self.dataset_root = dataset_root
        self.paths: dict[str, str | AudioSource] = {}
        self.asked: set[str] = set()
        self.outcomes = Outcomes()
        self.num_cached = 0
        self.writer: EmbeddingWriter | None = None
        self.compute_seconds = 0.0
        self.built_model = False
        self.changed: set[str] = set()
        self.num_suspects = 0
        self.left_out: dict[str, Any] = {}
        self.moved_model = ""
        self.model = ""
        self.share = RankShare() if share is None else share
        self.staging: Staging | None = None
        self._all_samples: list[str] = []
        self._missing_on_disk: Collection[str] = ()
        self._recorder = SourceRecorder(cache.path(config), dataset_root)

    def take(
        self,
        clips: Iterable[tuple[str, str | os.PathLike[str] | AudioSource]],
        unit_size: int,
        stored: Collection[str] = (),
    ) -> None:
        """Take our share of these clips, and leave out of it what is stored elsewhere.

        Raises:
            DatasetError: Two files for one sample id.
        """
        paths, failures = distinct_clips(clips)
        self._stored_elsewhere = set(stored)
        self._all_samples = list(paths)
        ours = paths if self.share.is_all else self.share.of(paths, unit_size)
        self.paths = {sample_id: paths[sample_id] for sample_id in ours}
        if self.share.rank == 0:  # they are in no unit
            self.outcomes = Outcomes(failures)
        self.asked = {*self.paths, *(failure.sample_id for failure in self.outcomes.failures)}

    def stage(self, folder: str | os.PathLike[str], unit_size: int, **options: float) -> Staging:
        """Write to a store of our own in a staging folder; what the root holds is left out."""
        self.staging = Staging(
            folder, self.cache, self.config, self.share, self._all_samples, unit_size, **options
        )
        self.cache = self.staging.cache
        self._recorder = SourceRecorder(self.cache.path(self.config), self.dataset_root)
        return self.staging

    def plan(self) -> dict[str, str | AudioSource]:
        """The missing clips by sample id, sorted."""
        # Ranks that fill one store look at the space that all of them need.
        asked = self.paths if self.staging or self.share.is_all else self._all_samples
        missing = set(asked) - set(self._stored_elsewhere)
        if self.config in self.cache:
            missing = set(self.cache.coverage(self.config, missing).missing)
        if self.staging is not None:
            missing -= self.staging.stored(missing)
        self._missing_on_disk = missing
        ours = [sample_id for sample_id in sorted(self.paths) if sample_id in missing]
        self.num_cached = len(self.paths) - len(ours)
        self.outcomes.settled = self.asked - set(ours)
        return {sample_id: self.paths[sample_id] for sample_id in ours}

    def look_at_sources(
        self, missing: dict[str, str | AudioSource], *, recompute: bool
    ) -> dict[str, str | AudioSource]:
        """Count the cached clips whose file isn't as it was, or add those that changed.

        Args:
            missing: As `plan` gives it.
            recompute: Add them.

        Returns:
            What is to be computed, sorted.

        Raises:
            CacheError: They are to be added, and their records can't be read.
        """
        cached = {
            sample_id: source
            for sample_id, source in self.paths.items()
            if isinstance(source, str) and sample_id not in missing
        }
        if not cached:
            return missing
        store = self.cache.path(self.config)
        if not recompute:
            with suppress(CacheError):  # `verify --sources` tells what is wrong with the records
                self.num_suspects = num_suspects(store, cached)
                if self.staging is not None:
                    self.num_suspects += num_suspects(self.staging.root_store, cached)
            return missing
        self.changed = set(changed_clips(store, cached))
        self.num_cached -= len(self.changed)
        self.outcomes.settled -= self.changed
        wanted = self.changed | missing.keys()
        return {sample_id: self.paths[sample_id] for sample_id in sorted(wanted)}

    @property
    def all_samples(self) -> list[str]:
        """Those of all ranks."""
        return self._all_samples

    @property
    def missing_on_disk(self) -> Collection[str]:
        """What will be written to our store, by all that fill it."""
        return self._missing_on_disk

    def known_shape(self) -> tuple[int, ...] | None:
        """Shape of the store's embeddings; None if there are none yet."""
        shape = None
        if self.config in self.cache:
            with self.cache.reader(self.config, track_usage=False) as reader:
                shape = reader.embedding_shape
        elif self.staging is not None:
            shape = self.staging.shape()
        return None if shape is None or None in shape else tuple(size or 0 for size in shape)

    def check_space(self, shape: tuple[int, ...] | None) -> None:
        """Refuse what the disk can't hold; without a shape nothing is known.

        Raises:
            CacheFullError: See `lmdbcache.extraction.space.check_space`.
        """
        shape = shape or self.known_shape()
        if shape is not None:
            num_stores = self.staging.num_stores if self.staging else 1
            sample_ids = {*self._missing_on_disk, *self.changed}
            store = self.cache.path(self.config)
            check_space(store, sample_ids, shape, self.config.dtype, num_stores)

    def still_missing(self, sample_ids: Iterable[str]) -> tuple[str, ...]:
        """Those that no other process has stored meanwhile, and those to be computed again."""
        sample_ids = list(sample_ids)
        missing = self.cache.coverage(self.config, sample_ids).missing
        return (*missing, *(i for i in sample_ids if i in self.changed and i not in missing))

    def work(
        self,
        missing: Mapping[str, str | AudioSource],
        front_end: FrontEnd,
        make_embedder: Callable[[], Embedder],
        *,
        batch_size: int,
        num_workers: int,
        commit_seconds: float,
        place: int,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Decode, embed and store what is missing.

        Args:
            missing: Sample id → audio file, sorted.
            front_end: Waveform → features.
            make_embedder: Called when the first features are there.
            batch_size: Clips per forward pass.
            num_workers: Decoding processes.
            commit_seconds: Commit at least this often.
            place: Which of the runs that fill this store; decides where to begin.
            shape: That every embedding has to have; None takes any.

        Raises:
            CacheError: See `lmdbcache.extraction.pipeline.extract`.
        """
        # torch is needed from here on, not for a run that has nothing to do.
        try:
            from lmdbcache.extraction.decoding import feature_batches, worker_errors
            from lmdbcache.extraction.feature_batch import Clip
            from lmdbcache.extraction.forward_passes import ForwardPasses
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f'extraction needs the package {error.name}: pip install "lmdbcache[audio]"'
            ) from error

        units = [
            [Clip(sample_id, missing[sample_id]) for sample_id in unit]
            for unit in units_of(self.paths, missing, batch_size)
            if unit
        ]
        _logger.info("%d clips to extract, %d cached", len(missing), self.num_cached)
        # Before the workers are forked, so that what it imports is there for all of them.
        features = front_end.provenance()
        self._advance(self.num_cached)

        def is_wanted(sample_ids: list[str]) -> bool:
            if self.still_missing(sample_ids):
                return True
            self._leave_out(sample_ids)
            return False

        batches = feature_batches(
            units,
            front_end,
            num_workers=num_workers,
            sample_rate=self.config.sample_rate,
            duration=self.config.duration,
            decoder=decoder_of(self.config.front_end),
            order=partial(order_of_units, place=place),
            is_wanted=is_wanted,
        )
        is_proven = self.outcomes.is_front_end_proven = self.known_shape() is not None
        passes: ForwardPasses | None = None
        with ExitStack() as stack:
            stack.callback(batches.close)
            stack.enter_context(worker_errors())
            with self._keeping():
                for batch in batches:
                    wanted = set(self.still_missing(batch.sample_ids))
                    self._leave_out([i for i in batch.sample_ids if i not in wanted])
                    batch.keep(wanted)
                    if batch.features is not None:
                        if passes is None or self.writer is None:
                            embedder = make_embedder()
                            if shape is None:
                                # A module finds it out by a clip of noise, and may fail on that.
                                with suppress(AudioDecodeError, ModuleError):
                                    self.check_space(embedder.embedding_shape)
                            self.writer = stack.enter_context(
                                self._writer({**features, **embedder.provenance()}, commit_seconds)
                            )
                            self.built_model = True
                            passes = ForwardPasses(
                                embedder, self.config, shape, is_proven=is_proven
                            )
                        self._embed(batch, passes, self.writer)
                    self._count(batch)
                self.outcomes.check_front_end(is_last=True)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Commit at the end of what is done inside, however it ends."""
        try:
            yield
            if self.writer is not None:
                self.writer.commit()
        except BaseException as error:
            # Each embedding stands for itself: what was computed is worth keeping.
            self._commit_in_spite_of(error)
            raise
        finally:
            self.outcomes.record_failures(self.cache.path(self.config))

    def _advance(self, number: int) -> None:
        self._num_done += number
        if self._progress is not None:
            self._progress(self._num_done, len(self.paths))

    def _commit_in_spite_of(self, error: BaseException) -> None:
        if self.writer is None or not self.writer.num_pending:
            return
        try:
            self.writer.commit()
        except CacheError as another:
            if not isinstance(error, CacheError):
                _logger.error(
                    "%d embeddings couldn't be committed: %s", self.writer.num_pending, another
                )

    def _leave_out(self, sample_ids: Collection[str]) -> None:
        """Another process has stored these since the run began."""
        self.outcomes.settled.update(sample_ids)
        self._advance(len(sample_ids))

    def _writer(self, provenance: Mapping[str, str], commit_seconds: float) -> EmbeddingWriter:
        provenance = {**folder_provenance(self.model), **provenance}
        if self.staging is not None:
            self.staging.check_provenance(provenance)
        return self.cache.writer(
            self.config,
            provenance=provenance,
            dataset_root=self.dataset_root,
            overwritten=self.changed,  # and nothing else: another run's bits stay
            commit_seconds=commit_seconds,
            before_commit=self._recorder,
        )

    def _embed(self, batch: FeatureBatch, passes: ForwardPasses, writer: EmbeddingWriter) -> None:
        started = time.perf_counter()
        try:
            embeddings = passes.embed(batch)
        except InvalidEmbeddingError:
            writer.discard()  # of the same model
            raise
        if not self.compute_seconds and embeddings:
            self.check_space(tuple(embeddings[0].shape))
        self.compute_seconds += time.perf_counter() - started
        batch.failures = [
            replace(failure, path=failure.path or str(self.paths[failure.sample_id]))
            for failure in batch.failures
        ]
        self._put(batch, embeddings, writer)

    def _put(self, batch: FeatureBatch, embeddings: Iterable[Any], writer: EmbeddingWriter) -> None:
        # What is computed together is stored together: the rest of a unit, computed by another
        # run, would be another batch.
        with writer.together():
            for sample_id, embedding in zip(batch.sample_ids, embeddings, strict=True):
                self._recorder.note(sample_id, batch.sources.get(sample_id))
                try:
                    writer.put(sample_id, embedding)
                except InvalidEmbeddingError as error:
                    path = str(self.paths[sample_id])
                    self.outcomes.failures.append(ClipFailure(sample_id, path, str(error)))
                else:
                    self.outcomes.note_stored(sample_id, embedding, batch)

    def _count(self, batch: FeatureBatch) -> None:
        self._advance(batch.num_clips)
        self.outcomes.note_batch(batch)

    def summary(self, seconds: float) -> ExtractionSummary:
        """What was done."""
        num_extracted = self.writer.num_written if self.writer else 0
        outcomes = self.outcomes
        return ExtractionSummary(
            store=self.cache.path(self.config),
            num_samples=len(self.asked),
            num_cached=len(self.asked) - num_extracted - outcomes.num_failed,
            num_extracted=num_extracted,
            silent=tuple(sorted(outcomes.silent)),
            cancelled=tuple(sorted(outcomes.cancelled)),
            equal=outcomes.equal.groups(),
            failures=tuple(sorted(outcomes.failures, key=lambda failure: failure.sample_id)),
            seconds=seconds,
            compute_seconds=self.compute_seconds,
            built_model=self.built_model,
            moved_model=self.moved_model,
            num_suspects=self.num_suspects,
            rank=self.share.rank,
            world_size=self.share.world_size,
            left_out=self.left_out,
        )

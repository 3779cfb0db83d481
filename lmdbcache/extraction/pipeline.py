"""The extraction: what is missing is decoded, embedded and stored."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.audio import AudioSource, Clips
from lmdbcache.cache import (
    ClipFailure,
    EmbeddingCache,
    SourceRecorder,
    changed_clips,
    num_suspects,
)
from lmdbcache.config import CacheConfig
from lmdbcache.datasets import AudioDataset
from lmdbcache.embedders import (
    AudioModel,
    Embedder,
    FrontEnd,
    ModuleEmbedder,
    device_of_rank,
    folder_provenance,
    module_digest,
    moved_weights,
    ready_model,
)
from lmdbcache.errors import (
    AudioDecodeError,
    CacheError,
    ConfigError,
    InvalidEmbeddingError,
    ModuleError,
)
from lmdbcache.extraction.clips import (
    counts_of_left_out,
    distinct_clips,
    features_of,
    pairs_of,
)
from lmdbcache.extraction.ranks import RankShare
from lmdbcache.extraction.space import check_space
from lmdbcache.extraction.staging import Staging
from lmdbcache.extraction.summary import ExtractionSummary, Outcomes
from lmdbcache.storage import EmbeddingReader, EmbeddingWriter, Progress

if TYPE_CHECKING:
    from lmdbcache.extraction.decoding import FeatureBatch
    from lmdbcache.extraction.embedding import ForwardPasses

__all__ = [
    "ExtractionRun",
    "check_duration",
    "check_options",
    "extract",
    "stored_of_share",
    "units_of",
]

_logger: Final = logging.getLogger(__name__)

_IMPORTED_BY: Final = os.getpid()


def extract(  # noqa: PLR0913
    cache: EmbeddingCache,
    config: CacheConfig,
    clips: Clips | AudioDataset,
    *,
    model: str | os.PathLike[str] | AudioModel | None = None,
    front_end: FrontEnd | None = None,
    make_embedder: Callable[[], Embedder] | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    dataset_root: str | Path = "",
    commit_seconds: float = 10.0,
    recompute_changed: bool = False,
    share: RankShare | None = None,
    staging: str | os.PathLike[str] | None = None,
    stored: Collection[str] = (),
) -> ExtractionSummary:
    """Store the embeddings of these clips; those that are stored already cost nothing.

    The clips, sorted by sample id, are cut into fixed batches; what is missing of each is decoded
    in worker processes, embedded, and committed every few seconds: a run that is killed loses at
    most what wasn't committed, and the next one goes on from there. The model is only loaded when
    there is something for it to do. A clip that can't be decoded, or that the front end or the
    model fails on, is reported and never cached.

    Ctrl-C (KeyboardInterrupt) and an exit from a signal handler commit what is computed and go on
    to the caller. Several runs of the same clips share the work: each leaves out what another has
    committed in the meantime, and takes the rest in an order that no other run has.

    Args:
        cache: Where to store.
        config: The identity of the embeddings.
        clips: A dataset; or sample id (`file_id:class`) → audio file or `AudioSource`.
        model: Hub name, checkpoint folder, or an `AudioModel` such as `ModuleEmbedder`; None takes
            `config.model_name`.
        front_end: Waveform → features; None takes the model's.
        make_embedder: Called once, when the first features are there; None builds the model.
        batch_size: Clips per forward pass.
        num_workers: Decoding processes; None chooses, 0 decodes in this process. So does a process
            that can't start others, with a warning. In a forked process that has torch imported,
            torch is set to one thread, as the parent's other threads don't exist there.
        device: Where the model runs; None takes a CUDA GPU if there is one.
        progress: Called with (clips done, clips in all); `lmdbcache.progress_bar` makes one.
        dataset_root: Kept in the store's metadata.
        commit_seconds: Commit at least this often.
        recompute_changed: Also compute cached clips again whose file has changed since, and
            replace their embeddings.
        share: Take only these of the batches, as one of several processes; see
            `share_from_environment`. They may start at different moments.
        staging: Write to a store of this rank in this folder, for ranks on several machines; what
            `cache` holds is left out, and so is what other ranks have staged before.
            `merge_stores(cache, [staging])` brings it into `cache`.
        stored: Sample ids that are stored where this process can't see them. They keep their
            places in the fixed batches and aren't computed.

    Returns:
        What was done, failures included.

    Raises:
        ConfigError: The config doesn't fit the model, or an option is invalid.
        DatasetError: Two files for one sample id.
        ExtractionError: A decoding process died, the device has too little memory, or the front end
            fails on every clip.
        InvalidEmbeddingError: The model answers differently for the same clip, or with the same
            embedding for different clips; checked when it has embedded its first clips, before
            any is stored.
        ModuleError: A module fails on all of the first clips.
        ModelLoadError: The model can't be loaded.
        ProvenanceMismatchError: The store was filled with other weights or features.
        StorageError: The same rank is running already with this staging folder.
        CacheFullError: The disk has no room for what is missing, which is found out before the
            model is loaded; or it became full: what was committed is kept.
    """
    check_options(batch_size, num_workers, commit_seconds)
    if recompute_changed and staging is not None:
        raise ConfigError(
            "recompute_changed: with a staging folder the root would keep the old embeddings; "
            "extract the changed clips into the root itself"
        )
    run = ExtractionRun(
        cache,
        config,
        clips,
        batch_size=batch_size,
        share=share,
        staging=staging,
        stored=stored,
        dataset_root=dataset_root,
        progress=progress,
    )
    with run.opened():
        missing = run.plan(recompute_changed=recompute_changed)
        _use_one_thread_after_a_fork()
        if not missing:
            return run.nothing_to_do(model)
        run.cache.check_writable(config)
        if model is None or isinstance(model, (str, os.PathLike)):
            run.model = os.fspath(model or config.model_name)
        measured = None
        if front_end is None or make_embedder is None:
            # Here and not in a worker: its errors are for the user to read.
            found = ready_model(config.model_name if model is None else model, config)
            front_end = front_end or found.make_front_end(config)
            check_duration(config, front_end)
            shape = None if make_embedder else found.embedding_shape(config)
            make_embedder = make_embedder or partial(
                found.make_embedder, config, device or device_of_rank(run.share.local_rank)
            )
            run.check_space(shape)
            # A module's was measured; a family's is an estimate of what it will be.
            measured = shape if isinstance(found, ModuleEmbedder) else None
        if config not in cache and not run.num_cached:
            cache.explain(config).log_new_store()
        run.work(
            missing,
            front_end,
            make_embedder,
            num_workers=run.share.decoding_processes() if num_workers is None else num_workers,
            commit_seconds=commit_seconds,
            shape=measured,
        )
        return run.summary()


def stored_of_share(
    cache: EmbeddingCache,
    config: CacheConfig,
    clips: Clips | AudioDataset,
    *,
    batch_size: int = 8,
    share: RankShare | None = None,
    staging: str | os.PathLike[str] | None = None,
) -> tuple[int, int]:
    """Return (stored, asked): how many samples of a share are stored now.

    The arguments are those of `extract`.
    """
    # A batch system is waiting for our end: other ranks aren't waited for.
    run = ExtractionRun(
        cache, config, clips, batch_size=batch_size, share=share, staging=staging, patience=0.0
    )
    run.plan()
    run.close_reader()
    return run.num_cached, len(run.paths)


class ExtractionRun:
    """One extraction: its plan, and what became of its clips.

    Args:
        cache: Where to store.
        config: The identity of the embeddings.
        clips: See `extract`.
        batch_size: See `extract`.
        share: See `extract`.
        staging: See `extract`.
        stored: See `extract`.
        patience: How many seconds to wait for ranks that are about to end; None waits as long as
            one needs to commit.
        dataset_root: See `extract`.
        progress: See `extract`.

    Raises:
        DatasetError: Two files for one sample id.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        config: CacheConfig,
        clips: Clips | AudioDataset,
        *,
        batch_size: int = 8,
        share: RankShare | None = None,
        staging: str | os.PathLike[str] | None = None,
        stored: Collection[str] = (),
        patience: float | None = None,
        dataset_root: str | Path = "",
        progress: Progress | None = None,
    ) -> None:
        self._started = time.perf_counter()
        self.cache, self.config = cache, config
        self.share = RankShare() if share is None else share
        self.model = ""
        self.compute_seconds = 0.0
        self.built_model = False
        self.num_cached = 0
        self.num_extracted = 0
        self._batch_size = batch_size
        self._stored_elsewhere = set(stored)
        self._dataset_root = dataset_root
        self._progress, self._num_done = progress, 0
        self._changed: set[str] = set()
        self._num_suspects = 0
        self._moved_model = ""
        self._left_out = counts_of_left_out(clips)
        self._reader: EmbeddingReader | None = None
        self._num_put = 0
        self._has_company = False

        everything, failures = distinct_clips(pairs_of(clips))
        self.all_samples = list(everything)
        ours = everything if self.share.is_all else self.share.of(everything, batch_size)
        self.paths = {sample_id: everything[sample_id] for sample_id in ours}
        # Sample ids that can't be stored are in no unit.
        self.outcomes = Outcomes(failures if self.share.rank == 0 else ())
        self.asked = {*self.paths, *(failure.sample_id for failure in self.outcomes.failures)}
        self._staging: Staging | None = None
        if staging is not None:
            self._staging = Staging(
                staging, cache, config, self.share, self.all_samples, batch_size, patience
            )
            self.cache = self._staging.cache
        self.store = self.cache.path(config)
        self._recorder = SourceRecorder(self.store, dataset_root)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep a staging store to this process, and the reader of the run open.

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

    def plan(self, *, recompute_changed: bool = False) -> dict[str, str | AudioSource]:
        """Return the clips to be computed by sample id, sorted.

        Args:
            recompute_changed: Add cached clips whose file isn't as it was; otherwise they are only
                counted.

        Raises:
            CacheError: The store or, with `recompute_changed`, its records can't be read.
        """
        # Ranks that fill one store look at the space that all of them need.
        asked = self.paths if self._staging or self.share.is_all else self.all_samples
        missing = self._not_stored(set(asked) - self._stored_elsewhere)
        if self._staging is not None:
            missing -= self._staging.stored(missing)
        self.to_be_written = missing
        ours = missing.intersection(self.paths)
        self._look_at_sources(ours, recompute_changed=recompute_changed)
        ours |= self._changed
        self.num_cached = len(self.paths) - len(ours)
        self.outcomes.settled = self.asked - ours
        return {sample_id: self.paths[sample_id] for sample_id in sorted(ours)}

    def _look_at_sources(self, missing: set[str], *, recompute_changed: bool) -> None:
        """Count the cached clips whose file isn't as it was, or note those that changed."""
        cached = {
            sample_id: source
            for sample_id, source in self.paths.items()
            if isinstance(source, str) and sample_id not in missing
        }
        if not cached:
            return
        if recompute_changed:
            self._changed = set(changed_clips(self.store, cached))
            return
        with suppress(CacheError):  # `check_sources` reports what is wrong with the records
            self._num_suspects = num_suspects(self.store, cached)
            if self._staging is not None:
                self._num_suspects += num_suspects(self._staging.root_store, cached)

    def nothing_to_do(self, model: str | os.PathLike[str] | AudioModel | None) -> ExtractionSummary:
        """Return the summary of a run of hits, whose model is never built.

        Its weights are compared with those that filled the store all the same. A Hub name that
        means other weights now is a warning: only the name is known. Of a module at
        hand it is an error, as hits would pass for its embeddings.

        Raises:
            ProvenanceMismatchError: A module with other weights.
        """
        self.outcomes.record_failures(self.store)
        name = self.config.model_name if model is None else model
        reader = self._open_reader()
        if reader is not None and isinstance(name, ModuleEmbedder):
            digest = module_digest(name.module)
            reader.metadata.with_provenance({"weights_digest": digest}, reader.path)
        elif reader is not None and isinstance(name, (str, os.PathLike)):
            self._moved_model = moved_weights(name, reader.metadata.provenance, reader.path)
            if self._moved_model:
                _logger.warning("%s", self._moved_model)
        return self.summary()

    # ---- what is stored, by the one reader of the run

    def _open_reader(self) -> EmbeddingReader | None:
        if self._reader is None and self.config in self.cache:
            self._reader = self.cache.reader(self.config, track_usage=False)
        return self._reader

    def close_reader(self) -> None:
        """Close the reader of the run; the next question opens another."""
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

    def check_space(self, shape: tuple[int, ...] | None, num_stores: int | None = None) -> None:
        """Refuse what the disk can't hold; without a shape nothing is known.

        Args:
            shape: Of one embedding.
            num_stores: How many such stores are filled on this disk; None asks the staging folder.

        Raises:
            CacheFullError: See `lmdbcache.extraction.space.check_space`.
        """
        shape = shape or self.known_shape()
        if shape is not None:
            if num_stores is None:
                num_stores = self._staging.num_stores if self._staging else 1
            sample_ids = {*self.to_be_written, *self._changed}
            check_space(self.store, sample_ids, shape, self.config.dtype, num_stores)

    # ---- the work

    def work(
        self,
        missing: Mapping[str, str | AudioSource],
        front_end: FrontEnd,
        make_embedder: Callable[[], Embedder],
        *,
        num_workers: int,
        commit_seconds: float,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Decode, embed and store what is missing.

        Args:
            missing: Sample id → audio file, sorted.
            front_end: Waveform → features.
            make_embedder: Called when the first features are there.
            num_workers: Decoding processes.
            commit_seconds: Commit at least this often.
            shape: That every embedding has to have; None takes any.

        Raises:
            CacheError: See `extract`.
        """
        units = [
            [(sample_id, missing[sample_id]) for sample_id in unit]
            for unit in units_of(self.paths, missing, self._batch_size)
            if unit
        ]
        _logger.info("%d clips to extract, %d cached", len(missing), self.num_cached)
        is_proven = self.outcomes.is_front_end_proven = self.known_shape() is not None
        passes: ForwardPasses | None = None
        writer: EmbeddingWriter | None = None
        self._advance(self.num_cached)
        with (
            features_of(
                units,
                self.config,
                front_end,
                num_workers=num_workers,
                order=self._order,
                is_wanted=self._is_wanted,
            ) as batches,
            ExitStack() as stack,
        ):
            # Before the workers are forked, so that what it imports is there for all of them.
            features = front_end.provenance()
            try:
                for batch in batches:
                    if batch.features is not None:
                        if passes is None or writer is None:
                            from lmdbcache.extraction.embedding import ForwardPasses

                            embedder = make_embedder()
                            if shape is None:
                                # A module finds it out by a clip of noise, and may fail on that.
                                with suppress(AudioDecodeError, ModuleError):
                                    self.check_space(embedder.embedding_shape)
                            writer = stack.enter_context(
                                self._writer({**features, **embedder.provenance()}, commit_seconds)
                            )
                            self.built_model = True
                            passes = ForwardPasses(
                                embedder, self.config, shape, is_proven=is_proven
                            )
                        self._put(batch, self._embed(batch, passes, writer), writer)
                    self._advance(batch.num_clips)
                    self.outcomes.note_batch(batch)
                if writer is not None:
                    writer.commit()
            except BaseException as error:
                # Each embedding is whole: what was computed is worth keeping.
                _commit_in_spite_of(error, writer)
                raise
            finally:
                self.num_extracted = writer.num_written if writer else 0
                self.outcomes.record_failures(self.store)
            self.outcomes.check_front_end(is_last=True)

    def _order(self, num_units: int) -> Iterator[int]:
        """Yield the units in key order, as LMDB stores them in the least space.

        Once another run turns out to store the same clips, the rest come in an order of this
        process: two runs that keep step would compute everything twice.
        """
        rest = list(range(num_units - 1, -1, -1))
        is_shuffled = False
        while rest:
            if self._has_company and not is_shuffled:
                random.Random(os.getpid()).shuffle(rest)
                is_shuffled = True
            yield rest.pop()

    def _is_wanted(self, sample_ids: list[str]) -> bool:
        """Look once more, right before a unit is decoded, whether another run has stored it."""
        if self._not_stored(sample_ids) or not self._changed.isdisjoint(sample_ids):
            return True
        self._has_company = True
        self.outcomes.settled.update(sample_ids)
        self._advance(len(sample_ids))
        return False

    def _advance(self, number: int) -> None:
        self._num_done += number
        if self._progress is not None:
            self._progress(self._num_done, len(self.paths))

    def _writer(self, provenance: Mapping[str, str], commit_seconds: float) -> EmbeddingWriter:
        provenance = {**folder_provenance(self.model), **provenance}
        if self._staging is not None:
            self._staging.check_provenance(provenance)
        return self.cache.writer(
            self.config,
            provenance=provenance,
            dataset_root=self._dataset_root,
            overwritten=self._changed,  # and nothing else: another run's bits stay
            commit_seconds=commit_seconds,
            before_commit=self._recorder,
        )

    def _embed(
        self, batch: FeatureBatch, passes: ForwardPasses, writer: EmbeddingWriter
    ) -> list[Any]:
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
        return embeddings

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
                    self._num_put += 1
                    self.outcomes.note_stored(sample_id, embedding, batch)
        # What another run has stored before us is skipped.
        self._has_company |= writer.num_written + writer.num_pending < self._num_put

    def summary(self) -> ExtractionSummary:
        """Return what was done."""
        outcomes = self.outcomes
        return ExtractionSummary(
            store=self.store,
            num_samples=len(self.asked),
            num_cached=len(self.asked) - self.num_extracted - outcomes.num_failed,
            num_extracted=self.num_extracted,
            silent=tuple(sorted(outcomes.silent)),
            cancelled=tuple(sorted(outcomes.cancelled)),
            equal=outcomes.equal_embeddings(),
            failures=tuple(sorted(outcomes.failures, key=lambda failure: failure.sample_id)),
            seconds=time.perf_counter() - self._started,
            compute_seconds=self.compute_seconds,
            built_model=self.built_model,
            moved_model=self._moved_model,
            num_suspects=self._num_suspects,
            rank=self.share.rank,
            world_size=self.share.world_size,
            left_out=self._left_out,
        )


def units_of(
    sample_ids: Iterable[str], missing: Collection[str], unit_size: int
) -> list[list[str]]:
    """Return what is missing in batches that depend on nothing but the samples asked for.

    All samples are cut, sorted, and not only the missing ones: unit 7 is unit 7 for all
    processes that fill the store, whenever each of them looks. The last bits of an embedding depend
    on the batch it was computed in.

    Args:
        sample_ids: All samples of the run.
        missing: Those to be computed.
        unit_size: Clips of a unit.

    Returns:
        The missing samples of each unit; empty where nothing is missing.
    """
    ordered = sorted(sample_ids)
    missing = missing if isinstance(missing, (set, frozenset, dict)) else set(missing)
    return [
        [sample_id for sample_id in ordered[start : start + unit_size] if sample_id in missing]
        for start in range(0, len(ordered), unit_size)
    ]


def _commit_in_spite_of(error: BaseException, writer: EmbeddingWriter | None) -> None:
    if writer is None or not writer.num_pending:
        return
    try:
        writer.commit()
    except CacheError as another:
        if not isinstance(error, CacheError):
            _logger.error("%d embeddings couldn't be committed: %s", writer.num_pending, another)


def _use_one_thread_after_a_fork() -> None:
    """Keep torch from waiting for OpenMP threads that only the parent process has.

    They are gone if the parent has computed with them before the fork, which can't be seen here.
    """
    torch = sys.modules.get("torch")
    if torch is not None and _is_forked():
        torch.set_num_threads(1)


def _is_forked() -> bool:
    if os.getpid() != _IMPORTED_BY:
        return True
    # This module may have been imported after the fork. A process of no particular start method
    # was started by the default one, which spawned processes are given and forked ones may not be.
    own = getattr(multiprocessing.current_process(), "_start_method", None)
    method = own or multiprocessing.get_start_method(allow_none=True) or "fork"
    return multiprocessing.parent_process() is not None and method == "fork"


def check_options(batch_size: int, num_workers: int | None, commit_seconds: float) -> None:
    """Check the options that every kind of run has.

    Raises:
        ConfigError: One is out of range; the message names it.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size}; it must be 1 or more")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"num_workers: {num_workers}; it must be 0 or more")
    if not commit_seconds >= 0:
        raise ConfigError(f"commit_seconds: {commit_seconds}; it must be 0 or more")


def check_duration(config: CacheConfig, front_end: FrontEnd) -> None:
    """Check that the clips are long enough for the front end.

    Raises:
        ConfigError: They aren't.
    """
    if config.num_samples < front_end.min_samples:
        raise ConfigError(
            f"duration: {config.duration} s is {config.num_samples} samples; the front end needs "
            f"{front_end.min_samples}"
        )

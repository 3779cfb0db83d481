"""The extraction: what is missing is decoded, embedded and stored."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from lmdbcache.audio import AudioSource, Clips, announced_samples, decoder_of, num_windows
from lmdbcache.cache import ClipFailure, EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.datasets import AudioDataset
from lmdbcache.embedders import (
    AudioModel,
    Embedder,
    FrontEnd,
    ModuleEmbedder,
    device_of_rank,
    folder_provenance,
    ready_model,
)
from lmdbcache.errors import (
    AudioDecodeError,
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
from lmdbcache.extraction.one_pass import configs_of_one_pass, for_one_or_several
from lmdbcache.extraction.ranks import RankShare
from lmdbcache.extraction.space import Wanted, check_space
from lmdbcache.extraction.staging import Staging
from lmdbcache.extraction.store_to_fill import StoreToFill
from lmdbcache.extraction.summary import ExtractionSummary, FrontEndTrials, warn_of_failures
from lmdbcache.storage import Progress, first_window

if TYPE_CHECKING:
    from lmdbcache.extraction.decoding import FeatureBatch
    from lmdbcache.extraction.embedding import ForwardPasses

_logger: Final = logging.getLogger(__name__)

_IMPORTED_BY: Final = os.getpid()

Shapes: TypeAlias = Mapping[str, "tuple[int, ...] | None"]  # of one embedding, by output


@for_one_or_several
def extract(  # noqa: PLR0913
    cache: EmbeddingCache,
    config: CacheConfig | Sequence[CacheConfig],
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
) -> list[ExtractionSummary]:
    """Store the embeddings of these clips; those that are stored already cost nothing.

    The clips, sorted by sample id, are cut into fixed batches; what is missing of each is decoded
    in worker processes, embedded, and committed every few seconds: a run that is killed loses at
    most what wasn't committed, and the next one goes on from there. The model is only loaded when
    there is something for it to do. A clip that can't be decoded, or that the front end or the
    model fails on, is reported and never cached.

    Ctrl-C (KeyboardInterrupt) and an exit from a signal handler commit what is computed and go on
    to the caller. Several runs of the same clips share the work: each leaves out what another has
    committed in the meantime, and takes the rest in an order that no other run has.

    Several configs fill as many stores: each clip that one of them lacks is decoded once and goes
    through the model once. Each store gets the embeddings that it lacks, with the bits that an
    extraction of its config alone gives.

    Args:
        cache: Where to store.
        config: The identity of the embeddings; or several, which differ in `output` and `dtype`
            only.
        clips: A dataset; or sample id (`file_id:class`) → audio file or `AudioSource`.
        model: Hub name, checkpoint folder, or an `AudioModel` such as `ModuleEmbedder`; None takes
            `config.model_name`.
        front_end: Waveform → features; None takes the model's.
        make_embedder: Called once, when the first features are there; None builds the model. For
            several outputs its result needs `embed_outputs`, see `lmdbcache.embedders.Embedder`.
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
        stored: Sample ids that are stored where this process can't see them, for every config.
            They keep their places in the fixed batches and aren't computed.

    Returns:
        What was done, failures included: one for each config, without a list for one by itself.

    Raises:
        ConfigError: A config doesn't fit the model, several differ in another field, or an option
            is invalid.
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
    configs = configs_of_one_pass(config)
    run = ExtractionRun(
        cache,
        configs,
        clips,
        batch_size=batch_size,
        share=share,
        staging=staging,
        stored=stored,
        dataset_root=dataset_root,
        progress=progress,
    )
    with run.opened():
        _fill(
            run,
            configs[0].model_name if model is None else model,
            front_end,
            make_embedder,
            num_workers=run.share.decoding_processes() if num_workers is None else num_workers,
            device=device,
            commit_seconds=commit_seconds,
            recompute_changed=recompute_changed,
        )
    return run.summaries()


def _fill(
    run: ExtractionRun,
    model: str | os.PathLike[str] | AudioModel,
    front_end: FrontEnd | None,
    make_embedder: Callable[[], Embedder] | None,
    *,
    num_workers: int,
    device: str | None,
    commit_seconds: float,
    recompute_changed: bool,
) -> None:
    """Do the run; see `extract`."""
    missing = run.plan(recompute_changed=recompute_changed)
    _use_one_thread_after_a_fork()
    run.compare_weights(model)
    if not missing:
        run.record_failures()
        return
    run.check_writable()
    if isinstance(model, (str, os.PathLike)):
        run.model = os.fspath(model)
    measured: Shapes = {}
    if front_end is None or make_embedder is None:
        # Here and not in a worker: its errors are for the user to read.
        found = ready_model(model, run.config)
        for store in run.stores:
            found.check(store.config)
        front_end = front_end or found.make_front_end(run.config)
        check_duration(run.config, front_end)
        shapes: Shapes = {}
        if make_embedder is None:
            shapes = {
                output: found.embedding_shape(run.config.replace(output=output))
                for output in outputs_of(run.stores)
            }
            chosen = device or device_of_rank(run.share.local_rank)
            make_embedder = partial(found.make_embedder, run.config, chosen)
        run.check_space(shapes)
        # A module's was measured; a family's is an estimate of what it will be.
        measured = shapes if isinstance(found, ModuleEmbedder) else {}
    run.log_new_stores()
    run.work(
        missing,
        front_end,
        make_embedder,
        num_workers=num_workers,
        commit_seconds=commit_seconds,
        shapes=measured,
    )


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
        cache, [config], clips, batch_size=batch_size, share=share, staging=staging, patience=0.0
    )
    run.plan()
    run.close_readers()
    return run.stores[0].num_cached, len(run.paths)


class ExtractionRun:
    """One extraction: its clips, and the stores that it fills.

    Args:
        cache: Where to store.
        configs: The identities of the embeddings: one or more that differ in `output` and `dtype`
            only.
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
        configs: Sequence[CacheConfig],
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
        self.cache = cache
        self.config = configs[0]  # for what all of them share
        self.share = RankShare() if share is None else share
        self.model = ""
        self.compute_seconds = 0.0
        self.built_model = False
        self._batch_size = batch_size
        self._stored_elsewhere = stored
        self._is_staged = staging is not None
        self._progress, self._num_done = progress, 0
        self._left_out = counts_of_left_out(clips)

        has_windows = self.config.window is not None
        everything, failures = distinct_clips(pairs_of(clips), have_windows=has_windows)
        self.all_samples = list(everything)
        self._everything = everything
        self._nums_windows: dict[str, int] = {}
        # A recording's windows are its batches, and no other's.
        unit_size = self._unit_size = 1 if has_windows else batch_size
        ours = everything if self.share.is_all else self.share.of(everything, unit_size)
        self.paths = {sample_id: everything[sample_id] for sample_id in ours}
        # Sample ids that can't be stored are in no unit.
        refused = failures if self.share.rank == 0 else []
        self.asked = {*self.paths, *(failure.sample_id for failure in refused)}
        staged = [
            Staging(staging, cache, config, self.share, self.all_samples, unit_size, patience)
            if staging is not None
            else None
            for config in configs
        ]
        self.num_stores_on_disk = staged[0].num_stores if staged[0] else 1
        self.stores = [
            StoreToFill(
                cache,
                config,
                paths=self.paths,
                failures=refused,
                staging=place,
                dataset_root=dataset_root,
            )
            for config, place in zip(configs, staged, strict=True)
        ]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep staging stores to this process, and the readers of the run open.

        Raises:
            StorageError: The same rank is running already.
            ReadOnlyCacheError: The staging folder can't be written.
        """
        with ExitStack() as stack:
            for store in self.stores:
                stack.enter_context(store.opened())
            yield

    def close_readers(self) -> None:
        """Close the readers; the next question opens others."""
        for store in self.stores:
            store.close_reader()

    # ---- the plan

    def plan(self, *, recompute_changed: bool = False) -> dict[str, str | AudioSource]:
        """Return the clips to be computed for some store by sample id, sorted.

        Args:
            recompute_changed: Add cached clips whose file isn't as it was; otherwise they are only
                counted.

        Raises:
            CacheError: A store or, with `recompute_changed`, its records can't be read.
        """
        # Ranks that fill one store look at the space that all of them need.
        asked = self.paths if self._is_staged or self.share.is_all else self.all_samples
        missing: set[str] = set()
        for store in self.stores:
            found = store.plan(asked, self._stored_elsewhere, recompute_changed=recompute_changed)
            store.outcomes.settled = self.asked - found
            missing |= found
        return {sample_id: self.paths[sample_id] for sample_id in sorted(missing)}

    def compare_weights(self, model: str | os.PathLike[str] | AudioModel) -> None:
        """Compare the model with what filled the stores that lack nothing.

        Raises:
            ProvenanceMismatchError: A module with other weights.
        """
        for store in self.stores:
            if not store.missing:
                store.compare_weights(model)

    def check_writable(self) -> None:
        """Check that the stores can be written.

        Raises:
            ReadOnlyCacheError: One can't.
        """
        for store in self.stores:
            store.cache.check_writable(store.config)

    def log_new_stores(self) -> None:
        """Say what a store that doesn't exist yet differs in from those of the cache."""
        for store in self.stores:
            if store.config not in self.cache and not store.num_cached:
                self.cache.explain(store.config).log_new_store()

    def check_space(self, shapes: Shapes, num_stores: int | None = None) -> None:
        """Refuse what the disk can't hold; without a shape nothing is known of a store.

        Args:
            shapes: Of one embedding, by output.
            num_stores: How many such stores are filled on this disk by as many processes; None
                asks the staging folder.

        Raises:
            CacheFullError: See `lmdbcache.extraction.space.check_space`.
        """
        wanted = [
            Wanted(
                store.path,
                self.stored_as(store.to_be_written | store.changed),
                shape,
                store.config.dtype,
            )
            for store in self.stores
            if (shape := shapes.get(store.config.output) or store.known_shape()) is not None
        ]
        check_space(wanted, self.num_stores_on_disk if num_stores is None else num_stores)

    def stored_as(self, clips: Collection[str]) -> Collection[str]:
        """Return a sample id for each embedding of these clips.

        Of windows there are as many as the headers of the files announce, under the first one's.
        """
        if self.config.window is None:
            return clips
        return [name for clip in clips for name in [first_window(clip)] * self._num_windows(clip)]

    def _num_windows(self, clip: str) -> int:
        if clip not in self._nums_windows:
            config, decoder = self.config, decoder_of(self.config.front_end)
            number = announced_samples(self._everything[clip], config.sample_rate, decoder)
            sizes = config.num_samples, config.hop_samples
            self._nums_windows[clip] = max(1, num_windows(number, *sizes, config.last_window))
        return self._nums_windows[clip]

    # ---- the work

    def work(
        self,
        missing: Mapping[str, str | AudioSource],
        front_end: FrontEnd,
        make_embedder: Callable[[], Embedder],
        *,
        num_workers: int,
        commit_seconds: float,
        shapes: Shapes,
    ) -> None:
        """Decode, embed and store what is missing.

        Args:
            missing: Sample id → audio file, sorted.
            front_end: Waveform → features.
            make_embedder: Called when the first features are there.
            num_workers: Decoding processes.
            commit_seconds: Commit at least this often.
            shapes: Output → the shape that every embedding has to have; any, where it isn't stated.

        Raises:
            CacheError: See `extract`.
        """
        units = [
            [(sample_id, missing[sample_id]) for sample_id in unit]
            for unit in units_of(self.paths, missing, self._unit_size)
            if unit
        ]
        num_cached = len(self.paths) - len(missing)
        _logger.info("%d clips to extract, %d cached", len(missing), num_cached)
        is_proven = any(store.known_shape() is not None for store in self.stores)
        trials = FrontEndTrials(is_proven=is_proven)
        passes: ForwardPasses | None = None
        self._advance(num_cached)
        with (
            features_of(
                units,
                self.config,
                front_end,
                num_workers=num_workers,
                order=self._order,
                is_wanted=self._is_wanted,
                batch_size=self._batch_size,
                stored=self._stored_windows(missing),
            ) as batches,
            ExitStack() as stack,
        ):
            # Before the workers are forked, so that what it imports is there for all of them.
            features = front_end.provenance()
            try:
                for batch in batches:
                    if batch.features is not None:
                        if passes is None:
                            embedder = make_embedder()
                            passes = self._passes(embedder, shapes, is_proven=is_proven)
                            provenance = {
                                **folder_provenance(self.model),
                                **features,
                                **embedder.provenance(),
                            }
                            for store in self.stores:
                                if store.missing:
                                    stack.enter_context(
                                        store.open_writer(provenance, commit_seconds)
                                    )
                            self.built_model = True
                        self._embed(batch, passes)
                    self._finish(batch)
                    self._advance(batch.num_clips)
                    trials.note(batch)
                for store in self.stores:
                    store.commit()
            except BaseException as error:
                for store in self.stores:
                    store.commit_in_spite_of(error)
                raise
            finally:
                for store in self.stores:
                    store.count()
                self.record_failures()
            trials.check(is_last=True)

    def _stored_windows(self, missing: Iterable[str]) -> dict[str, frozenset[str]]:
        """Return those windows of the missing recordings that no store lacks."""
        if self.config.window is None:
            return {}
        stored = {}
        for recording in missing:
            found = [
                store.stored_windows(recording)
                for store in self.stores
                if recording in store.missing
            ]
            stored[recording] = frozenset.intersection(*found)
        return {recording: windows for recording, windows in stored.items() if windows}

    def _passes(self, embedder: Embedder, shapes: Shapes, *, is_proven: bool) -> ForwardPasses:
        from lmdbcache.extraction.embedding import ForwardPasses

        if not any(shapes.values()):
            # A module finds it out by a clip of noise, and may fail on that.
            with suppress(AudioDecodeError, ModuleError):
                self.check_space({self.config.output: embedder.embedding_shape})
        return ForwardPasses(
            embedder, self.config, outputs_of(self.stores), shapes, is_proven=is_proven
        )

    def _order(self, num_units: int) -> Iterator[int]:
        """Yield the units in key order, as LMDB stores them in the least space.

        Once another run turns out to store the same clips, the rest come in an order of this
        process: two runs that keep step would compute everything twice.
        """
        rest = list(range(num_units - 1, -1, -1))
        is_shuffled = False
        while rest:
            if not is_shuffled and any(store.has_company for store in self.stores):
                random.Random(os.getpid()).shuffle(rest)
                is_shuffled = True
            yield rest.pop()

    def _is_wanted(self, sample_ids: list[str]) -> bool:
        """Look once more, right before a unit is decoded, whether another run has stored it."""
        wanted = [store.wants(sample_ids) for store in self.stores]
        if any(wanted):
            return True
        self._advance(len(sample_ids))
        return False

    def _advance(self, number: int) -> None:
        self._num_done += number
        if self._progress is not None:
            self._progress(self._num_done, len(self.paths))

    def _embed(self, unit: FeatureBatch, passes: ForwardPasses) -> None:
        """Embed a unit, and add to each store what it lacks.

        What is missing of the unit is a batch: its composition changes the last bits. Stores that
        lack the same clips share one; others get what a separate run would compute.
        """
        lacking: dict[tuple[str, ...], list[StoreToFill]] = {}
        for store in self.stores:
            if ours := store.lacking(unit):
                lacking.setdefault(ours, []).append(store)
        for sample_ids, stores in lacking.items():
            started = time.perf_counter()
            try:
                found = passes.embed(unit, sample_ids, outputs_of(stores))
            except InvalidEmbeddingError:
                for store in self.stores:
                    store.discard()  # of the same model
                raise
            if not self.compute_seconds:
                self.check_space(
                    {key: tuple(rows[0].shape) for key, (_, rows) in found.items() if rows}
                )
            self.compute_seconds += time.perf_counter() - started
            failed: dict[str, ClipFailure] = {}
            for batch, _ in found.values():
                batch.failures = [self._of_a_clip(one, unit) for one in batch.failures]
                failed.update((failure.sample_id, failure) for failure in batch.failures)
            _log(failed.values())
            for store in stores:
                batch, embeddings = found[store.config.output]
                store.put(batch, embeddings)

    def _of_a_clip(self, failure: ClipFailure, unit: FeatureBatch) -> ClipFailure:
        """The failure with its path; that of a window is its recording's."""
        clip = unit.recording or failure.sample_id
        where = f"{failure.sample_id}: " if unit.recording else ""
        return ClipFailure(clip, str(self.paths[clip]), where + failure.reason)

    def _finish(self, unit: FeatureBatch) -> None:
        """Note what became of the clips that nothing follows of."""
        _log(unit.failures)
        for store in self.stores:
            store.finish(unit)

    def record_failures(self) -> None:
        """Keep the list of failed clips with each store, and log how many there are."""
        failures = {
            failure.sample_id: failure
            for store in reversed(self.stores)
            for failure in reversed(store.outcomes.failures)
        }
        warn_of_failures(list(failures.values()))
        for store in self.stores:
            store.outcomes.record_failures(store.path)

    def summaries(self) -> list[ExtractionSummary]:
        """Return what was done, for each store."""
        return [self._summary(store) for store in self.stores]

    def _summary(self, store: StoreToFill) -> ExtractionSummary:
        outcomes = store.outcomes
        return ExtractionSummary(
            store=store.path,
            num_samples=len(self.asked),
            num_cached=len(self.asked) - store.num_extracted - outcomes.num_failed,
            num_extracted=store.num_extracted,
            num_windows=store.num_windows,
            silent=tuple(sorted(outcomes.silent)),
            cancelled=tuple(sorted(outcomes.cancelled)),
            equal=outcomes.equal_embeddings(),
            failures=tuple(sorted(outcomes.failures, key=lambda failure: failure.sample_id)),
            seconds=time.perf_counter() - self._started,
            compute_seconds=self.compute_seconds,
            built_model=self.built_model,
            moved_model=store.moved_model,
            num_suspects=store.num_suspects,
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


def outputs_of(stores: Iterable[StoreToFill]) -> tuple[str, ...]:
    """Return the outputs that some stores hold, each once."""
    return tuple(dict.fromkeys(store.config.output for store in stores))


def _log(failures: Iterable[ClipFailure]) -> None:
    for failure in failures:
        _logger.info("%s: %s", failure.sample_id, failure.reason)


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

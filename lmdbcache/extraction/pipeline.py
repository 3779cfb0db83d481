"""The extraction: what is missing is decoded, embedded and stored."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from lmdbcache.audio import Clips
from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.datasets import AudioDataset
from lmdbcache.embedders import (
    AudioModel,
    Embedder,
    FrontEnd,
    ModuleEmbedder,
    device_of_rank,
    known_model,
    ready_model,
)
from lmdbcache.errors import ConfigError
from lmdbcache.extraction.rank_share import RankShare
from lmdbcache.extraction.run import ExtractionRun, Progress
from lmdbcache.extraction.samples import counts_of_left_out, pairs_of
from lmdbcache.extraction.scaling import warnings_of
from lmdbcache.extraction.space import (
    ExtractionPlan,
    estimated_bytes,
    needed_bytes,
)
from lmdbcache.extraction.summary import ExtractionSummary
from lmdbcache.extraction.turns import place_among_runs
from lmdbcache.extraction.unbuilt_model import check_unbuilt_model
from lmdbcache.files import free_bytes

__all__ = [
    "check_duration",
    "check_options",
    "default_num_workers",
    "extract",
    "plan_extraction",
    "plan_extractions",
    "stored_of_share",
]

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
    to the caller. Several runs of the same clips share the work: each begins elsewhere and leaves
    out what another has committed meanwhile.

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
            torch is set to one thread, as the parent's others aren't there.
        device: Where the model runs; None takes a CUDA GPU if there is one.
        progress: Called with (clips done, clips in all); see `progress_bar`.
        dataset_root: Kept in the store's metadata.
        commit_seconds: Commit at least this often.
        recompute_changed: Compute cached clips again, too, whose file has changed since, and
            replace their embeddings.
        share: Take only these of the batches, as one of several processes, each of which takes its
            own; see `share_from_environment`. They may start at different moments.
        staging: Write to a store of this rank's own in this folder, for ranks on several machines;
            what `cache` holds is left out, and so is what other ranks have staged before.
            `merge_stores(cache, [staging])` brings it into `cache`.
        stored: Sample ids that are stored where this process can't see them. They keep their places
            in the fixed batches, and aren't computed.

    Returns:
        What was done, failures included.

    Raises:
        ConfigError: The config doesn't fit the model.
        DatasetError: Two files for one sample id.
        ExtractionError: A decoding process died, the device has too little memory, or the front end
            fails on every clip.
        InvalidEmbeddingError: The model answers differently for the same clip, or with the same
            embedding for different clips; looked at when it has embedded its first clips, before
            any is stored.
        ModuleError: A module fails on all of the first clips.
        ModelLoadError: The model can't be loaded.
        ProvenanceMismatchError: The store was filled with other weights or features.
        StorageError: The same rank runs already with this staging folder.
        CacheFullError: The disk hasn't room for what is missing, which is found out before the
            model is loaded; or it became full: what was committed is kept.
    """
    check_options(batch_size, num_workers, commit_seconds)
    if recompute_changed and staging is not None:
        raise ConfigError(
            "recompute_changed: with a staging folder the root would keep the old embeddings; "
            "extract the changed clips into the root itself"
        )
    started = time.perf_counter()
    run = ExtractionRun(cache, config, progress=progress, dataset_root=dataset_root, share=share)
    run.take(pairs_of(clips), batch_size, stored)
    run.left_out = counts_of_left_out(clips)
    with ExitStack() as stack:
        if staging is not None:
            stack.enter_context(run.stage(staging, batch_size).held())
        missing = run.plan()
        missing = run.look_at_sources(missing, recompute=recompute_changed)
        _use_one_thread_after_a_fork()
        if not missing:
            run.outcomes.record_failures(run.cache.path(config))
            run.moved_model = check_unbuilt_model(run.cache, config, model)
            return run.summary(time.perf_counter() - started)
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
            make_embedder = make_embedder or partial(_embedder, found, config, device, run.share)
            run.check_space(shape)
            # A module's was measured; a family's is an estimate of what it will be.
            measured = shape if isinstance(found, ModuleEmbedder) else None
        if config not in cache and not run.num_cached:
            cache.explain(config).log_new_store()
        place = stack.enter_context(place_among_runs(run.cache.path(config), run.share))
        run.work(
            missing,
            front_end,
            make_embedder,
            batch_size=batch_size,
            num_workers=run.share.decoding_processes() if num_workers is None else num_workers,
            commit_seconds=commit_seconds,
            place=place,
            shape=measured,
        )
        return run.summary(time.perf_counter() - started)


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


def _embedder(
    model: AudioModel, config: CacheConfig, device: str | None, share: RankShare
) -> Embedder:
    return model.make_embedder(config, device or device_of_rank(share.local_rank))


def plan_extraction(
    cache: EmbeddingCache,
    config: CacheConfig,
    clips: Clips | AudioDataset,
    *,
    model: str | os.PathLike[str] | AudioModel | None = None,
    batch_size: int = 8,
    share: RankShare | None = None,
    staging: str | os.PathLike[str] | None = None,
) -> ExtractionPlan:
    """What `extract` would do, without doing it: the model isn't loaded, nothing is written.

    Args:
        cache: Where to store.
        config: The identity of the embeddings.
        clips: A dataset; or sample id (`file_id:class`) → audio file or `AudioSource`.
        model: Hub name, checkpoint folder, or an `AudioModel` such as `ModuleEmbedder`; None takes
            `config.model_name`.
        batch_size: Clips per forward pass.
        share: See `extract`.
        staging: See `extract`.

    Raises:
        ConfigError: The model has no such output.
        DatasetError: Two files for one sample id.
        ModelLoadError: The folder isn't a checkpoint.
    """
    run = ExtractionRun(cache, config, share=share)
    run.take(pairs_of(clips), batch_size)
    if staging is not None:
        run.stage(staging, batch_size, patience=0.0)
    return _plan(run, model)


def plan_extractions(
    cache: EmbeddingCache,
    configs: Sequence[CacheConfig],
    clips: Clips | AudioDataset,
    *,
    model: str | os.PathLike[str] | AudioModel | None = None,
) -> list[ExtractionPlan]:
    """The plan of the same clips for each of these configs; see `plan_extraction`."""
    run = ExtractionRun(cache, configs[0])
    run.take(pairs_of(clips), 1)
    plans = []
    for config in configs:
        own = copy(run)  # of millions of clips the list takes long to make
        own.config = config
        plans.append(_plan(own, model))
    return plans


def _plan(run: ExtractionRun, model: str | os.PathLike[str] | AudioModel | None) -> ExtractionPlan:
    config = run.config
    missing = run.plan()
    shape = run.known_shape()
    if shape is None:
        found = known_model(config.model_name if model is None else model)
        if found is not None:
            found.check(config)
            shape = found.embedding_shape(config)
    store = run.cache.path(config)
    plan = ExtractionPlan(
        store=store,
        num_samples=len(run.asked),
        num_cached=run.num_cached,
        num_missing=len(missing),
        num_refused=len(run.outcomes.failures),
        embedding_shape=shape,
        bytes_needed=None if missing else 0,
        bytes_free=free_bytes(store),
    )
    if shape is None:
        return plan
    plan = replace(
        plan,
        bytes_needed=needed_bytes(missing, shape, config.dtype) if missing else 0,
        bytes_for_all=estimated_bytes(run.all_samples, shape, config.dtype),
    )
    num_written = len(run.missing_on_disk)
    return replace(plan, warnings=warnings_of(plan, config, len(run.all_samples), num_written))


def stored_of_share(
    cache: EmbeddingCache,
    config: CacheConfig,
    clips: Clips | AudioDataset,
    *,
    batch_size: int = 8,
    share: RankShare | None = None,
    staging: str | os.PathLike[str] | None = None,
) -> tuple[int, int]:
    """(stored, asked): how many samples of a share are there now. The arguments are `extract`'s."""
    run = ExtractionRun(cache, config, share=share)
    run.take(pairs_of(clips), batch_size)
    if staging is not None:
        run.stage(staging, batch_size, patience=0.0)  # a batch system is waiting for our end
    run.plan()
    return run.num_cached, len(run.paths)


def default_num_workers() -> int:
    """Decoding processes that keep a model busy without taking its cores."""
    return RankShare().decoding_processes()


def check_options(batch_size: int, num_workers: int | None, commit_seconds: float) -> None:
    """Whether a run can have these.

    Raises:
        ConfigError: It can't; the message names the option.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size}; it must be 1 or more")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"num_workers: {num_workers}; it must be 0 or more")
    if not commit_seconds >= 0:
        raise ConfigError(f"commit_seconds: {commit_seconds}; it must be 0 or more")


def check_duration(config: CacheConfig, front_end: FrontEnd) -> None:
    """Whether the clips are long enough for the front end.

    Raises:
        ConfigError: They aren't.
    """
    if config.num_samples < front_end.min_samples:
        raise ConfigError(
            f"duration: {config.duration} s is {config.num_samples} samples; the front end needs "
            f"{front_end.min_samples}"
        )

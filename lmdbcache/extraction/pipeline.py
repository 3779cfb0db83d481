"""The extraction: what is missing is decoded, embedded and stored."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.cores import available_cores
from lmdbcache.datasets.base import AudioDataset
from lmdbcache.embedders.audio_source import Clips
from lmdbcache.embedders.base import AudioModel, Embedder, FrontEnd
from lmdbcache.embedders.registry import known_model, ready_model
from lmdbcache.errors import ConfigError
from lmdbcache.extraction.run import Run
from lmdbcache.extraction.samples import pairs_of
from lmdbcache.extraction.scaling import warnings_of
from lmdbcache.extraction.space import (
    ExtractionPlan,
    estimated_bytes,
    existing_parent,
    needed_bytes,
)
from lmdbcache.extraction.summary import ExtractionSummary
from lmdbcache.extraction.turns import place_among_runs
from lmdbcache.storage.files.generations import free_bytes

__all__ = ["default_num_workers", "extract", "plan_extraction", "plan_extractions"]


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
    progress: bool | None = None,
    dataset_root: str | Path = "",
    commit_seconds: float = 10.0,
    recompute_changed: bool = False,
) -> ExtractionSummary:
    """Store the embeddings of these clips; those that are stored already cost nothing.

    The clips, sorted by sample id, are cut into fixed batches; what is missing of each is decoded
    in worker processes, embedded, and committed every few seconds: a run that is killed loses at
    most what wasn't committed, and the next one goes on from there. The model is only loaded when
    there is something for it to do. A clip that can't be decoded is reported and never cached.

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
        num_workers: Decoding processes; None chooses, 0 decodes in this process.
        device: Where the model runs; None takes a CUDA GPU if there is one.
        progress: Show a bar; None does if standard error is a terminal.
        dataset_root: Kept in the store's metadata.
        commit_seconds: Commit at least this often.
        recompute_changed: Compute cached clips again, too, whose file has changed since, and
            replace their embeddings.

    Returns:
        What was done, failures included.

    Raises:
        ConfigError: The config doesn't fit the model.
        DatasetError: Two files for one sample id.
        ExtractionError: A decoding process died, or the device has too little memory.
        ModelLoadError: The model can't be loaded.
        ProvenanceMismatchError: The store was filled with other weights or features.
        CacheFullError: The disk hasn't room for what is missing, which is found out before the
            model is loaded; or it became full: what was committed is kept.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size}; it must be 1 or more")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"num_workers: {num_workers}; it must be 0 or more")
    if not commit_seconds >= 0:
        raise ConfigError(f"commit_seconds: {commit_seconds}; it must be 0 or more")
    started = time.perf_counter()
    run = Run(cache, config, progress=progress, dataset_root=dataset_root)
    missing = run.plan(pairs_of(clips))
    missing = run.look_at_sources(missing, recompute=recompute_changed)
    if missing:
        cache.check_writable(config)
        if model is None or isinstance(model, (str, os.PathLike)):
            run.model = os.fspath(model or config.model_name)
        if front_end is None or make_embedder is None:
            # Here and not in a worker: its errors are for the user to read.
            found = ready_model(config.model_name if model is None else model, config)
            front_end = front_end or found.make_front_end(config)
            _check_duration(config, front_end)
            shape = None if make_embedder else found.embedding_shape(config)
            make_embedder = make_embedder or partial(found.make_embedder, config, device)
            run.check_space(missing, shape)
        if config not in cache:
            cache.explain(config).log_new_store()
        with place_among_runs(cache.path(config)) as place:
            run.work(
                missing,
                front_end,
                make_embedder,
                batch_size=batch_size,
                num_workers=default_num_workers() if num_workers is None else num_workers,
                commit_seconds=commit_seconds,
                place=place,
            )
    else:
        run.record_failures()
    return run.summary(time.perf_counter() - started)


def plan_extraction(
    cache: EmbeddingCache,
    config: CacheConfig,
    clips: Clips | AudioDataset,
    *,
    model: str | os.PathLike[str] | AudioModel | None = None,
) -> ExtractionPlan:
    """What `extract` would do, without doing it: the model isn't loaded, nothing is written.

    Args:
        cache: Where to store.
        config: The identity of the embeddings.
        clips: A dataset; or sample id (`file_id:class`) → audio file or `AudioSource`.
        model: Hub name, checkpoint folder, or an `AudioModel` such as `ModuleEmbedder`; None takes
            `config.model_name`.

    Raises:
        ConfigError: The model has no such output.
        DatasetError: Two files for one sample id.
        ModelLoadError: The folder isn't a checkpoint.
    """
    return plan_extractions(cache, [config], clips, model=model)[0]


def plan_extractions(
    cache: EmbeddingCache,
    configs: Sequence[CacheConfig],
    clips: Clips | AudioDataset,
    *,
    model: str | os.PathLike[str] | AudioModel | None = None,
) -> list[ExtractionPlan]:
    """The plan of the same clips for each of these configs; see `plan_extraction`."""
    run = Run(cache, configs[0])
    run.plan(pairs_of(clips))
    return [_plan(Run(cache, config), config, run, model) for config in configs]


def _plan(
    own: Run, config: CacheConfig, run: Run, model: str | os.PathLike[str] | AudioModel | None
) -> ExtractionPlan:
    """The plan of one config for the clips that `run` has looked at."""
    missing: Collection[str] = run.paths
    if config in own.cache:
        missing = own.cache.coverage(config, run.paths).missing
    shape = own.known_shape()
    if shape is None:
        found = known_model(config.model_name if model is None else model)
        if found is not None:
            found.check(config)
            shape = found.embedding_shape(config)
    store = own.cache.path(config)
    plan = ExtractionPlan(
        store=store,
        num_samples=len(run.asked),
        num_cached=len(run.paths) - len(missing),
        num_missing=len(missing),
        num_refused=len(run.failures),
        embedding_shape=shape,
        bytes_needed=None if missing else 0,
        bytes_free=free_bytes(existing_parent(store)),
    )
    if shape is None:
        return plan
    plan = replace(
        plan,
        bytes_needed=needed_bytes(missing, shape, config.dtype) if missing else 0,
        bytes_for_all=estimated_bytes(run.paths, shape, config.dtype),
    )
    return replace(plan, warnings=warnings_of(plan, config))


def default_num_workers() -> int:
    """Decoding processes that keep a model busy without taking its cores."""
    return max(1, min(8, available_cores() // 2))


def _check_duration(config: CacheConfig, front_end: FrontEnd) -> None:
    if config.num_samples < front_end.min_samples:
        raise ConfigError(
            f"duration: {config.duration} s is {config.num_samples} samples; the front end needs "
            f"{front_end.min_samples}"
        )

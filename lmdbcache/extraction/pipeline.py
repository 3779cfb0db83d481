"""The extraction: what is missing is decoded, embedded and stored."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.embedders.audio_spectrogram_transformer import ASTEmbedder, ASTFrontEnd
from lmdbcache.embedders.base import Embedder, FrontEnd
from lmdbcache.embedders.checkpoints import fetch_checkpoint, find_checkpoint
from lmdbcache.errors import (
    ConfigError,
    DatasetError,
    ExtractionError,
    InvalidEmbeddingError,
    InvalidSampleIdError,
    MissingDependencyError,
)
from lmdbcache.extraction.progress import ProgressBar
from lmdbcache.extraction.summary import (
    FAILURES_NAME,
    ClipFailure,
    ExtractionSummary,
    update_failures,
)
from lmdbcache.storage.layout import canonical_sample_id
from lmdbcache.storage.writer import EmbeddingWriter

if TYPE_CHECKING:
    from lmdbcache.extraction.decoding import FeatureBatch

__all__ = ["default_num_workers", "extract"]

_logger: Final = logging.getLogger(__name__)


def extract(
    cache: EmbeddingCache,
    config: CacheConfig,
    clips: Mapping[str, str | os.PathLike[str]] | Iterable[tuple[str, str | os.PathLike[str]]],
    *,
    model: str | os.PathLike[str] | None = None,
    front_end: FrontEnd | None = None,
    make_embedder: Callable[[], Embedder] | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    device: str | None = None,
    progress: bool | None = None,
    dataset_root: str | Path = "",
    commit_seconds: float = 10.0,
) -> ExtractionSummary:
    """Store the embeddings of these clips; those that are stored already cost nothing.

    The missing clips, sorted by sample id, are cut into fixed batches, decoded in worker
    processes, embedded, and committed every few seconds: a run that is killed loses at most what
    wasn't committed, and the next one goes on from there. The model is only loaded when there is
    something for it to do. A clip that can't be decoded is reported and never cached.

    Args:
        cache: Where to store.
        config: The identity of the embeddings.
        clips: Sample id (`file_id:class`) → audio file.
        model: Hub name or checkpoint folder; None takes `config.model_name`.
        front_end: Waveform → features; None takes the AST's.
        make_embedder: Called once, when the first features are there; None builds the AST.
        batch_size: Clips per forward pass.
        num_workers: Decoding processes; None chooses, 0 decodes in this process.
        device: Where the model runs; None takes a CUDA GPU if there is one.
        progress: Show a bar; None does if standard error is a terminal.
        dataset_root: Kept in the store's metadata.
        commit_seconds: Commit at least this often.

    Returns:
        What was done, failures included.

    Raises:
        ConfigError: The config doesn't fit the model.
        DatasetError: Two files for one sample id.
        ExtractionError: A decoding process died, or the device has too little memory.
        ModelLoadError: The model can't be loaded.
        ProvenanceMismatchError: The store was filled with other weights or features.
        CacheFullError: The disk is full; what was committed is kept.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size}; it must be 1 or more")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"num_workers: {num_workers}; it must be 0 or more")
    if not commit_seconds >= 0:
        raise ConfigError(f"commit_seconds: {commit_seconds}; it must be 0 or more")
    started = time.perf_counter()
    run = _Run(cache, config, progress=progress, dataset_root=dataset_root)
    missing = run.plan(clips.items() if isinstance(clips, Mapping) else clips)
    if missing:
        cache.check_writable(config)
        name = os.fspath(model) if model is not None else config.model_name
        if front_end is None or make_embedder is None:
            front_end, make_embedder = _ast(config, name, device, front_end, make_embedder)
        run.work(
            missing,
            front_end,
            make_embedder,
            batch_size=batch_size,
            num_workers=default_num_workers() if num_workers is None else num_workers,
            commit_seconds=commit_seconds,
        )
    else:
        run.record_failures()
    return run.summary(time.perf_counter() - started)


def default_num_workers() -> int:
    """Decoding processes that keep a model busy without taking its cores."""
    affinity = getattr(os, "sched_getaffinity", None)  # what SLURM gave us; not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(8, cores // 2))


def _ast(
    config: CacheConfig,
    model: str,
    device: str | None,
    front_end: FrontEnd | None,
    make_embedder: Callable[[], Embedder] | None,
) -> tuple[FrontEnd, Callable[[], Embedder]]:
    if config.output not in ASTEmbedder.outputs:
        raise ConfigError(f"output: {config.output!r}; AST gives {', '.join(ASTEmbedder.outputs)}")
    # Here and not in a worker: its errors are for the user to read.
    checkpoint = fetch_checkpoint(find_checkpoint(model))
    front_end = front_end or ASTFrontEnd(checkpoint, config.sample_rate)
    if config.num_samples < front_end.min_samples:
        raise ConfigError(
            f"duration: {config.duration} s is {config.num_samples} samples; the front end needs "
            f"{front_end.min_samples}"
        )
    return front_end, make_embedder or (
        lambda: ASTEmbedder(checkpoint, config.output, device, config.compute_dtype)
    )


class _Run:
    """One extraction: its plan, its counts, its failures."""

    def __init__(
        self,
        cache: EmbeddingCache,
        config: CacheConfig,
        *,
        progress: bool | None,
        dataset_root: str | Path,
    ) -> None:
        self.cache = cache
        self.config = config
        self.progress = progress
        self.dataset_root = dataset_root
        self.paths: dict[str, str] = {}
        self.asked: set[str] = set()
        self.settled: set[str] = set()
        self.failures: list[ClipFailure] = []
        self.num_cached = 0
        self.num_extracted = 0
        self.num_silent = 0
        self.compute_seconds = 0.0
        self.built_model = False

    def plan(self, clips: Iterable[tuple[str, str | os.PathLike[str]]]) -> dict[str, str]:
        """The missing clips by sample id, sorted."""
        paths = self.paths
        for sample_id, given in clips:
            path = os.fspath(given)
            try:
                known = paths.setdefault(canonical_sample_id(sample_id), path)
            except InvalidSampleIdError as error:
                self.failures.append(ClipFailure(str(sample_id), path, str(error)))
                continue
            if known != path:
                raise DatasetError(
                    f"{known!a} and {path!a} have the same sample id {sample_id!r}; rename or "
                    "leave out one of them"
                )
        self.asked = {*paths, *(failure.sample_id for failure in self.failures)}
        missing = sorted(self.cache.coverage(self.config, paths).missing)
        self.num_cached = len(paths) - len(missing)
        self.settled = self.asked - set(missing)
        return {sample_id: paths[sample_id] for sample_id in missing}

    def work(
        self,
        missing: Mapping[str, str],
        front_end: FrontEnd,
        make_embedder: Callable[[], Embedder],
        *,
        batch_size: int,
        num_workers: int,
        commit_seconds: float,
    ) -> None:
        # torch is needed from here on, not for a run that has nothing to do.
        try:
            from lmdbcache.extraction.decoding import Clip, feature_batches, worker_errors
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f'extraction needs the package {error.name}: pip install "lmdbcache[audio]"'
            ) from error

        todo = [Clip(sample_id, path) for sample_id, path in missing.items()]
        _logger.info("%d clips to extract, %d cached", len(todo), self.num_cached)
        # Before the workers are forked, so that what it imports is there for all of them.
        features = front_end.provenance()
        batches = feature_batches(
            todo,
            front_end,
            batch_size=batch_size,
            num_workers=num_workers,
            sample_rate=self.config.sample_rate,
            duration=self.config.duration,
        )
        bar = ProgressBar(
            self.num_cached + len(todo),
            initial=self.num_cached,
            shown=self.progress,
            description=self.config.model_name.rsplit("/", 1)[-1],
        )
        embedder: Embedder | None = None
        writer: EmbeddingWriter | None = None
        with ExitStack() as stack:
            stack.enter_context(bar)
            stack.callback(batches.close)
            stack.enter_context(worker_errors())
            try:
                for batch in batches:
                    if batch.features is not None:
                        if embedder is None or writer is None:
                            embedder = make_embedder()
                            writer = stack.enter_context(
                                self._writer(features, embedder, commit_seconds)
                            )
                            self.built_model = True
                        self._embed(batch, embedder, writer)
                    self._count(batch, bar)
            except (KeyboardInterrupt, Exception):
                # Each embedding stands for itself: what was computed is worth keeping.
                if writer is not None:
                    writer.commit()
                raise
            finally:
                self.record_failures()

    def _writer(
        self, features: Mapping[str, str], embedder: Embedder, commit_seconds: float
    ) -> EmbeddingWriter:
        return self.cache.writer(
            self.config,
            provenance={**features, **embedder.provenance()},
            dataset_root=self.dataset_root,
            commit_seconds=commit_seconds,
        )

    def _embed(self, batch: FeatureBatch, embedder: Embedder, writer: EmbeddingWriter) -> None:
        started = time.perf_counter()
        with _memory_errors(batch.num_clips):
            embeddings = embedder.embed(batch.features)  # type: ignore[arg-type]
        self.compute_seconds += time.perf_counter() - started
        for sample_id, embedding in zip(batch.sample_ids, embeddings, strict=True):
            try:
                self.num_extracted += writer.put(sample_id, embedding)
            except InvalidEmbeddingError as error:
                self.failures.append(ClipFailure(sample_id, self.paths[sample_id], str(error)))
            else:
                self.num_silent += sample_id in batch.silent

    def _count(self, batch: FeatureBatch, bar: ProgressBar) -> None:
        self.failures += batch.failures
        self.settled.update(batch.sample_ids, [failure.sample_id for failure in batch.failures])
        for failure in batch.failures:
            _logger.info("%s: %s", failure.sample_id, failure.reason)
        bar.note(failed=len(self.failures), silent=self.num_silent)
        bar.advance(batch.num_clips)

    def record_failures(self) -> None:
        """Keep the list of failed clips beside the store, and say so."""
        if self.failures:
            _logger.warning(
                "%d %s no embedding and will be tried again by the next run (%s%s)",
                len(self.failures),
                "clip has" if len(self.failures) == 1 else "clips have",
                self.failures[0].reason,
                "" if len(self.failures) == 1 else "; all are in the summary's failures",
            )
        try:
            update_failures(self.cache.path(self.config), self.settled, self.failures)
        except OSError as error:
            # A full disk, say. The list is a convenience, and must not hide what went wrong.
            _logger.error("%s can't be written: %s", FAILURES_NAME, str(error))

    def summary(self, seconds: float) -> ExtractionSummary:
        return ExtractionSummary(
            store=self.cache.path(self.config),
            num_samples=len(self.asked),
            num_cached=self.num_cached,
            num_extracted=self.num_extracted,
            num_silent=self.num_silent,
            failures=tuple(sorted(self.failures, key=lambda failure: failure.sample_id)),
            seconds=seconds,
            compute_seconds=self.compute_seconds,
            built_model=self.built_model,
        )


@contextmanager
def _memory_errors(batch_size: int) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ExtractionError(
            f"the device has too little memory for a batch of {batch_size} clips "
            f"({str(error).splitlines()[0]}). What was computed is kept; run again with a smaller "
            "batch_size"
        ) from error

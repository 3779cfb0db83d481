"""The extraction on a Ray cluster: nodes decode and embed, this process alone stores.

The units are those of every other run, so are the embeddings. Ray Data moves them: a task for each
step of a unit, what dies with a process or a node is done again, and nodes wait when this process
is slower than they are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmdbcache.audio import AudioSource, Clips
from lmdbcache.cache import ClipFailure, EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.datasets import AudioDataset
from lmdbcache.embedders import AudioModel, ModuleEmbedder, identify, ready_model
from lmdbcache.errors import ConfigError, DatasetError, ExtractionError, IntegrityError, RemoteError
from lmdbcache.extraction.pipeline import check_duration, check_options
from lmdbcache.extraction.progress import ProgressBar
from lmdbcache.extraction.ray_cluster import check_device, connected
from lmdbcache.extraction.ray_pipeline import UnitPipeline
from lmdbcache.extraction.run import ExtractionRun
from lmdbcache.extraction.samples import counts_of_left_out, pairs_of
from lmdbcache.extraction.staged_units import StagedUnit, StagingPlace
from lmdbcache.extraction.summary import ExtractionSummary
from lmdbcache.extraction.unbuilt_model import check_unbuilt_model
from lmdbcache.extraction.units import units_of
from lmdbcache.storage import StoreMetadata

if TYPE_CHECKING:
    from lmdbcache.extraction.feature_batch import Clip, FeatureBatch
    from lmdbcache.extraction.ray_workers import UnitAnswer

__all__ = ["extract_on_ray"]

_logger: Final = logging.getLogger(__name__)

_MOST_PASSES: Final = 3


def extract_on_ray(  # noqa: PLR0913
    cache: EmbeddingCache,
    config: CacheConfig,
    clips: Clips | AudioDataset,
    *,
    model: str | os.PathLike[str] | AudioModel | None = None,
    batch_size: int = 8,
    device: str | None = None,
    progress: bool | None = None,
    dataset_root: str | Path = "",
    commit_seconds: float = 10.0,
    recompute_changed: bool = False,
    address: str | None = None,
    num_actors: int | None = None,
    staging: str | os.PathLike[str] | None = None,
) -> ExtractionSummary:
    """`extract` on the nodes of a Ray cluster; the store lies on a disk of this machine.

    Decoding runs as Ray tasks of one CPU each, the model in a pool of actors with a GPU each, or on
    CPUs. A process or node that dies costs the units it had, which are computed again elsewhere.
    This process may be killed, too: run again, it goes on with what isn't stored.

    Every node needs lmdbcache with its extra `ray`, the audio files and a checkpoint folder at the
    same paths as here.

    Args:
        cache: Where to store.
        config: The identity of the embeddings.
        clips: A dataset; or sample id (`file_id:class`) → audio file or `AudioSource`.
        model: Hub name, checkpoint folder, or an `AudioModel`; None takes `config.model_name`.
        batch_size: Clips per forward pass.
        device: `"cpu"` or `"cuda"`; None takes the cluster's GPUs if it has any.
        progress: Show a bar; None does if standard error is a terminal.
        dataset_root: Kept in the store's metadata.
        commit_seconds: Commit at least this often.
        recompute_changed: Compute cached clips again, too, whose file has changed since.
        address: Of the cluster; None takes `RAY_ADDRESS`, else a cluster that runs on this machine,
            else starts one here for the time of the run.
        num_actors: Processes that run the model; None: one for each GPU, else for each node.
        staging: A folder that all nodes share, or a URL, for hidden states: embeddings wait there
            as files and not in Ray's object store, and what a killed run has left there is stored
            by the next.

    Returns:
        What was done, failures included.

    Raises:
        MissingDependencyError: ray isn't installed.
        ConfigError: The config doesn't fit the model, or an option is no good.
        DatasetError: Two files for one sample id, or the files aren't on a node.
        ExtractionError: No cluster, too little memory on a device, or a unit that kills every
            process that tries it.
        ModelLoadError: The model can't be loaded, here or on a node.
        ProvenanceMismatchError: The store was filled with other weights or features.
        RemoteError: The staging place can't be reached.
        CacheFullError: A disk is full; what was committed is kept.
    """
    check_options(batch_size, None, commit_seconds)
    check_device(device)
    if num_actors is not None and num_actors < 1:
        raise ConfigError(f"num_actors: {num_actors}; it must be 1 or more")
    started = time.perf_counter()
    place = None if staging is None else StagingPlace(staging, config)
    run = _RayRun(cache, config, progress=progress, dataset_root=dataset_root)
    run.take(pairs_of(clips), batch_size)
    run.left_out = counts_of_left_out(clips)
    missing = run.look_at_sources(run.plan(), recompute=recompute_changed)
    if not missing:
        run.outcomes.record_failures(run.cache.path(config))
        run.moved_model = check_unbuilt_model(run.cache, config, model)
        return run.summary(time.perf_counter() - started)
    cache.check_writable(config)
    given = config.model_name if model is None else model
    found = ready_model(given, config)  # its errors are for the user to read, before Ray starts
    check_duration(config, found.make_front_end(config))
    shape = found.embedding_shape(config)
    run.check_space(shape)
    digest = None
    if isinstance(given, (str, os.PathLike)):
        run.model = os.fspath(given)
        folder = identify(given)
        given = os.fspath(Path(folder.location).absolute()) if folder.is_local else run.model
        digest = found.checkpoint.weights_digest  # type: ignore[attr-defined]
    if config not in cache:
        cache.explain(config).log_new_store()
    pipeline = UnitPipeline(
        address,
        num_actors,
        batch_size,
        given,
        digest,
        device,
        shape=shape if isinstance(found, ModuleEmbedder) else None,
        is_proven=run.known_shape() is not None,
    )
    run.compute(missing, pipeline, place, commit_seconds)
    return run.summary(time.perf_counter() - started)


class _RayRun(ExtractionRun):
    """One extraction whose units come back from a pipeline."""

    _bar: ProgressBar
    _stack: contextlib.ExitStack
    _commit_seconds: float
    _place: StagingPlace | None
    _provenance: dict[str, str] | None = None

    def compute(
        self,
        missing: Mapping[str, str | AudioSource],
        pipeline: UnitPipeline,
        place: StagingPlace | None,
        commit_seconds: float,
    ) -> None:
        """Have what is missing computed, and store it.

        Args:
            missing: Sample id → audio file, sorted.
            pipeline: Who computes.
            place: Where embeddings wait.
            commit_seconds: Commit at least this often.

        Raises:
            CacheError: See `extract_on_ray`.
        """
        self._bar = ProgressBar(
            self.num_cached + len(missing),
            initial=self.num_cached,
            shown=self.progress,
            description=self._description(),
        )
        self._place, self._commit_seconds = place, commit_seconds
        units = dict(enumerate(units_of(self.paths, missing, pipeline.batch_size)))
        with contextlib.ExitStack() as self._stack:
            self._stack.enter_context(self._bar)
            with self._keeping():
                self.outcomes.is_front_end_proven = self.known_shape() is not None
                self._store_leftovers(missing)
                left = self._left_of(units)
                if left:
                    ray = self._stack.enter_context(connected(pipeline.address))
                    self._passes(ray, left, pipeline)
                    # Processes of a killed run may have ended after this one began.
                    self._store_leftovers({})
                self.outcomes.check_front_end(is_last=True)

    def _passes(self, ray: Any, left: dict[int, list[str]], pipeline: UnitPipeline) -> None:
        for _ in range(_MOST_PASSES):
            clips = {number: self._clips_of(unit) for number, unit in left.items()}
            with pipeline.answers(ray, self.config, clips, self._place) as answers:
                for number, answer in answers:
                    if self._take(answer):
                        left.pop(number, None)
            if not left:
                return
            _logger.warning("%d units have to be computed again", len(left))
        raise ExtractionError(
            f"{len(left)} units were computed and not found at {self._place} or damaged there, "
            f"{_MOST_PASSES} times; is somebody removing them?"
        )

    def _left_of(self, units: Mapping[int, list[str]]) -> dict[int, list[str]]:
        wanted = set(self.still_missing([i for unit in units.values() for i in unit]))
        left = {number: [i for i in unit if i in wanted] for number, unit in units.items()}
        return {number: unit for number, unit in left.items() if unit}

    def _clips_of(self, unit: list[str]) -> list[Clip]:
        from lmdbcache.extraction.feature_batch import Clip

        # Processes on nodes have other working folders.
        return [Clip(sample_id, _absolute(self.paths[sample_id])) for sample_id in unit]

    def _take(self, answer: UnitAnswer) -> bool:
        """Store a unit; False if it has to be computed again."""
        if answer.error is not None:
            raise answer.error from (_TraceOnNodeError(answer.trace) if answer.trace else None)
        self._check_files(answer)
        batch, embeddings = answer.batch, answer.embeddings
        batch.failures = [
            ClipFailure(failure.sample_id, str(self.paths[failure.sample_id]), failure.reason)
            for failure in batch.failures
        ]
        if answer.staged is not None:
            found = self._staged(*answer.staged)
            if found is None:
                return False
            embeddings = found.embeddings
            batch.sample_ids = list(found.sample_ids)  # in their order there
        self.compute_seconds += answer.seconds
        if embeddings is not None:
            self.built_model = True
            self._store(batch, embeddings, answer.provenance)
        if answer.staged is not None:
            self._forget(answer.staged[0])
        self._count(batch, self._bar)
        return True

    def _store(self, batch: FeatureBatch, embeddings: Any, provenance: dict[str, str]) -> None:
        """Collect a batch's embeddings for the next commit, but for those stored meanwhile."""
        rows = dict(zip(batch.sample_ids, embeddings, strict=True))
        wanted = set(self.still_missing(batch.sample_ids))
        self._leave_out([i for i in batch.sample_ids if i not in wanted], self._bar)
        batch.sample_ids = [i for i in batch.sample_ids if i in wanted]
        if not batch.sample_ids:
            return
        writer = self.writer
        if writer is None or self._provenance is None:
            self.check_space(embeddings.shape[1:])
            self._provenance = provenance
            writer = self.writer = self._stack.enter_context(
                self._writer(provenance, self._commit_seconds)
            )
        elif provenance != self._provenance:
            store = self.cache.path(self.config)
            metadata = StoreMetadata.new(self.config).with_provenance(self._provenance, store)
            metadata.with_provenance(provenance, store)
        self._put(batch, [rows[i] for i in batch.sample_ids], writer)

    def _check_files(self, answer: UnitAnswer) -> None:
        """A file that is here and not on a node is no failure of the clip."""
        for sample_id in answer.absent:
            path = _absolute(self.paths[sample_id])
            if isinstance(path, str) and Path(path).exists():
                raise DatasetError(
                    f"{path} isn't on node {answer.host}, but it is here: the audio files have to "
                    "lie at the same paths on every node"
                )

    # ---- staged units

    def _store_leftovers(self, missing: Mapping[str, str | AudioSource]) -> None:
        """What a run that was killed has left is as good as computed now."""
        from lmdbcache.extraction.feature_batch import FeatureBatch

        if self._place is None:
            return
        for name, num_bytes in self._place.names().items():
            found = self._staged(name, num_bytes)
            if found is not None:
                kept = [i for i in found.sample_ids if i in missing]
                rows = dict(zip(found.sample_ids, found.embeddings, strict=True))
                batch = FeatureBatch(
                    kept,
                    silent=list(found.silent),
                    cancelled=list(found.cancelled),
                    sources=found.sources,
                )
                if kept:
                    embeddings = np.stack([rows[i] for i in kept])
                    self._store(batch, embeddings, found.provenance)
                    self._count(batch, self._bar)
            self._forget(name)

    def _staged(self, name: str, num_bytes: int) -> StagedUnit | None:
        assert self._place is not None
        try:
            return self._place.get(name, num_bytes)
        except (IntegrityError, RemoteError) as error:
            _logger.warning("%s; its clips are computed again", error)
            return None

    def _forget(self, name: str) -> None:
        """A unit's embeddings are stored, in one transaction, before it is removed."""
        assert self._place is not None
        if self.writer is not None:
            self.writer.commit()
        self._place.remove(name)


class _TraceOnNodeError(Exception):
    """Where an error on a node came from."""

    def __str__(self) -> str:
        return f"on the node:\n{self.args[0]}"


def _absolute(source: str | AudioSource) -> str | AudioSource:
    return os.path.abspath(source) if isinstance(source, str) else source  # noqa: PTH100

"""What runs on the nodes of a Ray cluster: units are decoded by tasks and embedded by actors.

Nothing here raises: Ray would put an exception into its own, with a traceback around it, and it
tries again only what died. Errors go to the driver as values.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache.audio import decoder_of
from lmdbcache.cache import ClipFailure
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import AudioModel, FrontEnd, PretrainedModel, ready_model
from lmdbcache.errors import (
    CacheError,
    ExtractionError,
    InvalidEmbeddingError,
    ModelLoadError,
    ModuleError,
    StorageError,
)
from lmdbcache.extraction.decoding import decode_unit
from lmdbcache.extraction.feature_batch import Clip, FeatureBatch
from lmdbcache.extraction.forward_passes import ForwardPasses
from lmdbcache.extraction.staged_units import StagedUnit, StagingPlace
from lmdbcache.storage import as_stored

__all__ = ["DecodeUnits", "EmbedUnits", "Job", "UnitAnswer"]

_POLL_SECONDS: Final = 0.5

_front_ends: dict[str, FrontEnd] = {}


@dataclass(frozen=True)
class Job:
    """What every process of one run is told.

    Args:
        run: Names the run.
        config: Identity of the embeddings.
        model: Hub name, absolute checkpoint folder, or an `AudioModel`.
        weights_digest: Of the checkpoint where the run was started; None if there is none.
        device: Where the model runs; None takes the GPU that Ray gives, if any.
        num_threads: CPU threads of the model.
        ledger: The actor that is a `Ledger`.
        most_beginnings: How often a unit is tried whose process dies.
        staging: Where embeddings are put; None sends them back.
        shape: That every embedding has to have; None takes any.
        is_proven: Whether the store has embeddings of this model.
    """

    run: str
    config: CacheConfig
    model: str | AudioModel
    weights_digest: str | None
    device: str | None
    num_threads: int
    ledger: Any
    most_beginnings: int
    staging: StagingPlace | None = None
    shape: tuple[int, ...] | None = None
    is_proven: bool = False


@dataclass
class UnitAnswer:
    """What became of a unit.

    Args:
        batch: Its clips; the features are gone when it is embedded.
        embeddings: One for each of `batch.sample_ids`, in the stored dtype; None if there are none,
            or if they are staged.
        staged: Name and bytes of the staged unit.
        absent: Sample ids whose file isn't on the node.
        provenance: Of the features, and of the model.
        seconds: Wall time of the forward pass.
        host: The node's name.
        error: What ends the whole run, such as a model that can't be loaded.
        trace: Where an error that isn't ours came from.
    """

    batch: FeatureBatch = field(default_factory=FeatureBatch)
    embeddings: npt.NDArray[Any] | None = None
    staged: tuple[str, int] | None = None
    absent: list[str] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    host: str = field(default_factory=socket.gethostname)
    error: CacheError | None = None
    trace: str = ""


class DecodeUnits:
    """Rows of (unit, its clips) → rows of (unit, its features). A Ray task, once per process."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """One row."""
        unit, clips = _row(rows, "clips")
        answer = UnitAnswer()
        with _as_value(answer):
            _check_beginnings(self._job, "decoding", unit, clips)
            self._decode(clips, answer)
        return _rows(unit, "decoded", answer)

    def _decode(self, clips: list[Clip], answer: UnitAnswer) -> None:
        torch.set_num_threads(1)  # features are fastest on one thread per clip
        config = self._job.config
        front_end = self._front_end()
        answer.batch = decode_unit(
            clips,
            front_end,
            config.sample_rate,
            config.duration,
            decoder_of(config.front_end),
        )
        answer.provenance = front_end.provenance()
        failed = {failure.sample_id for failure in answer.batch.failures}
        answer.absent = [
            clip.sample_id
            for clip in clips
            if clip.sample_id in failed
            and isinstance(clip.source, str)
            and not Path(clip.source).exists()
        ]

    def _front_end(self) -> FrontEnd:
        # Kept by the process: Ray unpickles this object for each task.
        if self._job.run not in _front_ends:
            _front_ends.clear()
            _front_ends[self._job.run] = _model_of(self._job).make_front_end(self._job.config)
        return _front_ends[self._job.run]


class EmbedUnits:
    """Rows of (unit, its features) → rows of (unit, its embeddings). A Ray actor."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._passes: ForwardPasses | None = None

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """One row."""
        unit, decoded = _row(rows, "decoded")
        answer: UnitAnswer = decoded
        if answer.error is None:
            answer.host = socket.gethostname()
            with _as_value(answer):
                _check_beginnings(self._job, "embedding", unit, answer.batch.sample_ids)
                if answer.batch.features is not None:
                    self._embed(answer)
                if answer.embeddings is not None and self._job.staging is not None:
                    self._stage(unit, answer)
        answer.batch.features = None
        return _rows(unit, "answer", answer)

    def _embed(self, answer: UnitAnswer) -> None:
        batch, job = answer.batch, self._job
        if self._passes is None:
            torch.set_num_threads(job.num_threads)
            if job.staging is not None and not job.staging.has_mark(job.run):
                raise StorageError(
                    f"{job.staging} on this node isn't the place that the run was started with; "
                    "--staging has to be a folder that all nodes share, or a URL"
                )
            embedder = _model_of(job).make_embedder(job.config, job.device)
            self._passes = ForwardPasses(embedder, job.config, job.shape, is_proven=job.is_proven)
        started = time.perf_counter()
        given = self._passes.embed(batch)
        answer.seconds = time.perf_counter() - started
        answer.provenance = {**answer.provenance, **self._passes.embedder.provenance()}
        rows = []
        for sample_id, embedding in zip(list(batch.sample_ids), given, strict=True):
            try:
                rows.append(as_stored(sample_id, embedding, job.config.dtype))
            except InvalidEmbeddingError as error:
                batch.sample_ids.remove(sample_id)
                batch.failures.append(ClipFailure(sample_id, "", str(error)))
        answer.embeddings = np.stack(rows) if rows else None

    def _stage(self, unit: int, answer: UnitAnswer) -> None:
        job, batch = self._job, answer.batch
        assert job.staging is not None
        while not _answer_of(job.ledger.may_stage.remote(unit)):
            time.sleep(_POLL_SECONDS)
        assert answer.embeddings is not None
        staged = StagedUnit(
            tuple(batch.sample_ids),
            answer.embeddings,
            {sample_id: batch.sources.get(sample_id) for sample_id in batch.sample_ids},
            tuple(batch.silent),
            answer.provenance,
            tuple(batch.cancelled),
        )
        answer.staged, answer.embeddings = job.staging.put(staged), None


def _model_of(job: Job) -> AudioModel:
    """The model, by the files of this node."""
    if not isinstance(job.model, str):
        return job.model
    found = ready_model(job.model, job.config)
    digest = found.checkpoint.weights_digest if isinstance(found, PretrainedModel) else None
    if job.weights_digest and digest and digest != job.weights_digest:
        raise ModelLoadError(
            f"{job.model} has the weights {digest} on this node and {job.weights_digest} where the "
            "run was started: give every node the same files"
        )
    return found


def _check_beginnings(
    job: Job, step: str, unit: int, clips: Sequence[Clip] | Sequence[str]
) -> None:
    if _answer_of(job.ledger.begin.remote(step, unit)) > job.most_beginnings:
        names = [clip if isinstance(clip, str) else clip.sample_id for clip in clips]
        raise ExtractionError(
            f"{step} the clips {', '.join(names)} has ended its process {job.most_beginnings} "
            "times. What was computed is kept; memory may be short on the nodes, or a clip may "
            "crash its decoder: leave it out, or run again with a smaller batch_size"
        )


@contextlib.contextmanager
def _as_value(answer: UnitAnswer) -> Iterator[None]:
    try:
        yield
    except CacheError as error:
        answer.error = type(error)(f"on node {socket.gethostname()}: {error}")
        if isinstance(error, ModuleError):
            answer.trace = traceback.format_exc()
    except Exception as error:  # noqa: BLE001 - of a model of the user's own
        text = str(error).splitlines()
        answer.error = ExtractionError(
            f"on node {socket.gethostname()}: {type(error).__name__}: {text[0] if text else ''}"
        )
        answer.trace = traceback.format_exc()


def _answer_of(asked: Any) -> Any:
    import ray

    return ray.get(asked)


def _row(rows: Mapping[str, Any], column: str) -> tuple[int, Any]:
    # Made by another process of this run.
    return int(rows["unit"][0]), pickle.loads(rows[column][0])


def _rows(unit: int, column: str, answer: UnitAnswer) -> dict[str, Any]:
    if answer.error is not None:
        answer.batch, answer.embeddings = FeatureBatch(), None
    return {"unit": [unit], column: [pickle.dumps(answer, protocol=5)]}

"""What an extraction would do and take: bytes, seconds, and what limits it."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import xxhash

from lmdbcache.audio import AudioSource, Clips
from lmdbcache.config import DTYPES, CacheConfig
from lmdbcache.embedders import AudioModel, PretrainedModel, known_model, ready_model
from lmdbcache.errors import ExtractionError, MissingDependencyError
from lmdbcache.extraction.clips import features_of
from lmdbcache.extraction.one_pass import configs_of_one_pass, for_one_or_several
from lmdbcache.extraction.pipeline import ExtractionRun, outputs_of
from lmdbcache.extraction.space import (
    estimated_bytes,
    needed_bytes,
    ways_to_need_less,
)
from lmdbcache.files import free_bytes, readable_size
from lmdbcache.machine import memory_limit
from lmdbcache.storage import Report, value_bytes

if TYPE_CHECKING:
    from lmdbcache.cache import EmbeddingCache
    from lmdbcache.datasets import AudioDataset
    from lmdbcache.extraction.ranks import RankShare
    from lmdbcache.extraction.store_to_fill import StoreToFill

# One writer that stores in the order of the sample ids; docs/scaling.md says how it was measured.
_WRITE_SECONDS_EACH: Final = 8e-6
_WRITE_BYTES_PER_SECOND: Final = 220e6
_MANY_WRITE_SECONDS: Final = 3600.0
_MOST_CLIPS: Final = 4096  # of a trial


class Choice(NamedTuple):
    """One output and dtype; each pair makes another store.

    Args:
        output: What is stored of the model's output.
        dtype: How it is stored.
        embedding_shape: Shape of one embedding; None while the model isn't on this machine.
        bytes_for_all: What the embeddings of all clips take; None if the shape isn't known.
    """

    output: str
    dtype: str
    embedding_shape: tuple[int, ...] | None
    bytes_for_all: int | None


class Limit(NamedTuple):
    """Something that this machine would exceed, or that makes a run slow.

    Args:
        name: `memory`, `disk` or `writer`.
        message: By how much, and what to do.
    """

    name: str
    message: str


@dataclass(frozen=True)
class Trial:
    """What embedding some real clips for a few seconds has shown.

    Args:
        clips_per_second: Decoding and the model side by side, as an extraction runs them. With
            windows, each of these counts.
        model_share: Share of the time that the forward passes took, 0 to 1. Close to 1 the model
            is what limits the speed, otherwise decoding is.
        start_seconds: Until the model was loaded.
        num_workers: Decoding processes.
        num_clips: Clips of the trial.
        device: Where the model ran.
    """

    clips_per_second: float
    model_share: float
    start_seconds: float
    num_workers: int
    num_clips: int
    device: str

    def seconds_for(self, num_clips: int) -> float:
        """Return the time that an extraction of so many clips should take."""
        return self.start_seconds + num_clips / self.clips_per_second if num_clips else 0.0


@dataclass(frozen=True)
class ExtractionPlan(Report):
    """What an extraction would do; sizes in bytes.

    Args:
        store: The store's folder.
        num_samples: Distinct samples asked for.
        num_cached: Of these, stored already.
        num_missing: Clips that would be decoded and embedded.
        num_refused: Sample ids that can't be stored.
        embedding_shape: Shape of one embedding; None while the model isn't on this machine.
        bytes_needed: What has to be free, a reserve included; None if the shape isn't known.
        bytes_free: What this user may still write there.
        bytes_for_all: What the embeddings of all samples take, those of other ranks included; None
            if the shape isn't known.
        bytes_needed_together: What has to be free for all stores of the plan; None if it has one
            store, or a shape isn't known.
        limits: What this machine would exceed.
        choices: What every other output and dtype would take; empty without a trial.
        trial: What a trial measured, or None.
        no_trial: Why a trial that was asked for didn't run.
        left_out: See `ExtractionSummary`.
        num_windows: Of windows: about how many are missing, by the headers of the files; else None.
    """

    derived: ClassVar = ("fits", "seconds")

    store: Path
    num_samples: int
    num_cached: int
    num_missing: int
    num_refused: int
    embedding_shape: tuple[int, ...] | None
    bytes_needed: int | None
    bytes_free: int
    bytes_for_all: int | None = None
    bytes_needed_together: int | None = None
    limits: tuple[Limit, ...] = ()
    choices: tuple[Choice, ...] = ()
    trial: Trial | None = None
    no_trial: str = ""
    left_out: Mapping[str, Any] = field(default_factory=dict)
    num_windows: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the disk has room for all stores of the plan, as far as that is known."""
        return max(self.bytes_needed or 0, self.bytes_needed_together or 0) <= self.bytes_free

    @property
    def seconds(self) -> float | None:
        """The time for what is missing; None without a trial."""
        number = self.num_missing if self.num_windows is None else self.num_windows
        return self.trial.seconds_for(number) if self.trial else None

    def __str__(self) -> str:
        needed = "bytes not known before the model is on this machine"
        if self.bytes_needed is not None:
            needed = f"{readable_size(self.bytes_needed)} needed, a reserve included"
        if self.bytes_needed_together is not None:
            needed += f", {readable_size(self.bytes_needed_together)} for all stores"
        counts = f"{self.num_cached} are cached, {self.num_missing} to extract"
        if self.num_windows is not None:
            counts += f" (about {self.num_windows} windows)"
        if self.num_refused:
            counts += f", {self.num_refused} have sample ids that can't be stored"
        lines = [
            f"{self.num_samples} samples: {counts}",
            f"{needed}, {readable_size(self.bytes_free)} free",
        ]
        if self.trial is not None:
            what = "the model" if self.trial.model_share > 0.5 else "decoding"
            workers = self.trial.num_workers
            lines.append(
                f"about {_time(self.seconds or 0.0)}: {self.trial.clips_per_second:.1f} clips/s in "
                f"a trial of {self.trial.num_clips} clips on {self.trial.device or 'the device'} "
                f"with {workers} decoding process{'' if workers == 1 else 'es'}; {what} limits it"
            )
        elif self.no_trial:
            lines.append(f"time not known: {self.no_trial}")
        return "\n".join([*lines, *(f"warning: {limit.message}" for limit in self.limits)])


@for_one_or_several
def plan_extraction(
    cache: EmbeddingCache,
    config: CacheConfig | Sequence[CacheConfig],
    clips: Clips | AudioDataset,
    *,
    model: str | os.PathLike[str] | AudioModel | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    device: str | None = None,
    share: RankShare | None = None,
    staging: str | os.PathLike[str] | None = None,
    trial_seconds: float = 0.0,
) -> list[ExtractionPlan]:
    """Return what `extract` would do and take, without doing it. Nothing is stored or downloaded.

    Args:
        cache: Where to store.
        config: The identity of the embeddings; or several, as for `extract`.
        clips: A dataset; or sample id (`file_id:class`) → audio file or `AudioSource`.
        model: Hub name, checkpoint folder, or an `AudioModel` such as `ModuleEmbedder`; None takes
            `config.model_name`.
        batch_size: Clips per forward pass.
        num_workers: Decoding processes; None chooses, 0 decodes in this process.
        device: Where the model runs; None takes a CUDA GPU if there is one.
        share: See `extract`.
        staging: See `extract`.
        trial_seconds: Embed real clips for so long to estimate the time, and give the bytes of
            every other output and dtype; 0 doesn't load the model.

    Returns:
        A plan for each config, without a list for one by itself.

    Raises:
        ConfigError: The model has no such output.
        DatasetError: Two files for one sample id.
        ModelLoadError: The folder isn't a checkpoint.
    """
    configs = configs_of_one_pass(config)
    run = ExtractionRun(
        cache, configs, clips, batch_size=batch_size, share=share, staging=staging, patience=0.0
    )
    run.plan()
    named = run.config.model_name if model is None else model
    found = known_model(named)
    plans = [_plan_of(run, store, found) for store in run.stores]
    run.close_readers()
    needed = [plan.bytes_needed for plan in plans]
    if len(plans) > 1 and None not in needed:
        plans = [replace(plan, bytes_needed_together=sum(filter(None, needed))) for plan in plans]
    if trial_seconds:
        trial, reason = None, ""
        num_workers = run.share.decoding_processes() if num_workers is None else num_workers
        if found is None or (isinstance(found, PretrainedModel) and not found.checkpoint.is_local):
            reason = "the model isn't on this machine"
        elif not run.paths:
            reason = "no clips were given"
        else:
            try:
                ready = ready_model(named, run.config)
                trial = _try(run, ready, device, batch_size, num_workers, trial_seconds)
            except (ExtractionError, MissingDependencyError) as error:  # the bytes are known
                reason = str(error)
        shapes = {
            one.output: plan.embedding_shape for one, plan in zip(configs, plans, strict=True)
        }
        choices = tuple(_choices(run, found, shapes))
        plans = [replace(plan, choices=choices, trial=trial, no_trial=reason) for plan in plans]
    return [
        replace(
            plan,
            limits=tuple(
                _limits(
                    plan,
                    store.config,
                    len(run.stored_as(store.to_be_written)),
                    len(run.stored_as(run.all_samples)),
                )
            ),
        )
        for plan, store in zip(plans, run.stores, strict=True)
    ]


def _plan_of(run: ExtractionRun, store: StoreToFill, model: AudioModel | None) -> ExtractionPlan:
    shape = store.known_shape()
    if model is not None:
        model.check(store.config)
        shape = shape or model.embedding_shape(store.config)
    needed = None if store.missing else 0
    if shape is not None and store.missing:
        needed = needed_bytes(run.stored_as(store.missing), shape, store.config.dtype)
    return ExtractionPlan(
        store=store.path,
        num_samples=len(run.asked),
        num_cached=store.num_cached,
        num_missing=len(store.missing),
        num_refused=len(store.outcomes.failures),
        embedding_shape=shape,
        bytes_needed=needed,
        bytes_free=free_bytes(store.path),
        bytes_for_all=None
        if shape is None
        else estimated_bytes(run.stored_as(run.all_samples), shape, store.config.dtype),
        num_windows=None if store.config.window is None else len(run.stored_as(store.missing)),
    )


def _choices(
    run: ExtractionRun, model: AudioModel | None, known: Mapping[str, tuple[int, ...] | None]
) -> Iterator[Choice]:
    outputs = dict.fromkeys((*(model.outputs if model else ()), *known))
    for output, dtype in itertools.product(outputs, DTYPES):
        shape = known.get(output)
        if shape is None and model is not None:
            shape = model.embedding_shape(run.config.replace(output=output, dtype=dtype))
        size = None
        if shape is not None:
            size = estimated_bytes(run.stored_as(run.all_samples), shape, dtype)
        yield Choice(output, dtype, shape, size)


def _try(
    run: ExtractionRun,
    model: AudioModel,
    device: str | None,
    batch_size: int,
    num_workers: int,
    seconds: float,
) -> Trial:
    """Decode and embed some real clips, as an extraction does.

    Raises:
        ConfigError: The model gives one output by a forward pass, and several are wanted.
        ExtractionError: None of the clips gives features.
        MissingDependencyError: torch is missing.
        ModelLoadError: The model can't be loaded.
    """
    clips: Mapping[str, str | AudioSource] = run.paths
    # Which clips are tried, a hash of their ids decides; few come round again, as the
    # first batches don't count.
    picked = sorted(clips, key=lambda i: xxhash.xxh3_64_intdigest(i.encode("utf-8", "replace")))
    trial = [(i, clips[i]) for i in itertools.islice(itertools.cycle(picked), _MOST_CLIPS)]
    unit_size = batch_size if run.config.window is None else 1
    units = [trial[start : start + unit_size] for start in range(0, len(trial), unit_size)]
    began = time.perf_counter()
    front_end = model.make_front_end(run.config)
    front_end.provenance()  # imports what the workers then have
    outputs = outputs_of(run.stores)
    with features_of(
        units, run.config, front_end, num_workers=num_workers, batch_size=batch_size
    ) as batches:
        embedder, number, model_seconds = None, 0, 0.0
        started = start_seconds = began
        # The first batches are those that the workers had to be started for.
        for index, batch in enumerate(batches):
            for _, features in batch.groups():
                if embedder is None:
                    from lmdbcache.extraction.embedding import check_gives

                    embedder = model.make_embedder(run.config, device)
                    check_gives(embedder, model.identity, outputs)
                    start_seconds = time.perf_counter()
                before = time.perf_counter()
                if len(outputs) > 1:
                    embedder.embed_outputs(features, outputs)  # type: ignore[attr-defined]
                else:
                    embedder.embed(features)
                model_seconds += time.perf_counter() - before
                number += len(features)
            if index == max(0, num_workers - 1) and embedder is not None:
                number, model_seconds, started = 0, 0.0, time.perf_counter()
            elif number >= len(picked) or (number and time.perf_counter() - started > seconds):
                break
        taken = time.perf_counter() - started
    if embedder is None or not number:
        raise ExtractionError("none of the clips on trial gives features; see `extract`")
    return Trial(
        clips_per_second=number / taken,
        model_share=min(1.0, model_seconds / taken),
        start_seconds=start_seconds - began,
        num_workers=num_workers,
        num_clips=number,
        device=str(embedder.provenance().get("device", "")),
    )


def _limits(
    plan: ExtractionPlan, config: CacheConfig, num_missing: int, num_samples: int
) -> Iterator[Limit]:
    """Yield what this machine would exceed; nothing is known without the shape.

    Args:
        plan: What is known so far.
        config: The store's identity.
        num_missing: How many embeddings it lacks, those of other ranks included.
        num_samples: How many it will have.
    """
    shape, size = plan.embedding_shape, plan.bytes_for_all
    if shape is None or size is None:
        return
    smaller = ", ".join([*ways_to_need_less(shape, config.dtype), "or"])
    memory = memory_limit()
    if size > memory:
        yield Limit(
            "memory",
            f"the store will take {readable_size(size)}, and there are {readable_size(memory)} of "
            f"memory: {100 * (1 - memory / size):.0f} % of random reads will wait for the disk; "
            f"{smaller} read on a machine with more memory",
        )
    stored = size * (1 - num_missing / max(1, num_samples))
    if size - stored <= plan.bytes_free < 2 * size - stored:
        yield Limit(
            "disk",
            f"the disk has no room for a second copy of {readable_size(size)}, which compaction, "
            "repair and the merging of staging stores need; free space, or choose another `root`",
        )
    each = value_bytes(shape, config.dtype)
    write_seconds = _WRITE_SECONDS_EACH + each / _WRITE_BYTES_PER_SECOND
    rate = plan.trial.clips_per_second if plan.trial else 0.0
    if rate * write_seconds > 1:
        yield Limit(
            "writer",
            f"this extraction computes {readable_size(rate * each)} of embeddings a second, and "
            f"one writer stores about {readable_size(each / write_seconds)}: the model will wait "
            f"for the disk; {smaller} give each process a store on another disk (`staging`)",
        )
    elif write_seconds * num_missing > _MANY_WRITE_SECONDS:
        yield Limit(
            "writer",
            f"one writer takes {_time(write_seconds * num_missing)} for what is "
            f"missing, however many GPUs compute it; {smaller} give each process another store "
            "(`staging`)",
        )


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 72 else f"{hours // 24} days"

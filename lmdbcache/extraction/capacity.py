"""What each output and dtype would take of disk and time, measured before anything is stored."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import xxhash

from lmdbcache.audio import AudioSource
from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import DTYPES, CacheConfig
from lmdbcache.embedders import (
    AudioModel,
    Embedder,
    FrontEnd,
    PretrainedModel,
    known_model,
    ready_model,
)
from lmdbcache.errors import ExtractionError, MissingDependencyError
from lmdbcache.extraction.features import features_of
from lmdbcache.extraction.pipeline import default_num_workers, plan_extractions
from lmdbcache.extraction.scaling import ScalingWarning, speed_warnings
from lmdbcache.extraction.space import ExtractionPlan

__all__ = ["CapacityPlan", "Choice", "Speed", "measure_speed", "plan_capacity"]

_TRIAL_SECONDS: Final = 5.0
_MOST_CLIPS: Final = 4096  # of a trial
_CLIPS_OF_FRONT_END: Final = 64
_PASSES: Final = 3


@dataclass(frozen=True)
class Choice:
    """One output and dtype, which make a store of their own.

    Args:
        output: What is stored of the model's output.
        dtype: How it is stored.
        plan: What is missing in this store, and the space that it needs.
    """

    output: str
    dtype: str
    plan: ExtractionPlan

    @property
    def bytes_for_all(self) -> int | None:
        """What the embeddings of all clips take; None while the model isn't on this machine."""
        return self.plan.bytes_for_all


@dataclass(frozen=True)
class Speed:
    """What a trial measured on this machine; rates in clips per second.

    Args:
        front_end: Decoding and features, one process.
        model: The forward pass alone.
        together: Both side by side, as an extraction runs them; nothing was stored.
        start_seconds: Until the model was loaded and had run once.
        num_workers: Decoding processes.
        num_clips: Clips of the trial.
        device: Where the model ran.
    """

    front_end: float
    model: float
    together: float
    start_seconds: float
    num_workers: int
    num_clips: int
    device: str

    def seconds_for(self, num_clips: int) -> float:
        """The time that an extraction of so many clips should take."""
        return self.start_seconds + num_clips / self.together if num_clips else 0.0


@dataclass(frozen=True)
class CapacityPlan:
    """What an extraction would take, for every output and dtype.

    Args:
        chosen: The one that was asked for.
        choices: All of them, `chosen` included.
        speed: What the trial measured, or None.
        no_speed: Why there was no trial.
    """

    chosen: Choice
    choices: tuple[Choice, ...]
    speed: Speed | None
    no_speed: str = ""

    @property
    def seconds(self) -> float | None:
        """The time for what is missing of the chosen one; None if that isn't known."""
        return self.speed.seconds_for(self.chosen.plan.num_missing) if self.speed else None

    @property
    def seconds_for_all(self) -> float | None:
        """The time for all clips; None if that isn't known."""
        return self.speed.seconds_for(self.chosen.plan.num_samples) if self.speed else None

    @property
    def warnings(self) -> tuple[ScalingWarning, ...]:
        """What of the chosen one this machine won't bear."""
        plan = self.chosen.plan
        if self.speed is None or plan.embedding_shape is None:
            return plan.warnings
        dtype = self.chosen.dtype
        return (*plan.warnings, *speed_warnings(plan.embedding_shape, dtype, self.speed.together))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **self.chosen.plan.to_dict(),
            "warnings": [warning.to_dict() for warning in self.warnings],
            "output": self.chosen.output,
            "dtype": self.chosen.dtype,
            "seconds": self.seconds,
            "seconds_for_all": self.seconds_for_all,
            "speed": asdict(self.speed) if self.speed else None,
            "no_speed": self.no_speed,
            "choices": [
                {
                    "output": choice.output,
                    "dtype": choice.dtype,
                    **choice.plan.to_dict(),
                }
                for choice in self.choices
            ],
        }


def plan_capacity(
    cache: EmbeddingCache,
    config: CacheConfig,
    clips: Mapping[str, str | AudioSource],
    *,
    model: str | os.PathLike[str] | AudioModel | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    device: str | None = None,
    trial_seconds: float = _TRIAL_SECONDS,
) -> CapacityPlan:
    """What `extract` would take, for every output and dtype of the model. Stores nothing.

    Args:
        cache: Where to store.
        config: The identity of the embeddings.
        clips: Sample id (`file_id:class`) → audio file.
        model: Hub name or checkpoint folder; None takes `config.model_name`.
        batch_size: Clips per forward pass.
        num_workers: Decoding processes; None chooses, 0 decodes in this process.
        device: Where the model runs; None takes a CUDA GPU if there is one.
        trial_seconds: How long clips are embedded on trial.

    Raises:
        ConfigError: The model has no such output.
        ModelLoadError: The folder isn't a checkpoint.
    """
    named = config.model_name if model is None else model
    found = known_model(named)
    outputs = dict.fromkeys((config.output, *(found.outputs if found else ())))
    dtypes = dict.fromkeys((config.dtype, *DTYPES))
    rows = list(itertools.product(outputs, dtypes))
    configs = [config.replace(output=output, dtype=dtype) for output, dtype in rows]
    plans = plan_extractions(cache, configs, clips, model=model)
    choices = [Choice(*row, plan) for row, plan in zip(rows, plans, strict=True)]
    chosen = choices[0]
    speed, no_speed = None, ""
    if found is None or not _is_here(found):
        # The store may know the shape nevertheless. Nothing is downloaded for a plan.
        no_speed = "the model isn't on this machine"
    elif not clips:
        no_speed = "there are no clips"
    else:
        try:
            ready = ready_model(named, config)
            speed = measure_speed(
                config,
                clips,
                ready.make_front_end(config),
                partial(ready.make_embedder, config, device),
                batch_size=batch_size,
                num_workers=default_num_workers() if num_workers is None else num_workers,
                seconds=trial_seconds,
            )
        except (
            ExtractionError,
            MissingDependencyError,
        ) as error:  # the bytes are known nevertheless
            no_speed = str(error)
    names = list(found.outputs if found else outputs)
    order = sorted(choices, key=lambda c: (names.index(c.output), DTYPES.index(c.dtype)))
    return CapacityPlan(chosen, tuple(order), speed, no_speed)


def _is_here(model: AudioModel) -> bool:
    return not isinstance(model, PretrainedModel) or model.checkpoint.is_local


def measure_speed(
    config: CacheConfig,
    clips: Mapping[str, str | AudioSource],
    front_end: FrontEnd,
    make_embedder: Callable[[], Embedder],
    *,
    batch_size: int,
    num_workers: int,
    seconds: float = _TRIAL_SECONDS,
) -> Speed:
    """Decode and embed some real clips for a few seconds, as an extraction does.

    Args:
        config: Sample rate and duration.
        clips: Sample id → audio file; which of them are tried a hash of their ids decides.
        front_end: Waveform → features.
        make_embedder: Builds the model.
        batch_size: Clips per forward pass.
        num_workers: Decoding processes; 0 decodes in this process.
        seconds: How long.

    Raises:
        ExtractionError: torch is missing, or not one of the clips gives features.
        ModelLoadError: The model can't be loaded.
    """
    picked = sorted(clips, key=lambda i: xxhash.xxh3_64_intdigest(i.encode("utf-8", "replace")))
    # Few clips come round again, so that they fill the time.
    trial = list(itertools.islice(itertools.cycle(picked), _MOST_CLIPS))
    one, all_of_them = min(1, num_workers), num_workers

    def features(num_workers: int) -> contextlib.AbstractContextManager[Iterator[Any]]:
        return features_of(
            [(sample_id, clips[sample_id]) for sample_id in trial],
            config,
            front_end,
            batch_size=batch_size,
            num_workers=num_workers,
        )

    started = time.perf_counter()
    front_end.provenance()  # imports what the workers then have
    embedder = make_embedder()
    start_seconds = time.perf_counter() - started
    with features(one) as batches:
        first, front_end_rate = _first_features(batches, seconds)
    embedder.embed(first)  # the first pass allocates
    passes = [_seconds_of(lambda: embedder.embed(first)) for _ in range(_PASSES)]
    with features(all_of_them) as batches:
        num_clips, taken = _embedded(batches, embedder, seconds, max(1, num_workers))
    return Speed(
        front_end=front_end_rate,
        model=len(first) / statistics.median(passes),
        together=num_clips / taken,
        start_seconds=start_seconds,
        num_workers=num_workers,
        num_clips=num_clips,
        device=str(embedder.provenance().get("device", "")),
    )


def _first_features(batches: Iterator[Any], seconds: float) -> tuple[Any, float]:
    """The first features, and clips per second of one process once it is at work."""
    features, number = None, 0
    started = time.perf_counter()
    for batch in batches:
        if features is None:  # the process was started for these, and builds its extractor
            features = next((stacked for _, stacked in batch.groups()), None)
            started = time.perf_counter()
            continue
        number += batch.num_clips
        if number >= _CLIPS_OF_FRONT_END or time.perf_counter() - started > seconds:
            break
    if features is None:
        raise ExtractionError("none of the clips on trial gives features; see `extract`")
    return features, number / (time.perf_counter() - started)


def _embedded(
    batches: Iterator[Any], embedder: Embedder, seconds: float, num_first: int
) -> tuple[int, float]:
    """(clips, seconds), without the first batches, which the workers had to be started for."""
    number, started = 0, time.perf_counter()
    for index, batch in enumerate(batches):
        for positions, features in batch.groups():
            embedder.embed(features)
            number += len(positions)
        if index == num_first - 1:
            number, started = 0, time.perf_counter()
        elif index >= num_first and time.perf_counter() - started > seconds:
            break
    return number, time.perf_counter() - started


def _seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

"""Clips decoded and turned into features in worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from lmdbcache.embedders.audio import decode, fit, is_digital_silence
from lmdbcache.embedders.base import FrontEnd
from lmdbcache.errors import AudioDecodeError, ExtractionError
from lmdbcache.extraction.summary import ClipFailure

__all__ = ["Clip", "FeatureBatch", "feature_batches"]

_WAIT_SECONDS: Final = 600.0  # a worker that gives nothing for so long is stuck


@dataclass(frozen=True)
class Clip:
    """One sample to extract."""

    sample_id: str
    path: str


@dataclass
class FeatureBatch:
    """One unit of work for the model.

    Args:
        sample_ids: The clips that gave features.
        features: Their features, `(len(sample_ids), ...)` float32, or None if none did.
        failures: The clips that didn't.
        silent: The sample ids of digital silence among `sample_ids`.
    """

    sample_ids: list[str] = field(default_factory=list)
    features: torch.Tensor | None = None
    failures: list[ClipFailure] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    @property
    def num_clips(self) -> int:
        """Clips of this unit, failed ones included."""
        return len(self.sample_ids) + len(self.failures)


class _Units(torch.utils.data.Dataset[FeatureBatch]):
    """The clips cut into fixed units, so that a batch doesn't depend on the number of workers."""

    def __init__(
        self,
        clips: Sequence[Clip],
        front_end: FrontEnd,
        batch_size: int,
        sample_rate: int,
        duration: float,
    ) -> None:
        self.units = [clips[i : i + batch_size] for i in range(0, len(clips), batch_size)]
        self.front_end = front_end
        self.sample_rate = sample_rate
        self.duration = duration

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> FeatureBatch:
        batch = FeatureBatch()
        features = []
        for clip in self.units[index]:
            try:
                features.append(self._features(clip, batch))
            except AudioDecodeError as error:
                batch.failures.append(ClipFailure(clip.sample_id, clip.path, str(error)))
            else:
                batch.sample_ids.append(clip.sample_id)
        if features:
            batch.features = torch.from_numpy(np.stack(features))
        return batch

    def _features(self, clip: Clip, batch: FeatureBatch) -> Any:
        waveform = decode(clip.path, self.sample_rate, self.duration)
        if len(waveform) < self.front_end.min_samples:
            raise AudioDecodeError(
                f"{clip.path!a} has {len(waveform)} samples at {self.sample_rate} Hz; the front "
                f"end needs {self.front_end.min_samples}"
            )
        features = self.front_end(fit(waveform, round(self.sample_rate * self.duration)))
        if not np.isfinite(features).all():
            raise AudioDecodeError(f"{clip.path!a}: its features hold NaN or Inf")
        if is_digital_silence(waveform):
            batch.silent.append(clip.sample_id)
        return features


def feature_batches(
    clips: Sequence[Clip],
    front_end: FrontEnd,
    *,
    batch_size: int,
    num_workers: int,
    sample_rate: int,
    duration: float,
) -> Iterator[FeatureBatch]:
    """Decode clips, in worker processes if any are asked for, in the order given.

    Raises:
        ExtractionError: A worker process was killed or is stuck.
    """
    units = _Units(clips, front_end, batch_size, sample_rate, duration)
    num_workers = min(num_workers, len(units))
    loader = torch.utils.data.DataLoader(
        units,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_begin_worker,
        timeout=_WAIT_SECONDS if num_workers else 0,
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith(("DataLoader worker (", "DataLoader timed out")):
                raise
            raise ExtractionError(
                f"a decoding process ended or got stuck ({str(error).splitlines()[0]}). What was "
                "computed is kept; run again to go on, with num_workers=0 to see which clip it is"
            ) from error
        yield batch


def _begin_worker(_: int) -> None:
    # Features are fastest on one thread per clip; Ctrl-C is the main process's to handle.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)

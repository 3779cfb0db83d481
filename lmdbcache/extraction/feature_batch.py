"""What decoding hands to the model: the features of one unit's clips, and the clips that failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lmdbcache.audio import AudioSource
from lmdbcache.cache import ClipFailure, Source
from lmdbcache.errors import CacheError

__all__ = ["Clip", "FeatureBatch", "stacked_if_alike"]


@dataclass(frozen=True)
class Clip:
    """One sample to extract."""

    sample_id: str
    source: str | AudioSource


@dataclass
class FeatureBatch:
    """One unit of work for the model.

    Args:
        sample_ids: The clips that gave features.
        features: Their features: a tensor `(len(sample_ids), ...)`, or a list of one tensor for
            each where their shapes or dtypes differ; None if no clip gave any.
        failures: The clips that didn't.
        num_features: How many clips gave features.
        num_front_end_errors: How many of the failures are the front end's.
        audio: Sample id → checksum of the waveform, of the clips that aren't silent.
        silent: The sample ids of digital silence among `sample_ids`.
        cancelled: Those whose channels cancel when they are mixed to mono.
        sources: What their files were like right before they were decoded.
        error: What ends the whole run, such as a front end that can't be loaded.
    """

    sample_ids: list[str] = field(default_factory=list)
    features: torch.Tensor | list[torch.Tensor] | None = None
    failures: list[ClipFailure] = field(default_factory=list)
    num_features: int = 0
    num_front_end_errors: int = 0
    audio: dict[str, int] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    sources: dict[str, Source | None] = field(default_factory=dict)
    error: CacheError | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Out of a worker as bytes in its pipe. As a tensor the features would go through /dev/shm,
        # which containers keep small; where it is full, torch loses the batch without a word.
        alike = [(positions, features.numpy()) for positions, features in self.groups()]
        return {**self.__dict__, "features": alike}

    def __setstate__(self, state: dict[str, Any]) -> None:
        alike = state.pop("features")
        self.__dict__.update(state, features=None)
        if len(alike) == 1:
            self.features = torch.from_numpy(alike[0][1])
        elif alike:
            pairs = [
                pair
                for places, rows in alike
                for pair in zip(places, torch.from_numpy(rows), strict=True)
            ]
            self.features = [features for _, features in sorted(pairs, key=lambda pair: pair[0])]

    @property
    def num_clips(self) -> int:
        """Clips of this unit, failed ones included."""
        return len(self.sample_ids) + len(self.failures)

    def keep(self, wanted: set[str]) -> None:
        """Drop the features of all other samples."""
        rows = [row for row, sample_id in enumerate(self.sample_ids) if sample_id in wanted]
        if self.features is not None and len(rows) < len(self.sample_ids):
            self.sample_ids = [self.sample_ids[row] for row in rows]
            if isinstance(self.features, list):
                self.features = stacked_if_alike([self.features[row] for row in rows])
            else:
                self.features = self.features[rows] if rows else None

    def groups(self) -> list[tuple[list[int], torch.Tensor]]:
        """Return (positions in `sample_ids`, their features stacked), by shape and dtype."""
        if self.features is None or isinstance(self.features, torch.Tensor):
            stacked = self.features
            return [] if stacked is None else [(list(range(len(stacked))), stacked)]
        alike: dict[Any, list[int]] = {}
        for position, one in enumerate(self.features):
            alike.setdefault((one.dtype, one.shape), []).append(position)
        return [
            (positions, torch.stack([self.features[position] for position in positions]))
            for positions in alike.values()
        ]


def stacked_if_alike(features: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor] | None:
    """Return the features as one tensor, as they are if they differ, None if there are none."""
    kinds = {(one.dtype, one.shape) for one in features}
    return torch.stack(features) if len(kinds) == 1 else (features or None)

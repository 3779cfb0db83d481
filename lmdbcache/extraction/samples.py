"""A dataset's samples as the clips that an extraction takes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from lmdbcache.datasets.base import AudioDataset, Sample, source_of
from lmdbcache.embedders.audio_source import AudioSource, Clips

__all__ = ["clips_of", "pairs_of"]


def clips_of(samples: Iterable[Sample]) -> list[tuple[str, str | AudioSource]]:
    """(sample id, audio file or source) of each sample."""
    return [
        (f"{sample['file_id']}:{sample['class_name']}", source_of(sample)) for sample in samples
    ]


def pairs_of(
    clips: Clips | AudioDataset,
) -> Iterable[tuple[str, str | os.PathLike[str] | AudioSource]]:
    """(sample id, audio file or source) of a dataset, a Mapping, or pairs."""
    if isinstance(clips, Mapping):
        return clips.items()
    samples = getattr(clips, "samples", None)
    return clips if samples is None else clips_of(samples)  # type: ignore[return-value]

"""A dataset's samples as the clips that an extraction takes."""

from __future__ import annotations

from collections.abc import Iterable

from lmdbcache.datasets.base import Sample, source_of
from lmdbcache.embedders.audio_source import AudioSource

__all__ = ["clips_of"]


def clips_of(samples: Iterable[Sample]) -> list[tuple[str, str | AudioSource]]:
    """(sample id, audio file or source) of each sample."""
    return [
        (f"{sample['file_id']}:{sample['class_name']}", source_of(sample)) for sample in samples
    ]

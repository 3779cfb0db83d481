"""A dataset's samples as the clips that an extraction takes."""

from __future__ import annotations

from collections.abc import Iterable

from lmdbcache.datasets.base import Sample

__all__ = ["clips_of"]


def clips_of(samples: Iterable[Sample]) -> list[tuple[str, str]]:
    """(sample id, audio file) of each sample."""
    return [
        (f"{sample['file_id']}:{sample['class_name']}", sample["audio_path"]) for sample in samples
    ]

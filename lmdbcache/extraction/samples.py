"""A dataset's samples as the clips that an extraction takes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from lmdbcache.audio import AudioSource, Clips, as_source
from lmdbcache.cache import ClipFailure, left_out_counts
from lmdbcache.datasets import AudioDataset, Sample, source_of
from lmdbcache.errors import DatasetError, InvalidSampleIdError
from lmdbcache.storage import canonical_sample_id

__all__ = ["to_clips", "counts_of_left_out", "distinct_clips", "pairs_of"]


def to_clips(samples: Iterable[Sample]) -> list[tuple[str, str | AudioSource]]:
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
    return clips if samples is None else to_clips(samples)  # type: ignore[return-value]


def counts_of_left_out(clips: Clips | AudioDataset) -> dict[str, Any]:
    """How much a dataset leaves out, by kind, suffix and class; empty for other clips."""
    left_out = getattr(clips, "left_out", None)
    return {} if left_out is None else left_out_counts(left_out)


def distinct_clips(
    clips: Iterable[tuple[str, str | os.PathLike[str] | AudioSource]],
) -> tuple[dict[str, str | AudioSource], list[ClipFailure]]:
    """The clips by canonical sample id, and those whose sample id can't be stored.

    Raises:
        DatasetError: Two files for one sample id.
    """
    paths: dict[str, str | AudioSource] = {}
    failures = []
    for sample_id, given in clips:
        source = as_source(given)
        try:
            known = paths.setdefault(canonical_sample_id(sample_id), source)
        except InvalidSampleIdError as error:
            failures.append(ClipFailure(str(sample_id), str(source), str(error)))
            continue
        if known != source:
            raise DatasetError(
                f"{str(known)!a} and {str(source)!a} have the same sample id {sample_id!r}; "
                "rename or leave out one of them"
            )
    return paths, failures

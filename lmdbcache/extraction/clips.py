"""The clips that an extraction is asked for, and their features."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lmdbcache.audio import AudioSource, Clips, as_source
from lmdbcache.cache import ClipFailure, left_out_counts
from lmdbcache.config import CacheConfig
from lmdbcache.datasets import AudioDataset, Sample, source_of
from lmdbcache.embedders import FrontEnd
from lmdbcache.errors import DatasetError, InvalidSampleIdError
from lmdbcache.machine import needing
from lmdbcache.storage import canonical_sample_id, check_recording_id, first_window

if TYPE_CHECKING:
    from lmdbcache.extraction.decoding import Clip, FeatureBatches
    from lmdbcache.extraction.recordings import AllBut


def to_clips(samples: Iterable[Sample]) -> list[tuple[str, str | AudioSource]]:
    """Return (sample id, audio file or source) of each sample."""
    return [
        (f"{sample['file_id']}:{sample['class_name']}", source_of(sample)) for sample in samples
    ]


def pairs_of(
    clips: Clips | AudioDataset,
) -> Iterable[tuple[str, str | os.PathLike[str] | AudioSource]]:
    """Return (sample id, audio file or source) of a dataset, a Mapping, or pairs.

    Raises:
        DatasetError: Neither; such as the path of a folder.
    """
    if isinstance(clips, Mapping):
        return clips.items()
    samples = getattr(clips, "samples", None)
    if samples is not None:
        return to_clips(samples)
    if isinstance(clips, (str, os.PathLike)):
        raise DatasetError(
            f"clips: {clips!r} is a path; open the folder with `open_dataset`, or give pairs of a "
            "sample id and an audio file"
        )
    return [_pair(clip) for clip in clips]  # type: ignore[union-attr]


def _pair(clip: Any) -> tuple[str, str | os.PathLike[str] | AudioSource]:
    if not isinstance(clip, Sequence) or isinstance(clip, str) or len(clip) != 2:
        raise DatasetError(f"clips: {clip!r}; give (sample id, audio file) for each clip")
    return clip[0], clip[1]


def counts_of_left_out(clips: Clips | AudioDataset) -> dict[str, Any]:
    """Return how much a dataset leaves out, by kind, suffix and class; empty for other clips."""
    left_out = getattr(clips, "left_out", None)
    return {} if left_out is None else left_out_counts(left_out)


def distinct_clips(
    clips: Iterable[tuple[str, str | os.PathLike[str] | AudioSource]],
    *,
    have_windows: bool = False,
) -> tuple[dict[str, str | AudioSource], list[ClipFailure]]:
    """Return the clips by canonical sample id, and those whose sample id can't be stored.

    Raises:
        DatasetError: Two files for one sample id.
    """
    paths: dict[str, str | AudioSource] = {}
    failures = []
    for sample_id, given in clips:
        source = as_source(given)
        try:
            canonical = canonical_sample_id(sample_id)
            if have_windows:
                check_recording_id(canonical)
                canonical_sample_id(first_window(canonical))  # which is longer
            known = paths.setdefault(canonical, source)
        except InvalidSampleIdError as error:
            failures.append(ClipFailure(str(sample_id), str(source), str(error)))
            continue
        if known != source:
            raise DatasetError(
                f"{str(known)!a} and {str(source)!a} have the same sample id {sample_id!r}; "
                "rename or leave out one of them"
            )
    return paths, failures


@contextlib.contextmanager
def features_of(
    units: Sequence[Sequence[Clip]],
    config: CacheConfig,
    front_end: FrontEnd,
    *,
    num_workers: int,
    order: Callable[[int], Iterable[int]] = range,
    is_wanted: Callable[[list[str]], bool] = lambda _: True,
    batch_size: int = 0,
    stored: Mapping[str, frozenset[str] | AllBut] | None = None,
) -> Iterator[FeatureBatches]:
    """Decode units of clips; the worker processes end with the `with` block.

    With windows, each unit is a recording, and gives as many batches as it has.

    Args:
        units: Of (sample id, audio file or source).
        config: Sample rate, duration and decoder.
        front_end: Waveform → features.
        num_workers: Decoding processes; 0 decodes in this process.
        order: Number of units → the order to take them in.
        is_wanted: Asked with the sample ids of a unit right before it is given to a worker.
        batch_size: Windows of a batch; only with windows.
        stored: Recording → its windows that needn't be computed; only with windows.

    Raises:
        ExtractionError: A decoding process died.
        MissingDependencyError: torch is missing.
    """
    # torch is needed from here on, not for a run that has nothing to do.
    with needing("extraction", "audio"):
        from lmdbcache.extraction.decoding import FeatureBatches, worker_errors
        from lmdbcache.extraction.recordings import RecordingBatches
    make: Callable[..., FeatureBatches] = FeatureBatches
    if config.window is not None:
        make = partial(RecordingBatches, batch_size=batch_size, stored=stored or {})
    batches = make(
        units, config, front_end, num_workers=num_workers, order=order, is_wanted=is_wanted
    )
    try:
        with worker_errors():
            yield batches
    finally:
        batches.close()

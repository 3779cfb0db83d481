"""The features of some clips, for work that stores nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lmdbcache.audio import AudioSource, decoder_of
from lmdbcache.config import CacheConfig
from lmdbcache.embedders import FrontEnd
from lmdbcache.errors import MissingDependencyError

if TYPE_CHECKING:
    from lmdbcache.extraction.decoding import FeatureBatches

__all__ = ["features_of"]


@contextlib.contextmanager
def features_of(
    clips: Iterable[tuple[str, str | AudioSource]],
    config: CacheConfig,
    front_end: FrontEnd,
    *,
    batch_size: int,
    num_workers: int,
) -> Iterator[FeatureBatches]:
    """Decode clips as an extraction does; the worker processes end with the `with` block.

    Args:
        clips: (sample id, audio file or source).
        config: Sample rate and duration.
        front_end: Waveform → features.
        batch_size: Clips of a batch.
        num_workers: Decoding processes; 0 decodes in this process.

    Raises:
        ExtractionError: A decoding process died.
        MissingDependencyError: torch is missing.
    """
    try:
        from lmdbcache.extraction.decoding import feature_batches, worker_errors
        from lmdbcache.extraction.feature_batch import Clip
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f'decoding clips needs the package {error.name}: pip install "lmdbcache[audio]"'
        ) from error

    todo = [Clip(sample_id, path) for sample_id, path in clips]
    batches = feature_batches(
        [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)],
        front_end,
        num_workers=num_workers,
        sample_rate=config.sample_rate,
        duration=config.duration,
        decoder=decoder_of(config.front_end),
    )
    try:
        with worker_errors():
            yield batches
    finally:
        batches.close()

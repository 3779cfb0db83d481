"""The lists of clips that failed, of stores that are merged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lmdbcache.cache import EmbeddingCache, read_failures, update_failures
from lmdbcache.config import CacheConfig

__all__ = ["merge_failures"]


def merge_failures(cache: EmbeddingCache, config: CacheConfig, sources: Iterable[Path]) -> None:
    """Bring the sources' failed clips along, but for those that are stored now.

    Args:
        cache: Where the stores were merged.
        config: Of the store.
        sources: The stores that were merged into it.

    Raises:
        OSError, ReadOnlyCacheError: The list can't be written.
    """
    store = cache.path(config)
    failed = {
        failure.sample_id: failure
        for source in (store, *sources)
        for failure in read_failures(source)
    }
    if failed:
        missing = cache.coverage(config, failed).missing
        update_failures(store, failed, [failed[sample_id] for sample_id in missing])

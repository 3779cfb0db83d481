"""Whatever a store holds of a batch: hits in order, and which samples they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheNotFoundError, SampleNotFoundError
from lmdbcache.storage import EmbeddingReader

__all__ = ["StoredEmbeddings"]


class StoredEmbeddings:
    """Looks up whatever is stored; nothing stored yet is no error.

    New commits of any process are seen at the first miss after them. Picklable, fork-safe.

    Args:
        cache: Where to look.
        config: Identity of the store.
    """

    def __init__(self, cache: EmbeddingCache, config: CacheConfig) -> None:
        self.cache: Final = cache
        self.config: Final = config
        self._reader: EmbeddingReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def find(
        self, sample_ids: Sequence[str]
    ) -> tuple[npt.NDArray[Any] | None, npt.NDArray[np.bool_]]:
        """The stored ones of these samples.

        Args:
            sample_ids: Sample ids; repeats are fine. One that can't be stored is a miss.

        Returns:
            `(hits, *embedding_shape)` in the order asked for, owned, or None if there are none;
            and which samples these are, `(len(sample_ids),)`.
        """
        while (reader := self.reader()) is not None:
            try:
                return reader.get_batch(sample_ids), np.ones(len(sample_ids), np.bool_)
            except SampleNotFoundError:
                pass
            try:
                absent = set(reader.missing(sample_ids))
                is_hit = np.fromiter((i not in absent for i in sample_ids), bool, len(sample_ids))
                hits = [i for i in sample_ids if i not in absent]
                return reader.get_batch(hits) if hits else None, is_hit
            except SampleNotFoundError:
                continue  # cleared and filled again in between
            except CacheNotFoundError:
                self.close()
        return None, np.zeros(len(sample_ids), np.bool_)

    def reader(self) -> EmbeddingReader | None:
        """The reader, if anything is stored."""
        if self._reader is None and self.config in self.cache:
            self._reader = self.cache.reader(self.config)
        return self._reader

    def close(self) -> None:
        """Give back the snapshot; the next look-up opens it again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

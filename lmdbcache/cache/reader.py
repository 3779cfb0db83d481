"""The reader of a store as `EmbeddingCache` gives it: that of `storage`, with a search."""

from __future__ import annotations

from typing import overload

import numpy.typing as npt

from lmdbcache.cache.similarity import Nearest, nearest
from lmdbcache.storage import EmbeddingReader as StoredReader


class EmbeddingReader(StoredReader):  # noqa: D101 - the base's, with one method more
    __doc__ = StoredReader.__doc__

    @overload
    def nearest(self, query: str, k: int = 10, metric: str = "cosine") -> Nearest: ...
    @overload
    def nearest(
        self, query: npt.ArrayLike, k: int = 10, metric: str = "cosine"
    ) -> Nearest | list[Nearest]: ...
    def nearest(
        self, query: str | npt.ArrayLike, k: int = 10, metric: str = "cosine"
    ) -> Nearest | list[Nearest]:
        """Return the stored samples nearest to a query: see `lmdbcache.cache.nearest`.

        Args:
            query: One vector `(D,)`, several `(Q, D)`, or a stored sample's id.
            k: How many samples.
            metric: `"cosine"` similarity or `"l2"` distance.
        """
        return nearest([self], query, k, metric)

"""How often what was asked for was stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lmdbcache.cache import EmbeddingCache, statistics_of

__all__ = ["HitRate", "hit_rates_of", "recorded_hit_rates"]


@dataclass(frozen=True)
class HitRate:
    """Look-ups of one kind.

    Args:
        name: What was counted, such as a store's folder name or a run.
        hits: Look-ups that found an embedding.
        misses: Look-ups that didn't.
    """

    name: str
    hits: int
    misses: int

    @property
    def rate(self) -> float | None:
        """Share of hits, 0 to 1; None if nothing was looked up."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


def recorded_hit_rates(cache: EmbeddingCache) -> list[Mapping[str, Any]]:
    """What is recorded beside the stores of a cache: name, hits and misses of each."""
    figures = {folder.name: statistics_of(folder) for folder in cache.folders()}
    return [
        {"name": name, "hits": found.hits, "misses": found.misses}
        for name, found in figures.items()
        if found.hits or found.misses
    ]


def hit_rates_of(figures: Iterable[Mapping[str, Any]]) -> list[HitRate]:
    """Figures as the report shows them."""
    return [HitRate(str(f["name"]), int(f["hits"]), int(f["misses"])) for f in figures]

"""Hits and misses of a store: in all, and per epoch for a training loop's logger."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdbcache.errors import ReadOnlyCacheError
from lmdbcache.storage import counts_of, reset_counts, store_counts, tree_counts

__all__ = ["EpochStatistics", "ReadStatistics", "statistics_of", "reset_statistics"]


@dataclass(frozen=True)
class ReadStatistics:
    """How often samples were found.

    Args:
        by_class: Class → (hits, misses).
    """

    by_class: Mapping[str, tuple[int, int]]

    @property
    def hits(self) -> int:
        """Embeddings that were handed out."""
        return sum(hits for hits, _ in self.by_class.values())

    @property
    def misses(self) -> int:
        """Samples that were asked for and not there."""
        return sum(misses for _, misses in self.by_class.values())

    @property
    def hit_rate(self) -> float:
        """Share of hits, 0 to 1; 1.0 if nothing was asked for."""
        return _rate(self.hits, self.misses)

    def metrics(self, prefix: str = "cache") -> dict[str, float]:
        """For a logger: `cache/hits`, `/misses`, `/hit_rate` and `/hit_rate/<class>`."""
        metrics = {
            f"{prefix}/hits": self.hits,
            f"{prefix}/misses": self.misses,
            f"{prefix}/hit_rate": self.hit_rate,
        }
        for name, counts in self.by_class.items():
            metrics[f"{prefix}/hit_rate/{name}"] = _rate(*counts)
        return metrics

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hit_rate,
            "by_class": {name: list(counts) for name, counts in self.by_class.items()},
        }


def statistics_of(store: str | Path) -> ReadStatistics:
    """What all processes have read of a store, since it was made or its figures were reset."""
    counts = store_counts(Path(store).absolute())
    return _figures({name: (counts.hits[name], counts.misses[name]) for name in _names(counts)})


def reset_statistics(store: str | Path) -> None:
    """Begin again at zero. Processes that are reading go on counting from there.

    Raises:
        ReadOnlyCacheError: The store can't be written.
    """
    try:
        reset_counts(Path(store).absolute())
    except OSError as error:
        raise ReadOnlyCacheError(
            f"the figures of {store} can't be written ({error.strerror}). Check its permissions"
        ) from None


class EpochStatistics:
    """Hits and misses of this process and its workers, epoch by epoch.

    An epoch is what was counted between two calls of `end_epoch`, whatever the start method of
    the workers and whether they persist. Other processes that read the store aren't counted; each
    rank of a distributed run has figures of its own. Make it before the first epoch.

    Args:
        source: An `EmbeddingCache`, an `EmbeddingReader`, or an `EmbeddingDataset`.
        config: One store of a cache; None sums over all that are under its root.
        prefix: In front of the metrics' names.
    """

    def __init__(self, source: Any, config: Any = None, *, prefix: str = "cache") -> None:
        self._source = source
        self._config = config
        self.prefix = prefix
        self._before = self._sums()

    def end_epoch(self) -> dict[str, float]:
        """The metrics since the last call, or since this was made. See `ReadStatistics.metrics`."""
        return self.end_epoch_statistics().metrics(self.prefix)

    def end_epoch_statistics(self) -> ReadStatistics:
        """The same as `ReadStatistics`."""
        now, before = self._sums(), self._before
        self._before = now
        changes = {
            name: tuple(
                max(0, a - b) for a, b in zip(counts, before.get(name, (0, 0)), strict=True)
            )
            for name, counts in now.items()
        }
        return _figures({name: (pair[0], pair[1]) for name, pair in changes.items() if any(pair)})

    def _sums(self) -> dict[str, tuple[int, int]]:
        sums: dict[str, tuple[int, int]] = {}
        for store in self._stores():
            counts_of(store)  # while this process has a file, nobody adds up those of its workers
            counts = tree_counts(store)
            for name in _names(counts):
                hits, misses = sums.get(name, (0, 0))
                sums[name] = hits + counts.hits[name], misses + counts.misses[name]
        return sums

    def _stores(self) -> list[Path]:
        if self._config is not None:
            return [self._source.path(self._config)]
        if hasattr(self._source, "folders"):
            return list(self._source.folders())
        reader = getattr(self._source, "reader", self._source)
        return [Path(os.fspath(reader.path))]


def _figures(by_class: Mapping[str, tuple[int, int]]) -> ReadStatistics:
    return ReadStatistics(
        {name: by_class[name] for name in sorted(by_class) if any(by_class[name])}
    )


def _names(counts: Any) -> set[str]:
    return {*counts.hits, *counts.misses}


def _rate(hits: int, misses: int) -> float:
    return hits / (hits + misses) if hits + misses else 1.0

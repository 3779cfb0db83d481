"""Misses in the log: the first ones of each class with their reason, then how many there are."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Iterable
from typing import Final

from lmdbcache.storage.counting.hit_counts import StoreCounts, own_lineage
from lmdbcache.storage.forking import process_id

__all__ = ["note_misses"]

_logger: Final = logging.getLogger("lmdbcache")
_EXPLAINED_PER_CLASS: Final = 3
_EXPLAINED: Final = 30
_EXPLAINED_BY_WORKER: Final = 6
_NAMED_CLASSES: Final = 10


def note_misses(
    counts: StoreCounts, sample_ids: Iterable[str], explain: Callable[[str], str]
) -> None:
    """Count misses; log the first of each class, and later the sum each time it is ten times more.

    Args:
        counts: Where to count.
        sample_ids: What was asked for and isn't there.
        explain: Sample id → why; called for those that are logged.
    """
    most = _EXPLAINED if len(own_lineage()) == 1 else _EXPLAINED_BY_WORKER
    for sample_id in sample_ids:
        before = counts.miss(sample_id)
        counts.num_missed += 1
        if before < _EXPLAINED_PER_CLASS and counts.num_explained < most:
            counts.num_explained += 1
            _logger.warning("%s: miss: %s", _short(counts), explain(sample_id))
        elif counts.num_missed == counts.num_explained + 1:
            atexit.register(_log_sum_at_end, counts, process_id())
            _logger.warning("%s: more misses; they are only counted from now on", _short(counts))
        if counts.num_missed >= 10 * max(10, counts.num_missed_when_logged):
            _log_sum(counts)


def _log_sum(counts: StoreCounts) -> None:
    counts.num_missed_when_logged = counts.num_missed
    by_class = counts.table.counts().misses.most_common(_NAMED_CLASSES)
    named = ", ".join(f"{name}: {number:,}" for name, number in by_class)
    _logger.warning("%s: %s misses (%s)", _short(counts), f"{counts.num_missed:,}", named)


def _log_sum_at_end(counts: StoreCounts, process: int) -> None:
    if process == process_id() and counts.num_missed > counts.num_missed_when_logged:
        _log_sum(counts)


def _short(counts: StoreCounts) -> str:
    """The store's fingerprint: its name is a line of its own."""
    return counts.store.name.rpartition("-")[2]

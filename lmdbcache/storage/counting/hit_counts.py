"""What this process has read of each store, and what it looked for in vain, by class.

Counted is what a reader hands out (a hit for each embedding) and each sample that it was asked
for and doesn't have (a miss); not questions such as `in`, `missing` and coverage.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import CacheError
from lmdbcache.storage.counting.counter_files import (
    MAX_ANCESTORS,
    CounterTable,
    Counts,
    open_table,
    read_records,
    reset_records,
)
from lmdbcache.storage.filesystems import network_mount
from lmdbcache.storage.generations import current_generation
from lmdbcache.storage.layout import STATISTICS_NAME, class_of

__all__ = [
    "STATISTICS_VARIABLE",
    "PlaceCounter",
    "StoreCounts",
    "adopt_ancestors",
    "counts_of",
    "own_lineage",
    "reset_counts",
    "store_counts",
    "tree_counts",
]

STATISTICS_VARIABLE: Final = "LMDBCACHE_STATISTICS"

# numpy adds so few numbers without letting another thread in between.
_ADDED_AT_ONCE: Final = 256

_logger: Final = logging.getLogger(__name__)


class StoreCounts:
    """The counters of this process for one store.

    In a file that other processes sum up; in memory where the folder can't be written, and until
    there is a store.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.lock = threading.Lock()
        self.table = CounterTable.in_memory()
        self._is_in_file = self._is_refused = False
        # Of this object's own life, for the log.
        self.num_missed = self.num_explained = self.num_missed_when_logged = 0

    def settle(self) -> None:
        """Count in a file from now on, if there may be one."""
        if self._is_settled():
            return
        with self.lock, contextlib.suppress(CacheError):
            # Another thread may have been faster, whose file would be replaced.
            if self._is_settled() or current_generation(self.store) is None:
                return
            try:
                is_refused = network_mount(self.store) is not None
                if not is_refused:
                    self._begin_file()
            except (OSError, ValueError):
                is_refused = True
            # Not before: other threads go on without waiting, and count where it is lost.
            self._is_refused = is_refused
            if is_refused:
                _logger.debug("%s: hits and misses are counted in memory only", self.store)

    def _begin_file(self) -> None:
        counted = Counts() if self._is_in_file else self.table.counts()
        table = open_table(self.store / STATISTICS_NAME, _process.token, _process.ancestors)
        table.take(counted)
        _process.is_known = True
        self.table, self._is_in_file = table, True

    def _is_settled(self) -> bool:
        return self._is_refused or (self._is_in_file and not self.table.is_removed)

    def counts_in_memory(self) -> Counts:
        """What no file has."""
        return Counts() if self._is_in_file else self.table.counts()

    def hit(self, sample_id: str) -> None:
        """One embedding was handed out."""
        table = self.table
        # One store in between the switches of threads: no lock, which would cost twice as much.
        table.hit_cells[table.codes_by_suffix[sample_id.rpartition(":")[2]]] += 1

    def hits(self, sample_ids: Sequence[str]) -> None:
        """Several were."""
        for sample_id in sample_ids:
            self.hit(sample_id)

    def miss(self, sample_id: str) -> int:
        """A sample was asked for that isn't there; how many of its class were before."""
        with self.lock:
            code = self.table.code_of(class_of(sample_id))
            before = int(self.table.misses[code])
            self.table.misses[code] = before + 1
        return before


class PlaceCounter:
    """Counts batches by the places of their values, whose classes are learnt as they are read.

    A place is a position in a list of samples, or where a value lies in the file: values of equal
    length lie at least that length apart, so the upper bits are a value's own.

    Args:
        counts: Where to count.
        num_places: Above the last place.
        length: Of each value, in bytes; 1 for positions.
    """

    def __init__(self, counts: StoreCounts, num_places: int, length: int = 1) -> None:
        self.counts = counts
        self._shift = length.bit_length() - 1
        self._codes = np.zeros((num_places - 1 >> self._shift) + 1, np.uint16)
        self._begin(counts.table)

    def _begin(self, table: CounterTable) -> None:
        self._table = table
        self._codes[:] = 0
        self._hits = table.hits[:1]

    def count(
        self,
        places: npt.NDArray[np.int64],
        sample_ids: Sequence[str],
        positions: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> None:
        """The values at these places were handed out.

        Args:
            places: (n,)
            sample_ids: Their sample ids; with `positions`, a list that these point into.
            positions: (n,)
        """
        if self.counts.table is not self._table:
            self._begin(self.counts.table)
        slots = places >> self._shift if self._shift else places
        hits = self._hits
        found = np.bincount(self._codes[slots], None, len(hits))
        if found[0] or len(found) != len(hits):
            hits = self._learn(slots, sample_ids, positions)
            found = np.bincount(self._codes[slots], None, len(hits))
        if len(hits) < _ADDED_AT_ONCE:
            np.add(hits, found, hits)
        else:
            with self.counts.lock:
                np.add(hits, found, hits)

    def _learn(
        self,
        slots: npt.NDArray[np.int64],
        sample_ids: Sequence[str],
        positions: Sequence[int] | npt.NDArray[np.int64] | None,
    ) -> npt.NDArray[np.int64]:
        """Note the classes of these; the counters up to the highest code."""
        table = self._table
        codes = table.codes_by_suffix
        with self.counts.lock:
            for index in np.flatnonzero(self._codes[slots] == 0).tolist():
                place = index if positions is None else positions[index]
                code = codes[sample_ids[place].rpartition(":")[2]]
                if code >= len(self._hits):
                    self._hits = table.hits[: code + 1]
                self._codes[slots[index]] = code
            return self._hits


class _Process:
    """This process among those that it descends from, and what it counts."""

    def __init__(
        self, ancestors: tuple[str, ...] = (), *, has_known_ancestor: bool = False
    ) -> None:
        self.token = os.urandom(8).hex()
        self.ancestors = ancestors[-MAX_ANCESTORS:]
        self.has_known_ancestor = has_known_ancestor
        self.is_known = False  # its token stands in a file
        self.stores: dict[Path, StoreCounts] = {}
        self.lock = threading.Lock()


_process = _Process()


def own_lineage() -> tuple[str, ...]:
    """Tokens of this process and of those it descends from: what a reader takes along."""
    return (*_process.ancestors, _process.token)


def adopt_ancestors(lineage: Sequence[str]) -> None:
    """A reader has come from another process: unless known otherwise, this one works for that."""
    # Ancestors that have counted nothing, such as a forkserver, are nobody to work for.
    is_free = not (_process.is_known or _process.has_known_ancestor)
    if is_free and _process.token not in lineage:
        _process.ancestors = tuple(lineage)[-MAX_ANCESTORS:]
        _process.has_known_ancestor = True


def counts_of(store: Path) -> StoreCounts | None:
    """This process's counters of a store; None if counting is switched off."""
    if os.environ.get(STATISTICS_VARIABLE) == "0":
        return None
    counts = _counters(store)
    counts.settle()
    return counts


def store_counts(store: Path) -> Counts:
    """What all processes have counted of a store, since it was made or reset."""
    own = _counters(store)
    total, records = read_records(own.store / STATISTICS_NAME)
    for record in records:
        total.add(record.counts)
    total.add(own.counts_in_memory())
    return total


def tree_counts(store: Path) -> Counts:
    """What this process and those that work for it, ended ones included, have counted."""
    own = _counters(store)
    _, records = read_records(own.store / STATISTICS_NAME)
    total = own.counts_in_memory()
    for record in records:
        if _process.token in (record.owner, *record.ancestors):
            total.add(record.counts)
    return total


def reset_counts(store: Path) -> None:
    """Begin again at zero; whoever reads goes on counting.

    Raises:
        OSError: The store can't be written.
    """
    reset_records(_counters(store).store / STATISTICS_NAME)


def _counters(store: Path) -> StoreCounts:
    counts = _process.stores.get(store)
    if counts is None:
        path = Path(os.path.realpath(store))  # one folder may have several names
        with _process.lock:
            counts = _process.stores.setdefault(path, StoreCounts(path))
            _process.stores[store] = counts
    return counts


def _after_fork_in_child() -> None:
    global _process  # noqa: PLW0603 - module state of one process
    is_known = _process.is_known or _process.has_known_ancestor
    _process = _Process(own_lineage(), has_known_ancestor=is_known)


os.register_at_fork(after_in_child=_after_fork_in_child)

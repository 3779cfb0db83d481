"""Several embeddings of one sample, none of them stored: which one is taken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from lmdbcache.cache import difference_of
from lmdbcache.exchange.merging.report import Conflict, OnConflict
from lmdbcache.exchange.merging.target import Incoming

__all__ = ["Settled", "settle"]


@dataclass
class Settled:
    """How a dispute ended.

    Args:
        taken: The embedding to store, if there is one.
        close: Largest differences of those within the tolerance of the one before.
        conflicts: Those further apart.
    """

    taken: Incoming | None = None
    close: list[float] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)


def settle(candidates: Iterable[Incoming], on_conflict: OnConflict, tolerance: float) -> Settled:
    """Compare the embeddings that several sources have of a sample.

    The first counts as ours. With `"error"` none is taken if two are further apart than the
    tolerance: which one is right isn't for their order to decide.

    Args:
        candidates: In the order of the sources, each given once; one is held at a time.
        on_conflict: See `Merger`.
        tolerance: See `Merger`.
    """
    found = Settled()
    for candidate in candidates:
        ours = found.taken
        if ours is None:
            found.taken = candidate
            continue
        if ours.value.shape != candidate.value.shape:
            max_abs, cosine = float("inf"), 1.0
        else:
            max_abs, cosine, _ = difference_of(ours.value, candidate.value)
        if max_abs <= tolerance:
            found.close.append(max_abs)
            continue
        kept: Literal["ours", "theirs", "none"] = "none" if on_conflict == "error" else on_conflict
        names = ours.origin, candidate.origin
        found.conflicts.append(Conflict(candidate.sample_id, *names, max_abs, cosine, kept))
        if on_conflict == "theirs":
            found.taken = candidate
    if found.conflicts and on_conflict == "error":
        found.taken = None
    return found

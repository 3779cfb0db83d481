"""Equal, nearly equal and far-off embeddings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from lmdbcache.report.separability import Separability, separability_of
from lmdbcache.report.vectors import Vectors
from lmdbcache.storage import Progress, class_of, recording_of

MAX_LISTED: Final = 100
_NEAR_DEVIATIONS: Final = 4.0
_LEAST_DEVIATION: Final = 0.25  # of log10: near-duplicates are at least ten times nearer than usual
_LEAST_NUM: Final = 20  # fewer have no usual distance
_NUM_NEIGHBOURS: Final = 10
_NUM_OF_CLASS: Final = 5  # that give the distance of a sample from its class
_OUTLIER_DEVIATIONS: Final = 5.0
_ROBUST: Final = 1.4826  # times the median deviation: a normal distribution's standard deviation
_ROUNDING: Final = 1e-7  # of a cosine distance of float32
_TINY_NORM: Final = 1e-6  # of the median norm
_QUERIES: Final = 512
_NUM_DIRECTIONS: Final = 64  # searched in; a tenth of the time of 768
_NUM_FITTED: Final = 5_000


@dataclass(frozen=True)
class Alike:
    """Samples whose embeddings have equal bits, or two that point nearly the same way.

    Args:
        sample_ids: The first few.
        count: How many.
        cosine: Cosine similarity; 1 for equal bits.
        crosses_classes: Whether they are of more than one class.
        splits: The splits that they are in, if there are several: leakage.
    """

    sample_ids: list[str]
    count: int
    cosine: float
    crosses_classes: bool
    splits: list[str]

    @property
    def order(self) -> tuple[bool, bool, int, float, list[str]]:
        """What to sort by: across splits first, then across classes, then the most alike."""
        sizes = -self.count, -self.cosine
        return (not self.splits, not self.crosses_classes, *sizes, self.sample_ids)


class Outlier(NamedTuple):
    """A sample far from its own class.

    Args:
        sample_id: The sample.
        distance: Mean cosine distance to the 5 nearest of its class.
        median_distance: The class's median of that.
        deviations: By how many robust standard deviations it is above.
        nearest: The nearest sample of all.
    """

    sample_id: str
    distance: float
    median_distance: float
    deviations: float
    nearest: str


class Neighbours(NamedTuple):
    """The lists of findings, the strongest first, and their full lengths.

    Args:
        near_cosine: The least similarity of a near-duplicate; None where nothing is usual.
        num_equal_leaks: Groups of equals that lie in more than one split.
        num_near_leaks: The same of near-duplicates.
        separability: None of fewer than two classes with five files.
        zero_norms: Samples whose norm is less than a millionth of the median.
    """

    num_equal_groups: int
    equal: list[Alike]
    near_cosine: float | None
    num_near_pairs: int
    near: list[Alike]
    num_equal_leaks: int
    num_near_leaks: int
    separability: Separability | None
    num_outliers: int
    outliers: list[Outlier]
    num_zero_norms: int
    zero_norms: list[str]


def find_neighbours(
    vectors: Vectors,
    split_of: Mapping[str, str],
    progress: Progress | None = None,
) -> Neighbours:
    """Compare the vectors with one another.

    Args:
        vectors: What was read, one or more.
        split_of: Sample id → split, of the samples whose split is known.
        progress: Called with the samples compared and those to compare.
    """
    equal = _equal_groups(vectors, split_of)
    tiny = vectors.norms <= _TINY_NORM * np.median(vectors.norms)
    near: list[Alike] = []
    outliers: list[Outlier] = []
    near_cosine = separability = None
    if vectors.pooled is not None:
        # One of each group of equals: a hundred copies would hide every other neighbour.
        first = {digest: row for row, digest in reversed(list(enumerate(vectors.digests)))}
        rows = np.array([row for row in sorted(first.values()) if not tiny[row]], np.int64)
        if len(rows) > 1:
            search = _Search(vectors, rows, progress)
            near_cosine = search.near_cosine()
            near = search.near_pairs(near_cosine, split_of)
            outliers = search.outliers()
            separability = separability_of(search.sample_ids, search.classes, search.reduced)
    zero = [vectors.sample_ids[row] for row in np.flatnonzero(tiny)]
    return Neighbours(
        num_equal_groups=len(equal),
        equal=equal[:MAX_LISTED],
        near_cosine=near_cosine,
        num_near_pairs=len(near),
        near=near[:MAX_LISTED],
        num_equal_leaks=sum(1 for group in equal if group.splits),
        num_near_leaks=sum(1 for pair in near if pair.splits),
        separability=separability,
        num_outliers=len(outliers),
        outliers=outliers[:MAX_LISTED],
        num_zero_norms=len(zero),
        zero_norms=zero[:MAX_LISTED],
    )


def _equal_groups(vectors: Vectors, split_of: Mapping[str, str]) -> list[Alike]:
    rows_of: defaultdict[int, list[int]] = defaultdict(list)
    for row, digest in enumerate(vectors.digests):
        rows_of[digest].append(row)
    groups = []
    for rows in rows_of.values():
        if len(rows) < 2:
            continue
        groups.append(_alike([vectors.sample_ids[row] for row in rows], 1.0, split_of))
    return sorted(groups, key=lambda group: group.order)


def _alike(sample_ids: list[str], cosine: float, split_of: Mapping[str, str]) -> Alike:
    splits = sorted({split_of[sample_id] for sample_id in sample_ids if sample_id in split_of})
    return Alike(
        sample_ids=sorted(sample_ids)[:10],
        count=len(sample_ids),
        cosine=cosine,
        crosses_classes=len(set(map(class_of, sample_ids))) > 1,
        splits=splits if len(splits) > 1 else [],
    )


class _Search:
    """Nearest neighbours among some rows, by the angle between vectors."""

    def __init__(
        self,
        vectors: Vectors,
        rows: npt.NDArray[np.int64],
        progress: Progress | None,
    ) -> None:
        if vectors.pooled is None:
            raise ValueError("vectors of different lengths have no angles")
        self.sample_ids = [vectors.sample_ids[row] for row in rows]
        self.classes = np.array([vectors.classes[row] for row in rows], object)
        norms = vectors.norms[rows, None]
        self.units = (vectors.pooled[rows] / norms).astype(np.float32)
        self.reduced = _reduced(self.units)
        self.nearest = _nearest(self.units, self.reduced, _NUM_NEIGHBOURS, progress)

    def cosine(self, first: Any, second: Any) -> npt.NDArray[np.float64]:
        """Return the cosine similarity of rows exactly: a search rounds it."""
        left, right = self.units[first].astype(np.float64), self.units[second].astype(np.float64)
        cosines: npt.NDArray[np.float64] = np.einsum("...i,...i->...", left, right)
        return cosines.clip(-1.0, 1.0)

    def cosines(self, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the same of `(n, 2)` rows, a few at a time."""
        starts = range(0, len(pairs), _QUERIES)
        return np.concatenate([self.cosine(*pairs[at : at + _QUERIES].T) for at in starts])

    def near_cosine(self) -> float | None:
        """Return the similarity that stands out of those of all samples to their nearest.

        The logarithm of a sample's distance to its nearest is four robust standard deviations below
        the median, and the distance a tenth of the median at most.
        """
        if len(self.nearest) < _LEAST_NUM:
            return None
        pairs = np.stack([np.arange(len(self.nearest)), self.nearest[:, 0]], axis=1)
        distances = np.log10(np.maximum(1 - self.cosines(pairs), _ROUNDING))
        median = float(np.median(distances))
        spread = _ROBUST * float(np.median(np.abs(distances - median)))
        return float(1 - 10 ** (median - _NEAR_DEVIATIONS * max(spread, _LEAST_DEVIATION)))

    def near_pairs(self, least: float | None, split_of: Mapping[str, str]) -> list[Alike]:
        """Return the pairs of this similarity or more: across splits first, then across classes.

        Windows of one recording aren't a pair.
        """
        if least is None:
            return []
        firsts = np.repeat(np.arange(len(self.nearest)), self.nearest.shape[1])
        pairs = np.sort(np.stack([firsts, self.nearest.reshape(-1)], axis=1), axis=1)
        pairs = np.unique(pairs, axis=0)
        cosines, found = self.cosines(pairs), []
        for index in np.flatnonzero(cosines >= least):
            sample_ids = [self.sample_ids[row] for row in pairs[index]]
            if len(set(map(recording_of, sample_ids))) == 2:
                found.append(_alike(sample_ids, float(cosines[index]), split_of))
        return sorted(found, key=lambda pair: pair.order)

    def outliers(self) -> list[Outlier]:
        """Return the samples farthest from their class, the farthest first."""
        found = []
        for name in sorted(set(self.classes)):
            members = np.flatnonzero(self.classes == name)
            if len(members) >= 2 * _NUM_OF_CLASS:  # fewer give no useful median
                found += self._outliers_of(members)
        return sorted(found, key=lambda outlier: (-outlier.deviations, outlier.sample_id))

    def _outliers_of(self, members: npt.NDArray[np.int64]) -> list[Outlier]:
        nearest = members[_nearest(self.units[members], self.reduced[members], _NUM_OF_CLASS)]
        distances = np.concatenate(
            [
                1 - self.cosine(members[at : at + _QUERIES, None], nearest[at : at + _QUERIES])
                for at in range(0, len(members), _QUERIES)
            ]
        ).mean(axis=1)
        median = float(np.median(distances))
        spread = _ROBUST * float(np.median(np.abs(distances - median)))
        deviations = (distances - median) / max(spread, 0.01 * median, 1e-6)
        return [
            Outlier(
                sample_id=self.sample_ids[members[index]],
                distance=float(distances[index]),
                median_distance=median,
                deviations=float(deviations[index]),
                nearest=self.sample_ids[self.nearest[members[index], 0]],
            )
            for index in np.flatnonzero(deviations >= _OUTLIER_DEVIATIONS)
        ]


def _reduced(units: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the rows in the directions of most variance; no two are farther apart than before."""
    from sklearn.decomposition import TruncatedSVD

    if units.shape[1] <= _NUM_DIRECTIONS or len(units) <= _NUM_DIRECTIONS:
        return units
    directions = TruncatedSVD(_NUM_DIRECTIONS, random_state=0).fit(units[:_NUM_FITTED])
    reduced: npt.NDArray[np.float32] = directions.transform(units).astype(np.float32)
    return reduced


def _nearest(
    units: npt.NDArray[np.float32],
    reduced: npt.NDArray[np.float32],
    count: int,
    progress: Progress | None = None,
) -> npt.NDArray[np.int64]:
    """Return `(n, count)`: rows of the nearest others, nearest first; fewer if there are fewer.

    Twice as many are searched for among the reduced rows, and ranked by the whole ones.
    """
    from sklearn.neighbors import NearestNeighbors

    # The order of Euclidean distances between unit vectors is that of their angles.
    num_candidates = min(2 * count, len(units) - 1)
    search = NearestNeighbors(n_neighbors=num_candidates + 1, algorithm="brute").fit(reduced)
    found = []
    for start in range(0, len(units), _QUERIES):
        rows = search.kneighbors(reduced[start : start + _QUERIES], return_distance=False)
        own = np.arange(start, start + len(rows))[:, None]
        # The row itself is among its nearest, but not always first; without it, the last goes.
        keep = rows != own
        keep[keep.all(axis=1), -1] = False
        others = rows[keep].reshape(len(rows), num_candidates)
        cosines = np.einsum("id,ikd->ik", units[start : start + _QUERIES], units[others])
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        found.append(np.take_along_axis(others, best, axis=1))
        if progress is not None:
            progress(min(start + _QUERIES, len(units)), len(units))
    return np.concatenate(found)

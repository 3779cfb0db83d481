"""Everything that the report says of one store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from lmdbcache.cache import ClipFailure, EmbeddingCache, StoreInfo, read_failures
from lmdbcache.errors import CacheError
from lmdbcache.report.dataset_coverage import DatasetSplits, SplitCoverage, coverage_by_split
from lmdbcache.report.distributions import Distribution, distribution_of
from lmdbcache.report.neighbours import Neighbours, find_neighbours
from lmdbcache.report.projection import EmbeddingMap, map_of
from lmdbcache.report.sampling import class_of, in_stratified_order
from lmdbcache.report.vectors import Vectors, read_vectors
from lmdbcache.storage import plan_compaction

__all__ = ["ClassSize", "StoreFigures", "figures_of_store"]

_MAX_FAILURES: Final = 200
_MAX_UNREADABLE: Final = 100
_TRIM: Final = 0.1  # percent at either end of the histogram of values


@dataclass(frozen=True)
class ClassSize:
    """One class of a store.

    Args:
        name: The class.
        num_embeddings: Stored embeddings.
        num_bytes: Size of their values, without keys and unused space.
        num_failed: Its clips that failed when last tried.
    """

    name: str
    num_embeddings: int
    num_bytes: int
    num_failed: int


@dataclass(frozen=True)
class StoreFigures:
    """What the report says of one store.

    Args:
        info: The store.
        classes: Its classes, the largest first.
        bytes_are_estimated: Whether `num_bytes` of the classes are from the mean of a sample.
        reclaimable_bytes: What a compaction would give back; None if that isn't known.
        num_failures: Clips that failed when last tried.
        failures: The first 200 of them.
        coverage: Of each dataset that fits.
        num_looked_at: Embeddings whose values were read.
        is_mean: Whether an embedding stands here for the mean over its tokens.
        norms: Of the vectors.
        values: Of the stored numbers; 0.1 % at either end are in the outermost bins.
        map: In two dimensions, or why not.
        neighbours: Equal, nearly equal and far-off embeddings.
        num_unreadable: Samples that couldn't be read.
        unreadable: The first 100 of them with the reason.
        not_finite: Samples that hold NaN or Inf.
        damage: Why the store couldn't be read, or could only in part; None if nothing was found.
    """

    info: StoreInfo
    classes: list[ClassSize] = field(default_factory=list)
    bytes_are_estimated: bool = False
    reclaimable_bytes: int | None = None
    num_failures: int = 0
    failures: list[ClipFailure] = field(default_factory=list)
    coverage: list[SplitCoverage] = field(default_factory=list)
    num_looked_at: int = 0
    is_mean: bool = False
    norms: Distribution | None = None
    values: Distribution | None = None
    map: EmbeddingMap | str = "Nothing to show."
    neighbours: Neighbours | None = None
    num_unreadable: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    damage: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **asdict(replace(self, info=StoreInfo(self.info.path, None))),
            "info": self.info.to_dict(),
        }


def figures_of_store(
    cache: EmbeddingCache,
    info: StoreInfo,
    datasets: Sequence[DatasetSplits],
    *,
    max_samples: int,
    progress: Callable[[int, int], None] | None = None,
) -> StoreFigures:
    """Look at one store; damage is a finding, not an error.

    Args:
        cache: The root that it is under.
        info: The store.
        datasets: To compare it with.
        max_samples: Read the values of so many embeddings at most.
        progress: Called with the steps done and those to do: one for each embedding that is read,
            one for each that is compared.
    """
    failures = read_failures(info.path)
    figures = StoreFigures(
        info, damage=info.damage, num_failures=len(failures), failures=failures[:_MAX_FAILURES]
    )
    if info.config is None:
        return figures
    try:
        return _look(cache, figures, datasets, failures, max_samples, progress)
    except (CacheError, OSError) as error:
        return replace(figures, damage=str(error))


def _look(
    cache: EmbeddingCache,
    figures: StoreFigures,
    datasets: Sequence[DatasetSplits],
    failures: Sequence[ClipFailure],
    max_samples: int,
    progress: Callable[[int, int], None] | None,
) -> StoreFigures:
    config = figures.info.config
    if config is None:
        return figures
    fitting = [dataset for dataset in datasets if dataset.fits(config.namespace)]
    with cache.reader(config, verify="first_read", track_usage=False) as reader:
        ordered = in_stratified_order(reader)
        coverage = [coverage_by_split(dataset, reader) for dataset in fitting]
        steps = _Steps(progress, min(max_samples, len(ordered)))
        vectors = read_vectors(reader, ordered[:max_samples], steps.reading)
    split_of = {
        sample_id: split for dataset in fitting for sample_id, split in dataset.split_of().items()
    }
    shape = figures.info.embedding_shape or ()
    num_bad = len(vectors.unreadable) + len(vectors.not_finite)
    return replace(
        figures,
        classes=_classes(ordered, failures, vectors.mean_bytes),
        bytes_are_estimated=None in shape,
        reclaimable_bytes=_reclaimable(figures.info),
        coverage=coverage,
        num_looked_at=len(vectors.sample_ids),
        is_mean=vectors.is_mean,
        norms=distribution_of(vectors.norms),
        values=distribution_of(vectors.values, trim=_TRIM),
        map=map_of(vectors),
        neighbours=_neighbours(vectors, split_of, steps.comparing),
        num_unreadable=len(vectors.unreadable),
        unreadable=dict(list(vectors.unreadable.items())[:_MAX_UNREADABLE]),
        not_finite=vectors.not_finite[:_MAX_UNREADABLE],
        damage=f"{num_bad} of the embeddings that were looked at are damaged" if num_bad else None,
    )


def _neighbours(
    vectors: Vectors, split_of: dict[str, str], progress: Callable[[int, int], None]
) -> Neighbours | None:
    return find_neighbours(vectors, split_of, progress) if vectors.sample_ids else None


def _classes(
    sample_ids: Sequence[str], failures: Sequence[ClipFailure], mean_bytes: float
) -> list[ClassSize]:
    stored = Counter(map(class_of, sample_ids))
    failed = Counter(class_of(failure.sample_id) for failure in failures)
    return [
        ClassSize(name, stored[name], round(stored[name] * mean_bytes), failed[name])
        for name in sorted({*stored, *failed}, key=lambda name: (-stored[name], name))
    ]


def _reclaimable(info: StoreInfo) -> int | None:
    try:
        plan = plan_compaction(info.path)
    except (CacheError, OSError):
        return info.free_bytes or None
    return max(0, plan.bytes_before - plan.bytes_after)


class _Steps:
    """Two phases on one bar."""

    def __init__(self, progress: Callable[[int, int], None] | None, num_samples: int) -> None:
        self._progress = progress
        self._in_all = 2 * num_samples

    def reading(self, done: int, total: int) -> None:
        self._tell(done / total)

    def comparing(self, done: int, total: int) -> None:
        self._tell(1 + done / total)

    def _tell(self, phases: float) -> None:
        if self._progress is not None:
            self._progress(round(phases / 2 * self._in_all), self._in_all)

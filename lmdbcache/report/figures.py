"""The facts that a report shows: of a root, and of each of its stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

import numpy as np

from lmdbcache.cache import (
    ClipFailure,
    EmbeddingCache,
    StoreInfo,
    coverage_of,
    info_or_damage,
    read_failures,
    recorded_sources,
)
from lmdbcache.errors import CacheError, ConfigError, MissingDependencyError
from lmdbcache.machine import install_line
from lmdbcache.report.neighbours import Neighbours, find_neighbours
from lmdbcache.report.separability import Separability, layers_apart
from lmdbcache.report.vectors import (
    Distribution,
    EmbeddingMap,
    distribution_of,
    in_stratified_order,
    map_of,
    read_vectors,
)
from lmdbcache.storage import (
    EmbeddingReader,
    Progress,
    ReadStatistics,
    Report,
    class_of,
    plan_compaction,
    recording_of,
)

DEFAULT_MAX_SAMPLES: Final = 30_000
_MAX_FAILURES: Final = 200
_MAX_UNREADABLE: Final = 100
_TRIM: Final = 0.1  # percent at either end of the histogram of values


class DatasetSplits(NamedTuple):
    """The samples of a dataset by split, to compare stores with.

    Args:
        name: How the report calls it, such as its folder.
        namespace: Its name in a config; "" fits every store.
        splits: Split → sample ids.
    """

    name: str
    namespace: str
    splits: Mapping[str, Sequence[str]]


class SplitCoverage(NamedTuple):
    """(stored, asked) of a dataset.

    Args:
        dataset: Its name.
        in_all: Split → (stored, asked).
        by_class: Class → split → (stored, asked); the least complete class first.
    """

    dataset: str
    in_all: dict[str, tuple[int, int]]
    by_class: dict[str, dict[str, tuple[int, int]]]


class Recordings(NamedTuple):
    """The recordings of a store of windows.

    Args:
        total: How many there are.
        fewest: Windows of the shortest.
        median: Windows of the median one.
        most: Windows of the longest.
    """

    total: int
    fewest: int
    median: int
    most: int


class ClassSize(NamedTuple):
    """One class of a store.

    Args:
        name: The class.
        num_embeddings: Stored embeddings.
        num_recordings: Their recordings; without windows as many.
        num_bytes: Size of their values, without keys and unused space.
        num_failed: Its clips that failed when last tried.
    """

    name: str
    num_embeddings: int
    num_recordings: int
    num_bytes: int
    num_failed: int


@dataclass(frozen=True)
class StoreFigures:
    """The facts about one store.

    Args:
        info: The store.
        classes: Its classes, the largest first.
        bytes_are_estimated: Whether `num_bytes` of the classes are from the mean of a sample.
        reclaimable_bytes: What a compaction would give back; None if that isn't known.
        num_failures: Clips that failed when last tried.
        failures: The first 200 of them.
        coverage: Of each dataset that fits.
        num_looked_at: Embeddings whose values were read.
        is_mean: Whether each vector is the mean over an embedding's tokens.
        norms: Of the vectors.
        values: Of the stored numbers; 0.1 % at either end are in the outermost bins.
        map: In two dimensions, or why not.
        paths: Sample id → audio file of the map's points, as far as they are recorded.
        layers: Of a store of all layers, how well neighbors name the class by each one alone.
        recordings: Of a store of windows.
        neighbours: Equal, nearly equal and far-off embeddings; how well neighbors name the class.
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
    paths: Mapping[str, str] = field(default_factory=dict)
    layers: list[Separability] = field(default_factory=list)
    recordings: Recordings | None = None
    neighbours: Neighbours | None = None
    num_unreadable: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    damage: str | None = None

    @property
    def num_leaks(self) -> int:
        """Groups of equal or nearly equal embeddings in more than one split of a dataset."""
        found = self.neighbours
        return found.num_equal_leaks + found.num_near_leaks if found else 0


@dataclass(frozen=True)
class CacheReport(Report):
    """The facts about the stores under a root.

    Args:
        root: The cache directory.
        creation_time: ISO 8601, UTC.
        version: Of lmdbcache.
        stores: One by one.
        hit_rates: Name → hits and misses; empty if none were recorded.
    """

    derived: ClassVar = ("is_sound", "num_leaks")

    root: Path
    creation_time: str
    version: str
    stores: list[StoreFigures]
    hit_rates: Mapping[str, ReadStatistics]

    @property
    def is_sound(self) -> bool:
        """Whether no damage was found in what was looked at."""
        return not any(store.damage for store in self.stores)

    @property
    def num_leaks(self) -> int:
        """Of all stores: see `StoreFigures.num_leaks`."""
        return sum(store.num_leaks for store in self.stores)

    @property
    def exit_code(self) -> int:
        """1 if damage was found, or a leak across splits."""
        return 0 if self.is_sound and not self.num_leaks else 1


def collect_report(
    cache: EmbeddingCache,
    stores: Sequence[str | Path] | None = None,
    *,
    datasets: Iterable[DatasetSplits] = (),
    hit_rates: Mapping[str, ReadStatistics] | None = None,
    max_samples: int = DEFAULT_MAX_SAMPLES,
    progress: Progress | None = None,
) -> CacheReport:
    """Look at stores; damage is a finding, not an error.

    Args:
        cache: The root.
        stores: Their folders; None takes all under the root.
        datasets: To show how much of them is stored.
        hit_rates: Name → hits and misses, such as those of a run; None takes what is recorded
            of each store.
        max_samples: Read the values of so many embeddings of a store at most.
        progress: Called with the embeddings done and those to do; reading one is half of it,
            comparing it the other half.

    Raises:
        ConfigError: `max_samples` isn't 1 or more.
        MissingDependencyError: scikit-learn, plotly or jinja2 isn't installed.
    """
    _check_dependencies()
    if max_samples < 1:
        raise ConfigError(f"max_samples: {max_samples}; it must be 1 or more")
    folders = cache.folders() if stores is None else [Path(store) for store in stores]
    infos = [info_or_damage(folder) for folder in folders]
    chosen, figures, done = list(datasets), [], 0
    steps = [min(max_samples, info.num_embeddings) for info in infos]
    for info, num_steps in zip(infos, steps, strict=True):
        found = _Steps(progress, done, num_steps, sum(steps))
        figures.append(_figures_of(cache, info, chosen, max_samples, found))
        done += num_steps
        if progress is not None:
            progress(done, sum(steps))
    if hit_rates is None:
        recorded = {info.path.name: cache.statistics(info.config) for info in infos if info.config}
        hit_rates = {name: found for name, found in recorded.items() if found.by_class}
    return CacheReport(
        root=cache.root,
        creation_time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=version("lmdbcache"),
        stores=figures,
        hit_rates=hit_rates,
    )


def _check_dependencies() -> None:
    try:
        for name in ("jinja2", "plotly", "sklearn"):
            import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"a report needs the package {error.name}: {install_line('report')}"
        ) from None


class _Steps(NamedTuple):
    """The steps of one store among those of all: the first half reads, the second compares."""

    progress: Progress | None
    before: int
    num_steps: int
    in_all: int

    def read(self, done: int, total: int) -> None:
        self._note(done / total)

    def compared(self, done: int, total: int) -> None:
        self._note(1 + done / total)

    def _note(self, halves: float) -> None:
        if self.progress is not None:
            self.progress(self.before + round(self.num_steps * halves / 2), self.in_all)


def _figures_of(
    cache: EmbeddingCache,
    info: StoreInfo,
    datasets: Sequence[DatasetSplits],
    max_samples: int,
    progress: _Steps,
) -> StoreFigures:
    failures = read_failures(info.path)
    figures = StoreFigures(
        info, damage=info.damage, num_failures=len(failures), failures=failures[:_MAX_FAILURES]
    )
    if info.config is None:
        return figures
    fitting = [one for one in datasets if _fits(one.namespace, info.config.namespace)]
    split_of = {
        sample_id: split
        for one in fitting
        for split, sample_ids in one.splits.items()
        for sample_id in sample_ids
    }
    try:
        with cache.reader(info.config, verify="first_read", track_usage=False) as reader:
            ordered = in_stratified_order(reader)
            coverage = [_coverage_of(one, reader) for one in fitting]
            vectors = read_vectors(reader, ordered[:max_samples], progress.read)
        neighbours = (
            find_neighbours(vectors, split_of, progress.compared) if vectors.sample_ids else None
        )
    except (CacheError, OSError) as error:
        return replace(figures, damage=str(error))
    windows_of = Counter(map(recording_of, ordered)) if info.config.window else None
    layers, classes = vectors.layers, np.array(vectors.classes, object)
    num_bad = len(vectors.unreadable) + len(vectors.not_finite)
    drawn = map_of(vectors)
    return replace(
        figures,
        classes=_classes(ordered, windows_of or ordered, failures, vectors.mean_bytes),
        layers=[] if layers is None else layers_apart(vectors.sample_ids, classes, layers),
        recordings=_recordings(windows_of) if windows_of else None,
        bytes_are_estimated=None in (info.embedding_shape or ()),
        reclaimable_bytes=_reclaimable(info),
        coverage=coverage,
        num_looked_at=len(vectors.sample_ids),
        is_mean=vectors.is_mean,
        norms=distribution_of(vectors.norms),
        values=distribution_of(vectors.values, trim=_TRIM),
        map=drawn,
        paths=_paths(info.path, drawn.sample_ids) if isinstance(drawn, EmbeddingMap) else {},
        neighbours=neighbours,
        num_unreadable=len(vectors.unreadable),
        unreadable=dict(list(vectors.unreadable.items())[:_MAX_UNREADABLE]),
        not_finite=vectors.not_finite[:_MAX_UNREADABLE],
        damage=f"{num_bad} of the embeddings that were looked at are damaged" if num_bad else None,
    )


def _fits(dataset: str, store: str) -> bool:
    """Whether a store of this namespace can hold samples of a dataset's."""
    return not (dataset and store) or dataset == store


def _coverage_of(dataset: DatasetSplits, reader: EmbeddingReader) -> SplitCoverage:
    found = coverage_of(dataset.splits, reader)
    by_class: dict[str, dict[str, tuple[int, int]]] = {}
    for row in found.rows:
        by_class.setdefault(row.class_name, {})[row.split] = (row.num_present, row.num_asked)

    def share(name: str) -> float:
        counts = by_class[name].values()
        return sum(stored for stored, _ in counts) / sum(asked for _, asked in counts)

    ordered = sorted(by_class, key=lambda name: (share(name), name))
    in_all = {split: found.by_split.get(split, (0, 0)) for split in dataset.splits}
    return SplitCoverage(dataset.name, in_all, {name: by_class[name] for name in ordered})


def _recordings(windows_of: Counter[str]) -> Recordings:
    numbers = sorted(windows_of.values())
    return Recordings(len(numbers), numbers[0], numbers[len(numbers) // 2], numbers[-1])


def _classes(
    sample_ids: Sequence[str],
    recordings: Iterable[str],
    failures: Sequence[ClipFailure],
    mean_bytes: float,
) -> list[ClassSize]:
    stored, recorded = Counter(map(class_of, sample_ids)), Counter(map(class_of, recordings))
    failed = Counter(class_of(failure.sample_id) for failure in failures)
    return [
        ClassSize(
            name, stored[name], recorded[name], round(stored[name] * mean_bytes), failed[name]
        )
        for name in sorted({*stored, *failed}, key=lambda name: (-stored[name], name))
    ]


def _paths(store: Path, sample_ids: Sequence[str]) -> dict[str, str]:
    try:
        found = recorded_sources(store, sample_ids)
        return {name: each.location() for name, _, each in found if each and each.path}
    except (CacheError, OSError):  # damaged records: embeddings are shown without their files
        return {}


def _reclaimable(info: StoreInfo) -> int | None:
    try:
        plan = plan_compaction(info.path)
    except (CacheError, OSError):
        return info.free_bytes or None
    return max(0, plan.bytes_before - plan.bytes_after)

"""How much of a dataset a store holds, by class and split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmdbcache.cache import coverage_of
from lmdbcache.storage import EmbeddingReader

__all__ = ["DatasetSplits", "SplitCoverage", "coverage_by_split"]


@dataclass(frozen=True)
class DatasetSplits:
    """The samples of a dataset by split.

    Args:
        name: How the report calls it, such as its folder.
        namespace: The dataset's name in a config; "" fits every store.
        splits: Split → sample ids.
    """

    name: str
    namespace: str
    splits: Mapping[str, Sequence[str]]

    def fits(self, dataset: str) -> bool:
        """Whether a store of this dataset can hold these samples."""
        return not (dataset and self.namespace) or dataset == self.namespace

    def split_of(self) -> dict[str, str]:
        """Sample id → split."""
        return {
            sample_id: split
            for split, sample_ids in self.splits.items()
            for sample_id in sample_ids
        }


@dataclass(frozen=True)
class SplitCoverage:
    """(stored, asked) of a dataset.

    Args:
        dataset: Its name.
        splits: The names of the splits, in their order.
        by_class: Class → split → (stored, asked); the least complete class first.
        in_all: Split → (stored, asked).
    """

    dataset: str
    splits: list[str]
    by_class: dict[str, dict[str, tuple[int, int]]]
    in_all: dict[str, tuple[int, int]]


def coverage_by_split(dataset: DatasetSplits, reader: EmbeddingReader) -> SplitCoverage:
    """How much of each class and split the reader has."""
    by_class: dict[str, dict[str, tuple[int, int]]] = {}
    in_all = {}
    for split, sample_ids in dataset.splits.items():
        found = coverage_of(sample_ids, reader)
        in_all[split] = (found.num_present, found.num_asked)
        for name, counts in found.by_class.items():
            by_class.setdefault(name, {})[split] = counts
    ordered = sorted(by_class, key=lambda name: (_share(by_class[name]), name))
    return SplitCoverage(
        dataset=dataset.name,
        splits=list(dataset.splits),
        by_class={name: by_class[name] for name in ordered},
        in_all=in_all,
    )


def _share(counts: Mapping[str, tuple[int, int]]) -> float:
    return sum(stored for stored, _ in counts.values()) / sum(asked for _, asked in counts.values())

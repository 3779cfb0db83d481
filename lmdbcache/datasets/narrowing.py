"""Parts of a dataset: by class, node, fold and split, for every adapter. No torch here."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lmdbcache.datasets.base import AudioDataset, Sample
from lmdbcache.datasets.splits import (
    SPLITS,
    checked_num_nodes,
    checked_split_method,
    node_split,
    partition_samples,
    split_samples,
    whole_number,
)
from lmdbcache.errors import DatasetError
from lmdbcache.files import few
from lmdbcache.storage import canonical_class

# Part of what a split means: another number would move every clip.
SPLIT_SEED: Final = 42
NODE_SEED: Final = 42

_FEWEST_FOLDS: Final = 3
_MOST_SHOWN: Final = 60
_SOURCES: Final = ("auto", "own", "folds", "ratios")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Narrowing:
    """Part of a dataset: first by class, then this node, these folds, this split.

    Args:
        classes: Names or labels to use; None for all.
        exclude: Names or labels to leave out.
        samples_per_class: Use the first samples of each class only, 1 or more. Without effect
            with `samples_per_node`.
        node_split_id: This node, from 0; needs one of the next two, or both.
        num_nodes: Divide all samples between so many nodes.
        samples_per_node: Or give each node so many samples of every class. With it,
            `num_nodes` only says how many nodes there are, for `nodes_of`.
        node_shares: Divide between the nodes by these shares, see `partition_samples`.
        dirichlet: Divide between the nodes with this alpha, see `partition_samples`.
        min_per_node: Samples that a node has at least, with `node_shares` or `dirichlet`.
        node_seed: Seed of the division between nodes, the same on all of them.
        folds: Only these folds.
        split: `"all"`, or the name of a split.
        split_by: Where splits come from: `"own"` (the dataset's), `"folds"` (the last fold is
            test, the one before val, the others train), `"ratios"` (0.7, 0.1, 0.2), or
            `"auto"`: the first of these that the dataset has.
        split_method: How nodes and splits by ratios are drawn: `"hash"` or `"sklearn"`, see
            `split_samples` and `node_split`.
    """

    classes: Sequence[str | int] | None = None
    exclude: Sequence[str | int] | None = None
    samples_per_class: int | None = None
    node_split_id: int | None = None
    num_nodes: int | None = None
    samples_per_node: int | None = None
    node_shares: Sequence[float] | None = None
    dirichlet: float | None = None
    min_per_node: int = 0
    node_seed: int = NODE_SEED
    folds: Sequence[int] | None = None
    split: str = "all"
    split_by: str = "auto"
    split_method: str = "hash"

    def of(self, dataset: AudioDataset) -> list[Sample]:
        """Return this part of a dataset, in its order; labels keep their value.

        Raises:
            DatasetError: A choice can't be used with this dataset.
        """
        self._check_split(dataset)
        samples = self._of_node(self.of_classes(dataset))
        return self._of_folds_and_split(samples, dataset, self.node_split_id)

    def nodes_of(self, dataset: AudioDataset) -> list[list[Sample]]:
        """Return what `of` gives for each node; `node_split_id` is only checked.

        Raises:
            DatasetError: A choice can't be used, or the number of nodes isn't given.
        """
        self._check_split(dataset)
        if self.num_nodes is None:
            raise DatasetError("`num_nodes`: how many nodes are there?")
        samples = self.of_classes(dataset)
        nodes = self._nodes(samples, range(checked_num_nodes(self.num_nodes, self.node_split_id)))
        return [
            self._of_folds_and_split(samples, dataset, node) for node, samples in enumerate(nodes)
        ]

    def of_classes(self, dataset: AudioDataset) -> list[Sample]:
        """Return the samples of the chosen classes.

        Raises:
            DatasetError: A class isn't one of the dataset's, or none of them has clips.
        """
        if self.samples_per_class is not None:
            whole_number("samples_per_class", self.samples_per_class, minimum=1)
        labels, name = dataset.class_labels, dataset.namespace
        wanted = chosen_classes(self.classes, labels, name) or list(labels)
        excluded = chosen_classes(self.exclude, labels, name) or []
        active = [each for each in wanted if each not in excluded]
        present = {sample["class_name"] for sample in dataset.samples}
        _report_absent([each for each in active if each not in present], active, name)
        chosen = set(active)
        samples = [sample for sample in dataset.samples if sample["class_name"] in chosen]
        if self.samples_per_node is not None:
            return samples
        return first_of_each_class(samples, self.samples_per_class)

    def _check_split(self, dataset: AudioDataset) -> None:
        """Before anything is narrowed: what a split means depends on the whole dataset."""
        checked_split_method(self.split_method)
        check_split(dataset.samples, self.split, self.split_by, dataset.namespace)

    def _of_folds_and_split(
        self, samples: list[Sample], dataset: AudioDataset, node: int | None
    ) -> list[Sample]:
        if self.folds:
            samples = _of_folds(samples, self.folds, dataset)
        return split_of(
            samples,
            self.split,
            self.split_by,
            whole=dataset.samples,
            split_method=self.split_method,
            node=node,
        )

    def _of_node(self, samples: list[Sample]) -> list[Sample]:
        if self.node_split_id is not None:
            return self._nodes(samples, [self.node_split_id])[0]
        if self.num_nodes is not None or self.samples_per_node is not None or self._rule():
            raise DatasetError("node_split_id: which of the nodes is this one? From 0")
        return samples

    def _nodes(self, samples: list[Sample], wanted: Sequence[int]) -> list[list[Sample]]:
        """The samples of these nodes."""
        rule, size = self._rule(), self.samples_per_node
        if self.num_nodes is not None:
            num_nodes = checked_num_nodes(self.num_nodes, self.node_split_id)
        elif size is None:
            raise DatasetError(
                "node_split_id: a node of how many (`num_nodes`), or of how many samples of each "
                "class (`samples_per_node`)?"
            )
        if size is not None:
            if rule:
                raise DatasetError(
                    "samples_per_node: gives every node the same; leave it out to divide by "
                    "`node_shares`, `dirichlet` or `min_per_node`"
                )
            return [
                node_split(samples, node, None, size, self.node_seed, self.split_method)
                for node in wanted
            ]
        nodes = partition_samples(
            samples, num_nodes, **rule, seed=self.node_seed, split_method=self.split_method
        )
        return [nodes[node] for node in wanted]

    def _rule(self) -> dict[str, Any]:
        """Arguments of `partition_samples`, none for an even division."""
        if self.node_shares is not None and self.dirichlet is not None:
            raise DatasetError("node_shares, dirichlet: give one of them")
        rule: dict[str, Any] = {}
        if self.node_shares is not None:
            rule = {"by": "share", "shares": self.node_shares}
        elif self.dirichlet is not None:
            rule = {"by": "dirichlet", "alpha": self.dirichlet}
        return {**rule, "min_samples": self.min_per_node} if self.min_per_node else rule


def chosen_classes(
    classes: str | int | Iterable[str | int] | None,
    class_labels: Mapping[str, int],
    dataset: str,
) -> list[str] | None:
    """Return the class names of a selection given as names (any case) or labels.

    Args:
        classes: Names and labels.
        class_labels: Class name, in lower case → label.
        dataset: What to call the dataset in an error.

    Returns:
        The names in the order given, or None without a selection.

    Raises:
        DatasetError: A name or label isn't one of the dataset's.
    """
    if classes is None:
        return None
    if isinstance(classes, (str, int)):
        classes = [classes]
    return [_class_name(item, class_labels, dataset) for item in classes] or None


def _class_name(item: Any, class_labels: Mapping[str, int], dataset: str) -> str:
    name: str | None
    if isinstance(item, str):
        name = canonical_class(item.strip())
        name = name if name in class_labels else None
    else:
        names = {label: name for name, label in class_labels.items()}
        try:
            name = None if isinstance(item, bool) else names.get(operator.index(item))
        except TypeError:
            name = None
    if name is None:
        pairs = [f"{name} ({label})" for name, label in class_labels.items()]
        raise DatasetError(
            f"{item!r} isn't a class of {dataset}; names and labels are {few(pairs, _MOST_SHOWN)}"
        )
    return name


def first_of_each_class(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """Return the first samples of each class; None, 0 and less mean no limit."""
    if not limit or limit < 0:
        return list(samples)
    taken: dict[str, int] = {}
    limited = []
    for sample in samples:
        name = sample["class_name"]
        taken[name] = taken.get(name, 0) + 1
        if taken[name] <= limit:
            limited.append(sample)
    return limited


def split_source(samples: Sequence[Sample], split_by: str = "auto") -> str:
    """Return where the splits of a dataset come from: `own`, `folds` or `ratios`.

    Args:
        samples: All of the dataset.
        split_by: See `Narrowing`.

    Raises:
        DatasetError: There is no such source, or the samples lack what it needs.
    """
    if split_by not in _SOURCES:
        raise DatasetError(f"split_by: {split_by!r}; use {', '.join(_SOURCES)}")
    has = {
        "own": bool(samples) and all("split" in sample for sample in samples),
        "folds": bool(samples) and all("fold" in sample for sample in samples),
        "ratios": True,
    }
    if split_by == "auto":
        return next(source for source in has if has[source])
    if not has[split_by]:
        raise DatasetError(
            f"split_by: {split_by!r}, but not every sample has a "
            f"{'split' if split_by == 'own' else 'fold'}; use 'ratios'"
        )
    return split_by


def check_split(samples: Sequence[Sample], split: str, split_by: str, name: str) -> None:
    """Refuse a split that a dataset doesn't have.

    Args:
        samples: All of the dataset.
        split: Name of the split, or `all`.
        split_by: See `Narrowing`.
        name: What to call the dataset.

    Raises:
        DatasetError: It has no such split.
    """
    known = split_names(samples, split_by)
    if split == "all" or split in known:
        return
    source = split_source(samples, split_by)
    if source == "folds" and not known:
        raise DatasetError(
            f"split: {split!r}; {name} has fewer than 3 folds, not enough for train, val and test. "
            'Give `folds`, or `split_by="ratios"`'
        )
    names = ", ".join(repr(each) for each in known)
    own = '; `split_by="ratios"` draws others' * (source == "own")
    raise DatasetError(f"split: {split!r}; {name} has {names} and 'all'{own}")


def split_names(samples: Sequence[Sample], split_by: str = "auto") -> tuple[str, ...]:
    """Return the names of a dataset's splits, none if its folds are too few.

    Args:
        samples: All of the dataset.
        split_by: See `Narrowing`.
    """
    source = split_source(samples, split_by)
    if source == "own":
        found = {str(sample["split"]) for sample in samples}
        usual = [name for name in SPLITS if name in found]
        return (*usual, *sorted(found.difference(usual)))
    if source == "folds" and len({sample["fold"] for sample in samples}) < _FEWEST_FOLDS:
        return ()
    return SPLITS


def split_seed(split_method: str, node: int | None) -> int:
    """Return the seed of the splits by ratios: with `"sklearn"` each node has another.

    Args:
        split_method: `"hash"` or `"sklearn"`.
        node: Whose samples are split, from 0, if they were divided between nodes.
    """
    return SPLIT_SEED + (node or 0) if split_method == "sklearn" else SPLIT_SEED


def split_of(
    samples: Sequence[Sample],
    split: str,
    split_by: str,
    *,
    whole: Sequence[Sample],
    split_method: str = "hash",
    node: int | None = None,
) -> list[Sample]:
    """Return the samples of one split.

    Args:
        samples: Those to choose from.
        split: Name of the split, or `all`.
        split_by: See `Narrowing`.
        whole: All samples of the dataset, which say what its folds are.
        split_method: See `split_samples`.
        node: Whose samples these are, if they were divided between nodes.
    """
    if split == "all":
        return list(samples)
    source = split_source(whole, split_by)
    if source == "own":
        return [sample for sample in samples if sample["split"] == split]
    if source == "folds":
        wanted = _folds_of(whole, split)
        return [sample for sample in samples if sample["fold"] in wanted]
    seed = split_seed(split_method, node)
    return split_samples(samples, split, seed=seed, split_method=split_method)


def _folds_of(samples: Sequence[Sample], split: str) -> set[int]:
    """The last fold is test, the one before it val, the rest are train."""
    folds = sorted({int(sample["fold"]) for sample in samples})
    parts: Mapping[str, list[int]] = {"train": folds[:-2], "val": [folds[-2]], "test": [folds[-1]]}
    return set(parts[split])


def _of_folds(
    samples: Sequence[Sample], folds: Sequence[int], dataset: AudioDataset
) -> list[Sample]:
    known = {sample["fold"] for sample in dataset.samples if "fold" in sample}
    unknown = [fold for fold in folds if fold not in known]
    if unknown:
        there = f"folds are {', '.join(map(str, sorted(known)))}" if known else "it has no folds"
        raise DatasetError(f"folds: {unknown[0]} of {dataset.namespace}; {there}")
    return [sample for sample in samples if sample.get("fold") in folds]


def _report_absent(absent: list[str], active: list[str], name: str) -> None:
    if active and not absent:
        return
    if len(absent) == len(active):
        raise DatasetError(f"{name} has no clips of {few(absent) or 'any class'}")
    _logger.warning("%s has no clips of: %s", name, few(absent))

"""Dividing samples between nodes and between train, val and test. No torch here.

With `split_method="hash"`, who goes where depends on nothing but the seed and a hash of
`class:file_id`: not on the order of the list, the process or the platform, since nodes on different
machines have to agree without talking. A clip that is added later moves few others. The other
method is for scripts that drew theirs with scikit-learn.
"""

from __future__ import annotations

import itertools
import logging
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import numpy as np
import xxhash

from lmdbcache.datasets.base import Sample
from lmdbcache.datasets.sklearn_splits import NODE_RANK, shuffled_classes, sklearn_split
from lmdbcache.errors import DatasetError

SPLITS: Final = ("train", "val", "test")
SPLIT_METHODS: Final = ("hash", "sklearn")

PartitionRule = Literal["count", "share", "dirichlet"]

# Part of the random stream's key. To be changed with anything that changes who gets what.
_STREAM: Final = "dirichlet/2"

# What floating-point arithmetic makes of a ratio, at most: 1 - 0.9 - 0.1 is -2.8e-17.
_NOISE: Final = 1e-9

_UNSCALED: Final = (0.99, 1.01)
_LARGEST_STATE: Final = 2**32 - 1

_logger = logging.getLogger(__name__)


def split_samples(
    samples: Sequence[Sample],
    split: str,
    train_ratio: float = 0.7,
    val_ratio: float = 0.1,
    test_ratio: float = 0.2,
    *,
    stratify: bool = True,
    seed: int = 42,
    split_method: str = "hash",
) -> list[Sample]:
    """Return the samples of one split; train, val and test are disjoint and cover all samples.

    Args:
        samples: Dicts with `file_id` and `class_name`, and `class_label` if labels and names have
            different orders.
        split: `"train"`, `"val"`, `"test"`, or `"all"` for everything.
        train_ratio: Share of train; ratios that don't sum to 1 are normalized.
        val_ratio: Share of val.
        test_ratio: Share of test.
        stratify: Divide each class by the ratios (largest remainder), else the whole list.
        seed: Another seed, another division.
        split_method: `"hash"`: by a hash of seed, class and file id. `"sklearn"`: as
            `sklearn.model_selection.train_test_split(stratify=labels, random_state=seed)` draws
            test from all samples and then val from the rest. The samples are first sorted by label
            and file id, so that the order of the list doesn't matter; which others are in it does.
            Ratios that sum to 0.99 to 1.01 are taken as they are. Without `stratify` a NumPy
            `RandomState` shuffles one class after another, shares are rounded down, and test has
            what is left, or, with a ratio of 0, nothing: then a few samples are in no split.

    Returns:
        The samples of the split, in the order of `samples`.

    Raises:
        DatasetError: Unknown split or method, ratios that are negative, not finite or all zero, or
            `"sklearn"` can't divide the samples: a class with one sample, an empty part.
        MissingDependencyError: scikit-learn isn't installed, with `split_method="sklearn"`.
    """
    if split not in (*SPLITS, "all"):
        raise DatasetError(f"split: {split!r}; use 'train', 'val', 'test' or 'all'")
    ratios = normalized_ratios(train_ratio, val_ratio, test_ratio, split_method)
    if split == "all":
        return list(samples)
    return split_by_ratios(
        samples, split, ratios, stratify=stratify, seed=seed, split_method=split_method
    )


def split_by_ratios(
    samples: Sequence[Sample],
    split: str,
    ratios: tuple[float, float, float],
    *,
    stratify: bool,
    seed: int,
    split_method: str,
) -> list[Sample]:
    """Return the samples of train, val or test by ratios that are taken as they are.

    Raises:
        DatasetError, MissingDependencyError: See `split_samples`.
    """
    chosen: set[int] = set()
    if split_method == "sklearn":
        chosen = sklearn_split(samples, split, ratios, stratify=stratify, seed=_state(seed))
        return [sample for index, sample in enumerate(samples) if index in chosen]
    for ranked in _ranked_groups(samples, seed, by_class=stratify):
        sizes = _largest_remainder(len(ranked), ratios)
        position = SPLITS.index(split)
        start = sum(sizes[:position])
        chosen.update(ranked[start : start + sizes[position]])
    return [sample for index, sample in enumerate(samples) if index in chosen]


def node_split(
    samples: Sequence[Sample],
    node_split_id: int,
    num_nodes: int | None = None,
    samples_per_node: int | None = None,
    seed: int = 42,
    split_method: str = "hash",
) -> list[Sample]:
    """Return the samples of one node; the samples of two nodes are disjoint.

    Args:
        samples: Dicts with `file_id` and `class_name`.
        node_split_id: Which node, from 0.
        num_nodes: Divide every class between this many nodes: all samples are covered, and sizes
            differ by at most one per class.
        samples_per_node: Or give each node this many samples of every class: node k has those of
            rank k·K to (k+1)·K, as far as the class goes.
        seed: Another seed, another division; all nodes must use the same.
        split_method: `"hash"`, or `"sklearn"`: each class, sorted by file id, is shuffled by one
            `numpy.random.RandomState`, one class after another in the order of their labels. The
            returned samples are copies with `node_rank` (int), their place in the shuffled class:
            `split_samples(split_method="sklearn")` draws the node's samples in this order.

    Returns:
        The samples of the node, in the order of `samples`.

    Raises:
        DatasetError: Both or neither of `num_nodes` and `samples_per_node`, a number out of
            range, or an unknown method.
    """
    if (num_nodes is None) == (samples_per_node is None):
        raise DatasetError(
            f"num_nodes={num_nodes}, samples_per_node={samples_per_node}: give exactly one of them"
        )
    node = whole_number("node_split_id", node_split_id, minimum=0)
    if samples_per_node is None:
        nodes = checked_num_nodes(num_nodes, node)
        part = partition_samples(samples, nodes, seed=seed, split_method=split_method)[node]
        size = 1
    else:
        size = whole_number("samples_per_node", samples_per_node, minimum=1)
        parts = [
            group[node * size : (node + 1) * size]
            for group in _ordered_classes(samples, seed, split_method)
        ]
        part = _chosen(samples, parts, split_method)
    counts = Counter(sample["class_name"] for sample in part)
    for name in dict.fromkeys(sample["class_name"] for sample in samples):
        if counts[name] < size:
            _logger.warning(
                "node %d has %d samples of class %r; %d were requested",
                node,
                counts[name],
                name,
                size,
            )
    return part


def partition_samples(
    samples: Sequence[Sample],
    num_nodes: int,
    *,
    by: PartitionRule = "count",
    shares: Sequence[float] | None = None,
    alpha: float | None = None,
    min_samples: int = 0,
    seed: int = 42,
    split_method: str = "hash",
) -> list[list[Sample]]:
    """Divide samples between nodes: the parts are disjoint and cover all samples.

    Args:
        samples: Dicts with `file_id` and `class_name`.
        num_nodes: How many nodes.
        by: `"count"` gives each node the same number of every class (they differ by at most one;
            node k gets what `node_split(samples, k, num_nodes)` gives). `"share"` divides every
            class by `shares`. `"dirichlet"` draws the shares of each class from a symmetric
            Dirichlet distribution: the smaller `alpha`, the fewer nodes have a class.
        shares: Of each node, for `"share"`; scaled to a sum of 1.
        alpha: Concentration, above 0, for `"dirichlet"`; 0.1 is very uneven, 100 nearly even.
        min_samples: Every node gets at least so many: one that has fewer takes samples of the
            largest node's largest class, one at a time.
        seed: Another seed, another division; all nodes must use the same.
        split_method: See `node_split`; `"sklearn"` has `by="count"` only.

    Returns:
        The samples of each node, in the order of `samples`.

    Raises:
        DatasetError: An argument that can't be used, or fewer than `num_nodes * min_samples`
            samples.
    """
    nodes = whole_number("num_nodes", num_nodes, minimum=1)
    least = whole_number("min_samples", min_samples, minimum=0)
    if least * nodes > len(samples):
        raise DatasetError(
            f"min_samples: {least} for each of {nodes} nodes; there are {len(samples)} samples"
        )
    sizes_of = _sizes(by, nodes, shares, alpha, seed)
    if split_method == "sklearn":
        if by != "count" or least:
            raise DatasetError(
                'split_method: "sklearn" divides evenly; `split_method="hash"` also divides by '
                "shares or Dirichlet, and has `min_samples`"
            )
        sizes_of = _even_sizes(nodes)
    groups: dict[str, list[list[int]]] = {}
    ordered = _ordered_classes(samples, seed, split_method)
    for ranked in sorted(ordered, key=_first_class(samples)):
        class_name = samples[ranked[0]]["class_name"]
        parts, start = [], 0
        for size in sizes_of(class_name, len(ranked)):
            parts.append(ranked[start : start + size])
            start += size
        groups[class_name] = parts
    _top_up(list(groups.values()), nodes, least)
    return [
        _chosen(samples, [parts[node] for parts in groups.values()], split_method)
        for node in range(nodes)
    ]


def checked_num_nodes(num_nodes: Any, node: Any) -> int:
    """Return a number of nodes among which a node is; None: which one doesn't matter.

    Raises:
        DatasetError: They aren't whole numbers, or there is no such node.
    """
    nodes = whole_number("num_nodes", num_nodes, minimum=1)
    if node is not None and whole_number("node_split_id", node, minimum=0) >= nodes:
        raise DatasetError(f"node_split_id: {node}; with num_nodes={nodes} it is 0 to {nodes - 1}")
    return nodes


def checked_split_method(split_method: str) -> str:
    """Return a split method that there is.

    Raises:
        DatasetError: It is neither `"hash"` nor `"sklearn"`.
    """
    if split_method not in SPLIT_METHODS:
        raise DatasetError(f"split_method: {split_method!r}; use 'hash' or 'sklearn'")
    return split_method


def _ordered_classes(samples: Sequence[Sample], seed: int, split_method: str) -> list[list[int]]:
    """Indices into `samples`, one list per class, in the order in which nodes get them."""
    if checked_split_method(split_method) == "sklearn":
        return shuffled_classes(samples, _state(seed))
    return _ranked_groups(samples, seed, by_class=True)


def _chosen(
    samples: Sequence[Sample], parts: Sequence[Sequence[int]], split_method: str
) -> list[Sample]:
    """One node's samples, of its indices in each class."""
    if split_method == "hash":
        return [samples[index] for index in sorted(itertools.chain(*parts))]
    ranks = {index: rank for part in parts for rank, index in enumerate(part)}
    return [{**samples[index], NODE_RANK: ranks[index]} for index in sorted(ranks)]


def _state(seed: int) -> int:
    """The seed of a `numpy.random.RandomState`."""
    number = whole_number("seed", seed, minimum=0)
    if number > _LARGEST_STATE:
        raise DatasetError(f'seed: {number}; `split_method="sklearn"` takes 0 to {_LARGEST_STATE}')
    return number


def _even_sizes(nodes: int) -> Callable[[str, int], list[int]]:
    """The remainder goes to the first nodes."""
    return lambda _, count: [count // nodes + (node < count % nodes) for node in range(nodes)]


def _first_class(samples: Sequence[Sample]) -> Callable[[list[int]], str]:
    return lambda ranked: str(samples[ranked[0]]["class_name"])


def _sizes(
    by: str, nodes: int, shares: Sequence[float] | None, alpha: float | None, seed: int
) -> Callable[[str, int], list[int]]:
    """(class, number of its samples) → how many each node gets."""
    needed = {"count": (), "share": ("shares",), "dirichlet": ("alpha",)}
    if by not in needed:
        raise DatasetError(f"by: {by!r}; use 'count', 'share' or 'dirichlet'")
    given = {"shares": shares, "alpha": alpha}
    for name, value in given.items():
        if (value is not None) != (name in needed[by]):
            state = "needed" if value is None else "not used"
            raise DatasetError(f"{name}: {state} with by={by!r}")
    if shares is not None:
        fixed = _normalized(shares, nodes)
        return lambda _, count: _largest_remainder(count, fixed)
    if alpha is not None:
        if not (math.isfinite(alpha) and alpha > 0):
            raise DatasetError(f"alpha: {alpha}; it must be finite and above 0, such as 0.5")
        return lambda name, count: _largest_remainder(
            count, _dirichlet(f"{seed}:{name}", nodes, alpha)
        )
    return lambda _, count: [
        (node + 1) * count // nodes - node * count // nodes for node in range(nodes)
    ]


def _normalized(shares: Sequence[float], nodes: int) -> list[float]:
    values = [float(share) for share in shares]
    usable = all(math.isfinite(value) and value >= 0 for value in values) and sum(values) > 0
    if len(values) != nodes or not usable:
        raise DatasetError(
            f"shares: {list(shares)}; give one number of 0 or more for each of {nodes} nodes, and "
            "at least one above 0"
        )
    return [value / sum(values) for value in values]


def _top_up(groups: list[list[list[int]]], nodes: int, least: int) -> None:
    """Move single samples from the largest node to each that has too few."""
    totals = [sum(len(parts[node]) for parts in groups) for node in range(nodes)]
    for node in range(nodes):
        while totals[node] < least:
            giver = max(range(nodes), key=lambda other: (totals[other], -other))
            parts = max(groups, key=lambda parts: len(parts[giver]))
            parts[node].append(parts[giver].pop())
            totals[node] += 1
            totals[giver] -= 1


def _dirichlet(name: str, size: int, alpha: float) -> list[float]:
    """Shares drawn from the random stream of this name, of a symmetric Dirichlet distribution."""
    key = xxhash.xxh3_128_intdigest(f"{_STREAM}:{name}".encode())
    generator = np.random.Generator(np.random.Philox(key=key))
    return [float(share) for share in generator.dirichlet([alpha] * size)]


def normalized_ratios(
    train_ratio: float, val_ratio: float, test_ratio: float, split_method: str = "hash"
) -> tuple[float, float, float]:
    """Return the three ratios, scaled to a sum of 1 (with a warning if that changes them).

    A negative ratio that floating-point arithmetic leaves, such as 1 - 0.9 - 0.1, is 0. With
    `split_method="sklearn"`, ratios that sum to 0.99 to 1.01 aren't scaled.

    Raises:
        DatasetError: A ratio is negative or not finite, all are zero, or an unknown method.
    """
    checked_split_method(split_method)
    train, val, test = (
        0.0 if -_NOISE < ratio < 0 else float(ratio)
        for ratio in (train_ratio, val_ratio, test_ratio)
    )
    ratios, total = (train, val, test), train + val + test
    if not all(math.isfinite(ratio) and ratio >= 0 for ratio in ratios) or total == 0:
        raise DatasetError(
            f"train_ratio={train_ratio}, val_ratio={val_ratio}, test_ratio={test_ratio}: each must "
            "be 0 or more and at least one above 0, such as 0.7, 0.1, 0.2"
        )
    least, most = _UNSCALED if split_method == "sklearn" else (1 - _NOISE, 1 + _NOISE)
    if least <= total <= most:
        return ratios
    _logger.warning("train, val and test ratios sum to %g; they are scaled to 1", total)
    return (train / total, val / total, test / total)


def _ranked_groups(samples: Sequence[Sample], seed: int, *, by_class: bool) -> list[list[int]]:
    """Indices into `samples`, ordered by hash, one list per class or one for all."""

    def rank(index: int) -> tuple[int, str, str]:
        class_name, file_id = samples[index]["class_name"], samples[index]["file_id"]
        text = f"{seed}:{class_name}:{file_id}"
        return xxhash.xxh3_64_intdigest(text.encode()), class_name, file_id

    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample["class_name"] if by_class else "", []).append(index)
    return [sorted(group, key=rank) for group in groups.values()]


def _largest_remainder(total: int, ratios: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total` and are nearest to the ratios."""
    # Rounding first keeps 0.7 * 10 = 7.000000000000001 from looking like a remainder.
    shares = [round(total * ratio, 9) for ratio in ratios]
    sizes = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(ratios)), key=lambda i: (sizes[i] - shares[i], i))
    for position in by_remainder[: total - sum(sizes)]:
        sizes[position] += 1
    return sizes


def whole_number(name: str, value: Any, *, minimum: int) -> int:
    """Return an argument that must be a whole number of at least this.

    Raises:
        DatasetError: It isn't.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise DatasetError(f"{name}: {value!r} isn't a whole number")
    number = operator.index(value)
    if number < minimum:
        raise DatasetError(f"{name}: {number}; it must be {minimum} or more")
    return number

"""Dividing samples between nodes and between train, val and test. No torch here.

Who goes where depends on nothing but the seed and a hash of `class:file_id`: not on the order of
the list, the process or the platform, since nodes on different machines have to agree without
talking. A clip that is added later moves few others.
"""

from __future__ import annotations

import logging
import math
import operator
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import xxhash

from lmdbcache.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmdbcache.datasets.base import Sample

__all__ = [
    "SPLITS",
    "node_split",
    "normalized_ratios",
    "partition_samples",
    "split_samples",
    "whole_number",
]

SPLITS: Final = ("train", "val", "test")

PartitionRule = Literal["count", "share", "dirichlet"]

# Part of the random stream's key. To be changed with anything that changes who gets what.
_STREAM: Final = "dirichlet/2"

# What floating-point arithmetic makes of a ratio, at most: 1 - 0.9 - 0.1 is -2.8e-17.
_NOISE: Final = 1e-9

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
) -> list[Sample]:
    """Return the samples of one split; train, val and test are disjoint and cover all samples.

    Args:
        samples: Dicts with `file_id` and `class_name`.
        split: `"train"`, `"val"`, `"test"`, or `"all"` for everything.
        train_ratio: Share of train; ratios that don't sum to 1 are normalized.
        val_ratio: Share of val.
        test_ratio: Share of test.
        stratify: Divide each class by the ratios (largest remainder), else the whole list.
        seed: Another seed, another division.

    Returns:
        The samples of the split, in the order of `samples`.

    Raises:
        DatasetError: Unknown split, or ratios that are negative, not finite or all zero.
    """
    if split not in (*SPLITS, "all"):
        raise DatasetError(f"split: {split!r}; use 'train', 'val', 'test' or 'all'")
    ratios = normalized_ratios(train_ratio, val_ratio, test_ratio)
    if split == "all":
        return list(samples)
    chosen: set[int] = set()
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

    Returns:
        The samples of the node, in the order of `samples`.

    Raises:
        DatasetError: Both or neither of `num_nodes` and `samples_per_node`, or a number out of
            range.
    """
    if (num_nodes is None) == (samples_per_node is None):
        raise DatasetError(
            f"num_nodes={num_nodes}, samples_per_node={samples_per_node}: give exactly one of them"
        )
    node = whole_number("node_split_id", node_split_id, minimum=0)
    if samples_per_node is None:
        nodes = whole_number("num_nodes", num_nodes, minimum=1)
        if node >= nodes:
            raise DatasetError(
                f"node_split_id: {node}; with num_nodes={nodes} it is 0 to {nodes - 1}"
            )
        part = partition_samples(samples, nodes, seed=seed)[node]
        size = 1
    else:
        size = whole_number("samples_per_node", samples_per_node, minimum=1)
        groups = _ranked_groups(samples, seed, by_class=True)
        chosen = sorted(i for group in groups for i in group[node * size : (node + 1) * size])
        part = [samples[index] for index in chosen]
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
    groups: dict[str, list[list[int]]] = {}
    for ranked in sorted(_ranked_groups(samples, seed, by_class=True), key=_first_class(samples)):
        class_name = samples[ranked[0]]["class_name"]
        parts, start = [], 0
        for size in sizes_of(class_name, len(ranked)):
            parts.append(ranked[start : start + size])
            start += size
        groups[class_name] = parts
    _top_up(list(groups.values()), nodes, least)
    return [
        [samples[index] for index in sorted(i for parts in groups.values() for i in parts[node])]
        for node in range(nodes)
    ]


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
    train_ratio: float, val_ratio: float, test_ratio: float
) -> tuple[float, float, float]:
    """Return the three ratios, scaled to a sum of 1 (with a warning if that changes them).

    A negative ratio that floating-point arithmetic leaves, such as 1 - 0.9 - 0.1, is 0.

    Raises:
        DatasetError: A ratio is negative or not finite, or all are zero.
    """
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
    if math.isclose(total, 1.0, abs_tol=_NOISE):
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

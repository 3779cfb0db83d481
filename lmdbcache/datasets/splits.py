"""Dividing samples between nodes and between train, val and test. No torch here.

Who goes where depends on nothing but the seed and a hash of `class:file_id`: not on the order of
the list, the process, the platform or a library's random stream. A clip that is added later
moves few others.
"""

from __future__ import annotations

import logging
import math
import operator
from typing import TYPE_CHECKING, Any, Final

import xxhash

from lmdbcache.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmdbcache.datasets.base import Sample

__all__ = [
    "SPLITS",
    "largest_remainder",
    "node_split",
    "normalised_ratios",
    "ranked_groups",
    "split_samples",
    "whole_number",
]

SPLITS: Final = ("train", "val", "test")

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
    """The samples of one split; train, val and test are disjoint and cover all samples.

    Args:
        samples: Dicts with `file_id` and `class_name`.
        split: `"train"`, `"val"`, `"test"`, or `"all"` for everything.
        train_ratio: Share of train; ratios that don't sum to 1 are normalised.
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
    ratios = normalised_ratios(train_ratio, val_ratio, test_ratio)
    if split == "all":
        return list(samples)
    chosen: set[int] = set()
    for ranked in ranked_groups(samples, seed, by_class=stratify):
        sizes = largest_remainder(len(ranked), ratios)
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
    """The samples of one node; the samples of two nodes are disjoint.

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
    bounds = _node_bounds(node_split_id, num_nodes, samples_per_node)
    chosen: set[int] = set()
    for ranked in ranked_groups(samples, seed, by_class=True):
        start, stop = bounds(len(ranked))
        chosen.update(ranked[start:stop])
        wanted = samples_per_node or 1
        if (found := len(ranked[start:stop])) < wanted:
            _logger.warning(
                "node %d has %d samples of class %r; %d were asked for, the class has %d",
                node_split_id,
                found,
                samples[ranked[0]]["class_name"],
                wanted,
                len(ranked),
            )
    return [sample for index, sample in enumerate(samples) if index in chosen]


def normalised_ratios(
    train_ratio: float, val_ratio: float, test_ratio: float
) -> tuple[float, float, float]:
    """The three ratios, scaled to a sum of 1 (with a warning if that changes them).

    Raises:
        DatasetError: A ratio is negative or not finite, or all are zero.
    """
    ratios = (float(train_ratio), float(val_ratio), float(test_ratio))
    total = sum(ratios)
    if not all(math.isfinite(ratio) and ratio >= 0 for ratio in ratios) or total == 0:
        raise DatasetError(
            f"train_ratio={train_ratio}, val_ratio={val_ratio}, test_ratio={test_ratio}: each must "
            "be 0 or more and at least one above 0, such as 0.7, 0.1, 0.2"
        )
    if math.isclose(total, 1.0, abs_tol=1e-9):
        return ratios
    _logger.warning("train, val and test ratios sum to %g; they are scaled to 1", total)
    return (ratios[0] / total, ratios[1] / total, ratios[2] / total)


def ranked_groups(samples: Sequence[Sample], seed: int, *, by_class: bool) -> list[list[int]]:
    """Indices into `samples`, ordered by hash, one list per class or one for all."""

    def rank(index: int) -> tuple[int, str, str]:
        class_name, file_id = samples[index]["class_name"], samples[index]["file_id"]
        text = f"{seed}:{class_name}:{file_id}"
        return xxhash.xxh3_64_intdigest(text.encode()), class_name, file_id

    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample["class_name"] if by_class else "", []).append(index)
    return [sorted(group, key=rank) for group in groups.values()]


def largest_remainder(total: int, ratios: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total` and are nearest to the ratios."""
    # Rounding first keeps 0.7 * 10 = 7.000000000000001 from looking like a remainder.
    shares = [round(total * ratio, 9) for ratio in ratios]
    sizes = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(ratios)), key=lambda i: (sizes[i] - shares[i], i))
    for position in by_remainder[: total - sum(sizes)]:
        sizes[position] += 1
    return sizes


def _node_bounds(
    node_split_id: int, num_nodes: int | None, samples_per_node: int | None
) -> Callable[[int], tuple[int, int]]:
    """How many samples a class has → first and last rank of this node."""
    if (num_nodes is None) == (samples_per_node is None):
        raise DatasetError(
            f"num_nodes={num_nodes}, samples_per_node={samples_per_node}: give exactly one of them"
        )
    node = whole_number("node_split_id", node_split_id, minimum=0)
    if samples_per_node is not None:
        size = whole_number("samples_per_node", samples_per_node, minimum=1)
        return lambda _: (node * size, (node + 1) * size)
    nodes = whole_number("num_nodes", num_nodes, minimum=1)
    if node >= nodes:
        raise DatasetError(f"node_split_id: {node}; with num_nodes={nodes} it is 0 to {nodes - 1}")
    return lambda count: (node * count // nodes, (node + 1) * count // nodes)


def whole_number(name: str, value: Any, *, minimum: int) -> int:
    """An argument that must be a whole number of at least this.

    Raises:
        DatasetError: It isn't.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise DatasetError(f"{name}: {value!r} isn't a whole number")
    number = operator.index(value)
    if number < minimum:
        raise DatasetError(f"{name}: {number}; it must be {minimum} or more")
    return number

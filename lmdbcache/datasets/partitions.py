"""All samples divided between the nodes of a federation. No torch here.

Like `lmdbcache.datasets.splits`, who goes where depends on the seed and on hashes of the samples'
names, never on the order of a list or the platform: nodes on different machines have to agree
without talking.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import xxhash

from lmdbcache.datasets.splits import largest_remainder, ranked_groups, whole_number
from lmdbcache.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmdbcache.datasets.base import Sample

__all__ = ["PartitionRule", "partition_samples"]

PartitionRule = Literal["count", "share", "dirichlet"]

# Part of the random stream's key. To be changed with anything that changes who gets what.
_STREAM: Final = "dirichlet/2"


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
    for ranked in sorted(ranked_groups(samples, seed, by_class=True), key=_first_class(samples)):
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
        fixed = _normalised(shares, nodes)
        return lambda _, count: largest_remainder(count, fixed)
    if alpha is not None:
        if not (math.isfinite(alpha) and alpha > 0):
            raise DatasetError(f"alpha: {alpha}; it must be finite and above 0, such as 0.5")
        return lambda name, count: largest_remainder(
            count, _dirichlet(f"{seed}:{name}", nodes, alpha)
        )
    return lambda _, count: [
        (node + 1) * count // nodes - node * count // nodes for node in range(nodes)
    ]


def _normalised(shares: Sequence[float], nodes: int) -> list[float]:
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

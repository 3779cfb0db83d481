"""Samples divided between nodes: disjoint, complete, and the same everywhere."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lmdbcache.datasets import node_split, partition_samples
from lmdbcache.errors import DatasetError


def make(**sizes):
    return [
        {"file_id": f"{number:04d}", "class_name": name}
        for name, size in sizes.items()
        for number in range(size)
    ]


def ids(samples):
    return [f"{sample['file_id']}:{sample['class_name']}" for sample in samples]


RULES = [{}, {"by": "share", "shares": [5, 1, 1, 3]}, {"by": "dirichlet", "alpha": 0.3}]
SAMPLES = make(bell=40, rain=17, wind=3, siren=1)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_order_changes_nothing(rule):
    """A list in another order gives each node the same samples."""
    parts = partition_samples(SAMPLES, 4, **rule)
    for seed in range(3):
        shuffled = random.Random(seed).sample(SAMPLES, len(SAMPLES))
        again = partition_samples(shuffled, 4, **rule)
        assert [set(ids(part)) for part in again] == [set(ids(part)) for part in parts]
        places = {sample_id: place for place, sample_id in enumerate(ids(shuffled))}
        assert all(ids(part) == sorted(ids(part), key=places.get) for part in again)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_seeds_make_a_difference(rule):
    """The same seed gives the same parts, another seed others."""
    one = partition_samples(SAMPLES, 4, seed=1, **rule)
    assert one == partition_samples(SAMPLES, 4, seed=1, **rule)
    assert one != partition_samples(SAMPLES, 4, seed=2, **rule)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    nodes=st.integers(1, 7),
    rule=st.sampled_from(["count", "share", "dirichlet"]),
    alpha=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**40),
    least=st.integers(0, 4),
)
def test_parts_are_disjoint_cover_all_and_are_large_enough(sizes, nodes, rule, alpha, seed, least):
    """Whatever is asked for, each sample is with exactly one node."""
    samples = make(**{f"c{number}": size for number, size in enumerate(sizes)})
    least = min(least, len(samples) // nodes)
    more = {"count": {}, "share": {"shares": range(nodes, 0, -1)}, "dirichlet": {"alpha": alpha}}
    parts = partition_samples(samples, nodes, by=rule, seed=seed, min_samples=least, **more[rule])
    assert len(parts) == nodes
    assert sorted(sample for part in parts for sample in ids(part)) == sorted(ids(samples))
    assert min(map(len, parts)) >= least


def test_by_count_is_node_split():
    """The even division is the one that extract --num-nodes always had."""
    parts = partition_samples(SAMPLES, 4, seed=7)
    assert parts == [node_split(SAMPLES, node, num_nodes=4, seed=7) for node in range(4)]


def test_by_share_follows_the_shares():
    """Each class is divided by the shares, which needn't sum to 1."""
    parts = partition_samples(make(a=100, b=50), 3, by="share", shares=[5, 3, 2])
    counts = [Counter(sample["class_name"] for sample in part) for part in parts]
    assert counts == [{"a": 50, "b": 25}, {"a": 30, "b": 15}, {"a": 20, "b": 10}]
    assert partition_samples(make(a=4), 2, by="share", shares=[0, 1])[0] == []


def test_alpha_decides_how_uneven():
    """A small alpha gives a class to few nodes, a large one divides it evenly."""
    samples = make(**{f"c{number:02d}": 100 for number in range(30)})

    def largest_share(alpha):
        parts = partition_samples(samples, 5, by="dirichlet", alpha=alpha)
        counts = [Counter(sample["class_name"] for sample in part) for part in parts]
        return np.mean([max(count[f"c{n:02d}"] for count in counts) / 100 for n in range(30)])

    shares = [largest_share(alpha) for alpha in (0.01, 0.3, 3.0, 1000.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.25


@pytest.mark.parametrize("alpha", [0.05, 0.5, 2.0])
def test_shares_are_dirichlet_distributed(alpha):
    """Mean and variance of one node's share are those of the distribution."""
    nodes, count, classes = 4, 1000, 600
    samples = make(**{f"c{number}": count for number in range(classes)})
    first = Counter(
        s["class_name"] for s in partition_samples(samples, nodes, by="dirichlet", alpha=alpha)[0]
    )
    shares = np.array([first[f"c{number}"] / count for number in range(classes)])
    mean, variance = 1 / nodes, (1 / nodes) * (1 - 1 / nodes) / (nodes * alpha + 1)
    assert abs(shares.mean() - mean) < 4 * np.sqrt(variance / classes)
    assert 0.8 < shares.var() / variance < 1.2


def test_numbers_of_a_stream():
    """Written down: another process or platform gives the same nodes."""
    parts = partition_samples(SAMPLES, 3, by="dirichlet", alpha=0.5, seed=1, min_samples=2)
    counts = [dict(sorted(Counter(s["class_name"] for s in part).items())) for part in parts]
    assert counts == EXPECTED_COUNTS
    assert ids(parts[1]) == ["0000:wind", "0001:wind", "0002:wind", "0000:siren"]


EXPECTED_COUNTS = [
    {"bell": 16, "rain": 4},
    {"siren": 1, "wind": 3},
    {"bell": 24, "rain": 13},
]


def test_ties_are_decided_the_same_way_everywhere():
    """Of equal nodes the first gives, of equal classes the first by name; a remainder likewise."""
    samples = make(rain=4, bell=4)
    even = partition_samples(samples, 3, by="share", shares=[1, 1, 0])
    topped = partition_samples(samples, 3, by="share", shares=[1, 1, 0], min_samples=1)
    assert [len(part) for part in even] == [4, 4, 0]
    assert [len(part) for part in topped] == [3, 4, 1]
    assert topped[1] == even[1]
    (moved,) = topped[2]
    assert moved["class_name"] == "bell"
    assert moved in even[0]
    odd = partition_samples(make(bell=3), 2, by="share", shares=[1, 1])
    assert [len(part) for part in odd] == [2, 1]


def test_another_process_agrees():
    """Neither the hash seed of Python nor numpy's state matters."""
    code = (
        "import json, sys; from lmdbcache.datasets import partition_samples\n"
        "samples = json.load(sys.stdin)\n"
        "print(json.dumps(partition_samples(samples, 4, by='dirichlet', alpha=0.3)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(SAMPLES), env={"PYTHONHASHSEED": "7"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == partition_samples(SAMPLES, 4, by="dirichlet", alpha=0.3)


@pytest.mark.parametrize(
    ("argument", "others"),
    [
        ("num_nodes", {"num_nodes": 0}),
        ("num_nodes", {"num_nodes": 2.5}),
        ("by", {"by": "magic"}),
        ("shares", {"by": "share"}),
        ("shares", {"by": "share", "shares": [1]}),
        ("shares", {"by": "share", "shares": [1, -1]}),
        ("shares", {"by": "share", "shares": [0, 0]}),
        ("shares", {"by": "share", "shares": [1, float("nan")]}),
        ("alpha", {"by": "dirichlet"}),
        ("alpha", {"alpha": 1.0}),
        ("alpha", {"by": "dirichlet", "alpha": 0.0}),
        ("alpha", {"by": "dirichlet", "alpha": float("inf")}),
        ("min_samples", {"min_samples": 31}),
        ("min_samples", {"min_samples": -1}),
    ],
)
def test_wrong_arguments(argument, others):
    """Each is named."""
    with pytest.raises(DatasetError, match=f"^{argument}: "):
        partition_samples(SAMPLES, **{"num_nodes": 2, **others})

"""Splits and nodes: disjoint, complete, and the same everywhere and for ever."""

from __future__ import annotations

import itertools
import json
import logging
import random
import subprocess
import sys
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, strategies as st

from lmdbcache.datasets import node_split, split_samples
from lmdbcache.datasets.splits import SPLITS
from lmdbcache.errors import DatasetError


def make_samples(**counts):
    return [
        {"class_name": name, "file_id": f"video_{index:05d}"}
        for name, count in counts.items()
        for index in range(count)
    ]


def flat(lists):
    return list(chain.from_iterable(lists))


def ids(samples):
    return [f"{sample['file_id']}:{sample['class_name']}" for sample in samples]


SIZES = st.dictionaries(st.sampled_from(["dog", "drum", "rail"]), st.integers(0, 40), min_size=1)
RATIOS = st.tuples(*[st.floats(0, 1)] * 3).filter(lambda ratios: sum(ratios) > 0.01)


@given(sizes=SIZES, ratios=RATIOS, stratify=st.booleans(), seed=st.integers(0, 5))
def test_splits_cover_everything_once(sizes, ratios, stratify, seed):
    """Train, val and test are disjoint and cover all samples, whatever the ratios."""
    samples = make_samples(**sizes)
    parts = [split_samples(samples, s, *ratios, stratify=stratify, seed=seed) for s in SPLITS]
    assert sorted(flat(map(ids, parts))) == sorted(ids(samples))


@given(sizes=SIZES, ratios=RATIOS)
def test_each_class_is_divided_by_largest_remainder(sizes, ratios):
    """With stratify each class's share is within one sample of the ratio; a ratio of 0 is empty."""
    samples, total = make_samples(**sizes), sum(ratios)
    for split, ratio in zip(SPLITS, ratios, strict=True):
        counts = Counter(s["class_name"] for s in split_samples(samples, split, *ratios))
        for name, size in sizes.items():
            assert abs(counts[name] - size * ratio / total) < 1 + 1e-6
        if ratio == 0:
            assert not counts


def test_familiar_numbers():
    """70/10/20 of ten samples is 7, 1 and 2 in every class."""
    samples = make_samples(dog=10, drum=10)
    sizes = [Counter(s["class_name"] for s in split_samples(samples, split)) for split in SPLITS]
    assert sizes == [{"dog": n, "drum": n} for n in (7, 1, 2)]


@pytest.mark.parametrize(
    ("count", "ratios", "expected"),
    [
        (5, (0.5, 0.5, 0.0), [3, 2, 0]),
        (5, (0.0, 0.5, 0.5), [0, 3, 2]),
        (5, (0.5, 0.0, 0.5), [3, 0, 2]),
        (1, (0.4, 0.3, 0.3), [1, 0, 0]),
        (4, (1 / 3, 1 / 3, 1 / 3), [2, 1, 1]),
        (5, (0.31, 0.3, 0.39), [2, 1, 2]),  # 1.55, 1.5, 1.95
    ],
)
def test_remainders_and_ties(count, ratios, expected):
    """The largest remainder gets the sample; of equal ones train before val before test."""
    samples = make_samples(dog=count)
    assert [len(split_samples(samples, split, *ratios)) for split in SPLITS] == expected


def test_order_of_the_list_and_other_classes_do_not_matter():
    """Who is in a split depends on class, file id and seed alone."""
    samples = make_samples(dog=30, drum=17)
    shuffled = random.Random(0).sample(samples, len(samples))
    assert sorted(ids(split_samples(shuffled, "val"))) == sorted(ids(split_samples(samples, "val")))
    dogs = [s for s in samples if s["class_name"] == "dog"]
    both = [s for s in split_samples(samples, "test") if s["class_name"] == "dog"]
    assert ids(split_samples(dogs, "test")) == ids(both)
    assert ids(split_samples(samples, "test", seed=1)) != ids(split_samples(samples, "test"))


def test_splits_are_the_same_in_every_release():
    """Golden values: a changed division would leak test clips into training."""
    samples = make_samples(dog=10, drum=4)
    assert ids(split_samples(samples, "test")) == GOLDEN_TEST
    assert ids(node_split(samples, 1, samples_per_node=2)) == GOLDEN_NODE


GOLDEN_TEST = ["video_00002:dog", "video_00009:dog", "video_00002:drum"]
GOLDEN_NODE = ["video_00000:dog", "video_00007:dog", "video_00002:drum", "video_00003:drum"]


def test_splits_are_the_same_in_another_process():
    """Nothing depends on the process's hash seed, and torch isn't imported."""
    code = (
        "import json, sys\n"
        "from lmdbcache.datasets import split_samples\n"
        "samples = [{'class_name': c, 'file_id': str(i)} for c in 'ab' for i in range(50)]\n"
        "found = [s['class_name'] + s['file_id'] for s in split_samples(samples, 'val')]\n"
        "print(json.dumps([found, 'torch' in sys.modules]))\n"
    )
    results = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code],
                env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
                capture_output=True,
                check=True,
                text=True,
            ).stdout
        )
        for seed in ("1", "2")
    ]
    assert results[0] == results[1]
    assert results[0][1] is False


@given(sizes=SIZES, num_nodes=st.integers(1, 7), seed=st.integers(0, 3))
def test_nodes_cover_everything_evenly(sizes, num_nodes, seed):
    """With num_nodes nodes are disjoint, cover all, and differ by at most one per class."""
    samples = make_samples(**sizes)
    nodes = [node_split(samples, node, num_nodes, seed=seed) for node in range(num_nodes)]
    assert sorted(flat(map(ids, nodes))) == sorted(ids(samples))
    for name in sizes:
        counts = [sum(s["class_name"] == name for s in node) for node in nodes]
        assert max(counts) - min(counts) <= 1


def test_samples_per_node_are_consecutive_ranks():
    """With K per node each node has K of every class, disjoint, and a late one is left short."""
    samples = make_samples(dog=10)
    nodes = [ids(node_split(samples, node, samples_per_node=4)) for node in range(4)]
    assert list(map(len, nodes)) == [4, 4, 2, 0]
    assert len(set(flat(nodes))) == 10
    halves = [ids(node_split(samples, node, samples_per_node=2)) for node in range(2)]
    assert set(nodes[0]) == set(flat(halves))


def test_short_nodes_are_told(caplog):
    """A class that runs out is named in the log."""
    node_split(make_samples(dog=3), 1, samples_per_node=2)
    assert "'dog'" in caplog.text


def test_splits_within_nodes_stay_disjoint():
    """No node trains on what another node tests on."""
    samples = make_samples(dog=40, drum=23)
    found = []
    for node in range(3):
        mine = node_split(samples, node, 3)
        found += [sample for split in SPLITS for sample in ids(split_samples(mine, split))]
    assert sorted(found) == sorted(ids(samples))


def test_ratios_are_normalised_with_a_warning(caplog):
    """7:1:2 means 0.7:0.1:0.2, and says so."""
    samples = make_samples(dog=20)
    with caplog.at_level(logging.WARNING):
        assert ids(split_samples(samples, "val", 7, 1, 2)) == ids(split_samples(samples, "val"))
    assert "sum to 10" in caplog.text


@pytest.mark.parametrize(("train", "val"), [(0.9, 0.1), (0.8, 0.2), (0.7, 0.3), (0.6, 0.4)])
def test_what_subtraction_leaves_of_a_ratio_is_zero(train, val, caplog):
    """1 - train - val is taken as 0 where it is -2.8e-17, by every split, without a warning."""
    samples = make_samples(dog=33, drum=7)
    for ratios in ((train, val, 1.0 - train - val), (train, 1.0 - train - val, val)):
        whole = tuple(0.0 if abs(ratio) < 1e-15 else ratio for ratio in ratios)
        for split, stratify in itertools.product(SPLITS, (True, False)):
            found = split_samples(samples, split, *ratios, stratify=stratify)
            assert found == split_samples(samples, split, *whole, stratify=stratify)
    assert not caplog.records


@pytest.mark.parametrize(
    "ratios", [(0, 0, 0), (1.0, 0.0, -1e-6), (-0.1, 0.5, 0.6), (float("nan"), 0, 1)]
)
def test_impossible_ratios_are_refused(ratios):
    """Negative, undefined and all-zero ratios raise."""
    with pytest.raises(DatasetError, match="train_ratio"):
        split_samples(make_samples(dog=3), "train", *ratios)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"node_split_id": 3, "num_nodes": 3}, "node_split_id"),
        ({"node_split_id": -1, "num_nodes": 3}, "node_split_id"),
        ({"node_split_id": 0, "num_nodes": 0}, "num_nodes"),
        ({"node_split_id": 0, "samples_per_node": 0}, "samples_per_node"),
        ({"node_split_id": 0.5, "num_nodes": 2}, "node_split_id"),
        ({"node_split_id": 0}, "samples_per_node"),
        ({"node_split_id": 0, "num_nodes": 2, "samples_per_node": 2}, "samples_per_node"),
    ],
)
def test_impossible_nodes_are_refused(arguments, named):
    """Node numbers out of range and contradictory arguments raise, naming the argument."""
    with pytest.raises(DatasetError, match=named):
        node_split(make_samples(dog=3), **arguments)


def test_unknown_split_is_refused():
    """A misspelled split raises instead of returning everything."""
    with pytest.raises(DatasetError, match="'valid'"):
        split_samples(make_samples(dog=3), "valid")

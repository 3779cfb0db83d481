"""`split_method="sklearn"`: the members that scikit-learn and NumPy's RandomState draw."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.model_selection import train_test_split

from lmdbcache.datasets import VEGASDataset, node_split, partition_samples, split_samples
from lmdbcache.datasets.splits import SPLITS
from lmdbcache.errors import DatasetError

CLASSES = ("siren", "bell", "rain")  # labels and names have different orders


def make(*sizes):
    return [
        {"class_name": CLASSES[label], "class_label": label, "file_id": f"video_{number:05d}"}
        for label, size in enumerate(sizes)
        for number in range(size)
    ]


def ids(samples):
    return [f"{sample['file_id']}:{sample['class_name']}" for sample in samples]


def shuffled(samples, seed=0):
    return random.Random(seed).sample(samples, len(samples))


def scaled(train, val, test):
    total = train + val + test
    near = 0.99 <= total <= 1.01
    return (train, val, test) if near else (train / total, val / total, test / total)


def stratified(samples, split, train, val, test, seed):
    """The procedure in a few lines, over samples in the order of label and file id."""
    rest, held_out = samples, []
    if test >= 1e-6:
        labels = [sample["class_label"] for sample in samples]
        rest, held_out = train_test_split(
            samples, test_size=test, stratify=labels, random_state=seed
        )
    parts = {"test": held_out, "train": rest, "val": []}
    if val >= 1e-6 and split != "test":
        labels = [sample["class_label"] for sample in rest]
        share = max(1e-6, min(1 - 1e-6, val / (train + val)))
        parts["train"], parts["val"] = train_test_split(
            rest, test_size=share, stratify=labels, random_state=seed
        )
    return parts[split]


def shuffled_by_class(samples, seed):
    generator, classes = np.random.RandomState(seed), {}
    for sample in samples:
        classes.setdefault(sample["class_name"], []).append(sample)
    for group in classes.values():
        group.sort(key=lambda sample: sample["file_id"])
        generator.shuffle(group)
    return list(classes.values())


def unstratified(samples, split, train, val, test, seed):
    found = []
    for group in shuffled_by_class(samples, seed):
        first = int(len(group) * train)
        last = first + int(len(group) * val)
        parts = {"train": group[:first], "val": group[first:last], "test": group[last:]}
        found += parts[split] if split != "test" or test >= 1e-6 else []
    return found


def node_of(samples, node, seed, *, num_nodes=None, samples_per_node=None):
    found = []
    for group in shuffled_by_class(samples, seed):
        size, rest = divmod(len(group), num_nodes) if num_nodes else (samples_per_node, 0)
        start = node * size + min(node, rest)
        found += group[start : start + size + (node < rest)]
    return found


SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=3)
SEEDS = st.one_of(st.integers(0, 60), st.integers(0, 2**32 - 1))
RATIOS = [
    (0.7, 0.1, 0.2),
    (0.9, 0.1, 1 - 0.9 - 0.1),
    (0.8, 0.2, 1 - 0.8 - 0.2),
    (0.7, 0.3, 1 - 0.7 - 0.3),
    (0.8, 0.0, 0.2),
    (1.0, 0.0, 0.0),
    (0.0, 0.5, 0.5),
    (1 / 3, 1 / 3, 1 / 3),
    (0.333, 0.333, 0.333),  # 0.999 is near enough to 1
    (7, 1, 2),
    (0.5, 0.2, 0.4),
    (0.5, 5e-7, 0.5),
    (0.5, 0.5, 5e-7),
]
NODES = st.one_of(
    st.fixed_dictionaries({"num_nodes": st.integers(4, 6)}),
    st.fixed_dictionaries({"samples_per_node": st.integers(1, 15)}),
)


def members(draw, *arguments, **options):
    """Sorted ids, or the class of the error."""
    try:
        return sorted(ids(draw(*arguments, **options)))
    except ValueError:
        return "refused"
    except DatasetError as error:
        return "refused" if isinstance(error.__cause__, ValueError) else error


def as_drawn_today(samples, split, *ratios, **options):
    return split_samples(shuffled(samples), split, *ratios, split_method="sklearn", **options)


@settings(max_examples=200, deadline=None)
@given(sizes=SIZES, split=st.sampled_from(SPLITS), ratios=st.sampled_from(RATIOS), seed=SEEDS)
def test_stratified_splits_are_those_of_scikit_learn(sizes, split, ratios, seed):
    """The same members, or both refuse; in any order of the list."""
    samples = make(*sizes)
    found = members(as_drawn_today, samples, split, *ratios, seed=seed)
    assert found == (members(stratified, samples, split, *scaled(*ratios), seed) if samples else [])


@settings(max_examples=200, deadline=None)
@given(sizes=SIZES, split=st.sampled_from(SPLITS), ratios=st.sampled_from(RATIOS), seed=SEEDS)
def test_splits_without_stratify_are_those_of_numpy(sizes, split, ratios, seed):
    """A shuffle of each class by one generator, shares rounded down."""
    samples = make(*sizes)
    found = members(as_drawn_today, samples, split, *ratios, stratify=False, seed=seed)
    assert found == members(unstratified, samples, split, *scaled(*ratios), seed)


@settings(deadline=None)
@given(sizes=SIZES, seed=SEEDS, node=st.integers(0, 3), chosen=NODES)
def test_nodes_are_those_of_numpy(sizes, seed, node, chosen):
    """Evenly or so many of each class; also after the list is shuffled."""
    samples = make(*sizes)
    found = node_split(shuffled(samples), node, seed=seed, split_method="sklearn", **chosen)
    assert sorted(ids(found)) == sorted(ids(node_of(samples, node, seed, **chosen)))
    if num_nodes := chosen.get("num_nodes"):
        parts = partition_samples(samples, num_nodes, seed=seed, split_method="sklearn")
        assert sorted(ids(parts[node])) == sorted(ids(found))


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(20, 60), min_size=1, max_size=3),
    seed=SEEDS,
    node=st.integers(0, 3),
    chosen=NODES,
    split=st.sampled_from(SPLITS),
    stratify=st.booleans(),
)
def test_splits_of_a_node_are_drawn_from_its_shuffle(sizes, seed, node, chosen, split, stratify):
    """scikit-learn draws from the order that the node's shuffle left."""
    samples = make(*sizes)
    mine = node_split(samples, node, seed=seed, split_method="sklearn", **chosen)
    theirs = node_of(samples, node, seed, **chosen)
    found = members(as_drawn_today, mine, split, stratify=stratify, seed=42 + node)
    procedure = stratified if stratify else unstratified
    expected = members(procedure, theirs, split, 0.7, 0.1, 0.2, 42 + node) if theirs else []
    assert found == expected


def test_a_node_without_its_ranks_would_be_divided_otherwise():
    """The rank is what the comparison above rests on."""
    mine = node_split(make(60, 60), 0, 2, split_method="sklearn")
    bare = [{key: value for key, value in each.items() if key != "node_rank"} for each in mine]
    parts = [set(ids(split_samples(each, "test", split_method="sklearn"))) for each in (mine, bare)]
    assert parts[0] != parts[1]
    assert all("node_rank" not in sample for sample in node_split(make(60, 60), 0, 2))


def test_members_written_down():
    """No later version of scikit-learn or NumPy moves a clip unseen."""
    samples = make(10, 6)
    found = split_samples(samples, "test", split_method="sklearn")
    assert ids(found) == [*(f"video_0000{n}:siren" for n in (3, 4, 7)), "video_00004:bell"]
    found = split_samples(samples, "test", stratify=False, split_method="sklearn")
    assert ids(found) == [f"video_0000{n}" for n in ("3:siren", "6:siren", "2:bell", "5:bell")]
    found = node_split(samples, 1, 3, split_method="sklearn")
    assert ids(found) == [
        f"video_0000{n}" for n in ("2:siren", "7:siren", "9:siren", "0:bell", "4:bell")
    ]


def test_all_splits_are_disjoint_and_cover():
    """With a test part; without one rounding leaves a few samples in no split."""
    samples = make(31, 17, 23)
    for stratify in (True, False):
        parts = [
            split_samples(samples, split, stratify=stratify, split_method="sklearn")
            for split in SPLITS
        ]
        assert sorted(ids(itertools.chain(*parts))) == sorted(ids(samples))
        for part in parts:
            assert ids(part) == [each for each in ids(samples) if each in set(ids(part))]
    counts = Counter(sample["class_name"] for sample in parts[0])
    assert counts == {"siren": 21, "bell": 11, "rain": 16}
    assert split_samples(samples, "all", split_method="sklearn") == samples
    assert split_samples([], "test", split_method="sklearn") == []


def test_without_labels_classes_are_in_the_order_of_their_names():
    """A sample needs `class_name` and `file_id` only."""
    samples = [{"class_name": name, "file_id": str(n)} for name in "cab" for n in range(9)]
    labeled = [{**each, "class_label": "abc".index(each["class_name"])} for each in samples]
    for draw in (
        lambda samples: split_samples(samples, "val", split_method="sklearn"),
        lambda samples: split_samples(samples, "val", stratify=False, split_method="sklearn"),
        lambda samples: node_split(samples, 0, 2, split_method="sklearn"),
    ):
        assert ids(draw(samples)) == ids(draw(labeled))


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("split_method", lambda: split_samples(make(9), "all", split_method="random")),
        ("split_method", lambda: node_split(make(9), 0, 2, split_method="")),
        ("split_method", lambda: node_split(make(9), 0, None, 2, split_method="x")),
        ("split_method", lambda: partition_samples(make(9), 2, split_method="Sklearn")),
        (
            "split_method",
            lambda: partition_samples(
                make(9), 2, by="share", shares=[1, 1], split_method="sklearn"
            ),
        ),
        (
            "split_method",
            lambda: partition_samples(
                make(9), 2, by="dirichlet", alpha=1.0, split_method="sklearn"
            ),
        ),
        (
            "split_method",
            lambda: partition_samples(make(9), 2, min_samples=1, split_method="sklearn"),
        ),
        ("seed", lambda: split_samples(make(9), "test", seed=-1, split_method="sklearn")),
        ("seed", lambda: node_split(make(9), 0, 2, seed=2**32, split_method="sklearn")),
        ("seed", lambda: split_samples(make(9), "val", seed=0.5, split_method="sklearn")),
        ("test_ratio", lambda: split_samples(make(9, 1), "train", split_method="sklearn")),
        ("test_ratio", lambda: split_samples(make(9), "test", 0, 0, 1, split_method="sklearn")),
        (
            "val_ratio",
            lambda: split_samples(make(9), "train", 0, 0.5, 0.5, split_method="sklearn"),
        ),
    ],
)
def test_refusals_name_the_argument(argument, call):
    """What scikit-learn or NumPy refuses is an error of this package."""
    with pytest.raises(DatasetError, match=f"^{argument}: "):
        call()


@pytest.fixture(scope="module")
def vegas(tmp_path_factory):
    """Three classes of 40, 31 and 24 files, which nothing decodes."""
    root = tmp_path_factory.mktemp("data") / "VEGAS"
    for name, size in (("baby_cry", 40), ("dog", 31), ("water_flowing", 24)):
        (root / name / "audios").mkdir(parents=True)
        for number in range(size):
            (root / name / "audios" / f"video_{number:05d}.wav").write_bytes(b"RIFF")
    return root


@pytest.mark.parametrize(
    ("arguments", "ratios"),
    [
        ({}, (0.7, 0.1, 0.2)),
        ({"stratify": False}, (0.7, 0.1, 0.2)),
        ({"train_ratio": 0.9, "test_ratio": 1 - 0.9 - 0.1}, (0.9, 0.1, 0.0)),
        ({"train_ratio": 0.8, "val_ratio": 0.2, "test_ratio": 1 - 0.8 - 0.2}, (0.8, 0.2, 0.0)),
        ({"num_samples_per_class": 20, "selected_classes": ["dog", 0]}, (0.7, 0.1, 0.2)),
        # The ratios that a deprecated one gave there; their sum is 1.02.
        ({"split_ratio": 0.8}, (0.8 * 0.9, 0.1, 1 - 0.8)),
        ({"split_ratio": 0.8, "stratify": False}, (0.8 * 0.9, 0.1, 1 - 0.8)),
        ({"split_ratio": 0.8, "train_ratio": 0.6}, (0.6, 0.1, 1 - 0.8)),
        ({"splits_to_load": ["train", "val"]}, (0.7, 0.1, 0.2)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "nodes",
    [
        {},
        {"node_split_id": 2},  # no division, another seed
        {"node_split_id": 1, "num_nodes": 2},
        {"node_split_id": 1, "samples_per_node": 11, "node_split_seed": 7},
    ],
    ids=str,
)
def test_parts_of_vegas(vegas, arguments, ratios, nodes):
    """Nodes first, then train, val and test with the seed 42 + node, of what is selected."""
    dataset = VEGASDataset(vegas, split_method="sklearn", **arguments, **nodes)
    samples = VEGASDataset(
        vegas, split="all", selected_classes=arguments.get("selected_classes")
    ).samples
    most = arguments.get("num_samples_per_class")
    if most and "samples_per_node" not in nodes:
        samples = [each for each in samples if int(each["file_id"][-5:]) < most]
    division, seed = dict(nodes), nodes.get("node_split_seed", 42)
    node = division.pop("node_split_id", 0)
    division.pop("node_split_seed", None)
    if division:
        samples = node_of(samples, node, seed, **division)
    procedure = stratified if arguments.get("stratify", True) else unstratified
    wanted = arguments.get("splits_to_load", SPLITS)
    expected = {
        split: sorted(ids(procedure(samples, split, *ratios, 42 + node))) * (split in wanted)
        for split in SPLITS
    }
    found = {split: sorted(getattr(dataset, split).sample_ids) for split in SPLITS}
    assert found == expected
    if "splits_to_load" not in arguments:
        assert sorted(dataset.sample_ids) == sorted(ids(samples))


def test_vegas_without_the_method_has_hash_splits(vegas):
    """The default stays; another method is refused at once."""
    default = VEGASDataset(vegas, split="test", node_split_id=1, num_nodes=2)
    by_hash = VEGASDataset(vegas, split="test", node_split_id=1, num_nodes=2, split_method="hash")
    drawn = VEGASDataset(vegas, split="test", node_split_id=1, num_nodes=2, split_method="sklearn")
    assert default.sample_ids == by_hash.sample_ids != drawn.sample_ids
    drawn.selected_classes = ["dog"]
    again = VEGASDataset(
        vegas, ["dog"], split="test", node_split_id=1, num_nodes=2, split_method="sklearn"
    )
    assert drawn.sample_ids == again.sample_ids
    with pytest.raises(DatasetError, match="^split_method: "):
        VEGASDataset(vegas, split="all", split_method="random")


def test_without_scikit_learn():
    """The extra is named; what RandomState draws doesn't need it, nor does the other method."""
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from lmdbcache.datasets import node_split, split_samples\n"
        "from lmdbcache.errors import MissingDependencyError\n"
        "samples = [{'class_name': 'bell', 'file_id': str(n)} for n in range(9)]\n"
        "assert node_split(samples, 0, 2, split_method='sklearn')\n"
        "assert split_samples(samples, 'test', stratify=False, split_method='sklearn')\n"
        "assert split_samples(samples, 'test')\n"
        "try: split_samples(samples, 'test', split_method='sklearn')\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert '"lmdbcache[sklearn]"' in done.stdout

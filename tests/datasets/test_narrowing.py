"""One set of rules for a part of any dataset."""

from __future__ import annotations

import itertools

import pytest
from synthetic_layouts import make_esc50, make_vggsound, tone, write_audio

from lmdbcache.datasets import (
    Narrowing,
    VEGASDataset,
    node_split,
    open_dataset,
    split_names,
    split_samples,
    split_source,
)
from lmdbcache.errors import DatasetError


@pytest.fixture(scope="module")
def vegas(tmp_path_factory):
    """Three classes of ten clips; not to be changed."""
    root = tmp_path_factory.mktemp("data") / "VEGAS"
    for name in ("baby_cry", "dog", "drum"):
        for number in range(10):
            write_audio(root / name / "audios" / f"video_{number:05d}.wav", tone(name, number))
    return root


@pytest.fixture(scope="module")
def esc50(tmp_path_factory):
    return open_dataset(make_esc50(tmp_path_factory.mktemp("data") / "ESC-50"))


NARROWED = [
    {"num_samples_per_class": 4, "split": "train"},
    {"selected_classes": ["dog", 3], "split": "val"},
    {"excluded_classes": ["dog"], "num_samples_per_class": 7},
    {"node_split_id": 1, "num_nodes": 3, "split": "test"},
    {"node_split_id": 1, "samples_per_node": 2, "num_samples_per_class": 1},
    {"node_split_id": 0, "num_nodes": 2, "split": "train", "selected_classes": ["drum"]},
]
OTHER_NAMES = {
    "selected_classes": "classes",
    "excluded_classes": "exclude",
    "num_samples_per_class": "samples_per_class",
}


@pytest.mark.parametrize("arguments", NARROWED, ids=str)
def test_vegas_is_narrowed_as_ever(vegas, arguments):
    """The rules for all datasets give what VEGASDataset gives by its own arguments."""
    expected = VEGASDataset(vegas, **{"split": "all", **arguments}).sample_ids
    narrowing = Narrowing(**{OTHER_NAMES.get(k, k): v for k, v in arguments.items()})
    found = [f"{s['file_id']}:{s['class_name']}" for s in narrowing.of(open_dataset(vegas))]
    assert found == expected != []


def test_vegas_splits_and_nodes_are_those_of_the_first_release(vegas):
    """Written down, so that no later change moves a clip unseen."""
    dataset = open_dataset(vegas)
    assert _ids(Narrowing(split="test").of(dataset)) == [
        "video_00000:baby_cry",
        "video_00003:baby_cry",
        "video_00002:dog",
        "video_00009:dog",
        "video_00002:drum",
        "video_00003:drum",
    ]
    assert _ids(Narrowing(node_split_id=1, num_nodes=5).of(dataset)) == [
        "video_00006:baby_cry",
        "video_00009:baby_cry",
        "video_00000:dog",
        "video_00007:dog",
        "video_00005:drum",
        "video_00007:drum",
    ]


@pytest.mark.parametrize("chosen", [{"num_nodes": 2}, {"samples_per_node": 5}])
def test_splits_and_nodes_of_scikit_learn(vegas, chosen):
    """Both are drawn by `split_method`; each node's splits have a seed of their own."""
    dataset, method = open_dataset(vegas), {"split_method": "sklearn"}
    for split in ("train", "val", "test"):
        found = _ids(Narrowing(split=split, **method).of(dataset))
        assert found == _ids(split_samples(dataset.samples, split, seed=42, **method))
        assert found != _ids(Narrowing(split=split).of(dataset))
    # Of 15 clips of three classes scikit-learn draws no val.
    nodes = Narrowing(split="test", **{"num_nodes": 2, **chosen}, **method).nodes_of(dataset)
    for node in range(2):
        mine = node_split(dataset.samples, node, seed=42, **chosen, **method)
        expected = _ids(split_samples(mine, "test", seed=42 + node, **method))
        one = Narrowing(split="test", node_split_id=node, **chosen, **method)
        assert _ids(nodes[node]) == _ids(one.of(dataset)) == expected


def test_folds_stay_folds_with_scikit_learn(esc50):
    """The method is one of nodes and ratios; others than those that exist are refused."""
    for split in ("all", "test"):
        one = Narrowing(split=split, split_method="sklearn").of(esc50)
        assert _ids(one) == _ids(Narrowing(split=split).of(esc50))
    for wrong in ({"split_method": "magic"}, {"split_method": "sklearn", "dirichlet": 0.5}):
        with pytest.raises(DatasetError, match="^split_method: "):
            Narrowing(**wrong, node_split_id=0, num_nodes=2).of(esc50)


def test_classes_by_name_in_any_case_and_by_label(esc50):
    """Names in any case and labels choose; labels are those of the whole dataset."""
    for chosen in (["Hand_Saw", "rain"], [49, 10], ["hand_saw", 10]):
        samples = Narrowing(classes=chosen).of(esc50)
        assert {(s["class_name"], s["class_label"]) for s in samples} == {
            ("hand_saw", 49),
            ("rain", 10),
        }
    for wrong in ("cow", 5, True, 1.5):
        with pytest.raises(DatasetError, match=r"dog \(0\)"):
            Narrowing(classes=[wrong]).of(esc50)


def test_classes_without_clips_are_told(vegas, caplog):
    """Some that are empty are a warning, nothing but empty ones an error."""
    dataset = open_dataset(vegas)
    Narrowing(classes=["dog", "printer"]).of(dataset)
    assert "printer" in caplog.text
    with pytest.raises(DatasetError, match="printer, snoring"):
        Narrowing(classes=["printer", "snoring"]).of(dataset)
    with pytest.raises(DatasetError):
        Narrowing(classes=["dog"], exclude=["dog"]).of(dataset)


def test_where_splits_come_from(esc50, vegas, tmp_path):
    """The dataset's own before its folds before ratios, unless said otherwise."""
    vggsound = open_dataset(make_vggsound(tmp_path / "VGGSound"))
    assert [split_source(d.samples) for d in (vggsound, esc50, open_dataset(vegas))] == [
        "own",
        "folds",
        "ratios",
    ]
    assert split_names(vggsound.samples) == ("train", "test")
    with pytest.raises(DatasetError, match="^split_by: "):
        Narrowing(split_by="own").of(esc50)
    with pytest.raises(DatasetError, match="^split_by: "):
        Narrowing(split_by="magic").of(esc50)
    with pytest.raises(DatasetError, match="^split: "):
        Narrowing(split="dev").of(esc50)


def test_two_folds_are_too_few_for_splits(tmp_path):
    """With fewer than three folds a split by folds is refused, folds aren't."""
    root = make_esc50(tmp_path / "x")
    for path in (root / "audio").iterdir():
        if path.name[0] not in "12":
            path.unlink()
    dataset = open_dataset(root)
    with pytest.raises(DatasetError, match="^split: "):
        Narrowing(split="train").of(dataset)
    assert len(Narrowing(folds=[2]).of(dataset)) == 6


def test_narrowing_together(esc50):
    """Classes, node, folds and split together are the intersection of each alone."""
    chosen = {"classes": ["dog", "rain"], "folds": [1, 2, 4], "split": "train"}
    ids = [set(_ids(Narrowing(**{k: v}).of(esc50))) for k, v in chosen.items()]
    nodes = [
        set(_ids(Narrowing(**chosen, node_split_id=k, num_nodes=2).of(esc50))) for k in range(2)
    ]
    assert nodes[0] | nodes[1] == set.intersection(*ids)
    assert not nodes[0] & nodes[1]


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_no_samples_per_class_is_no_choice(esc50, number):
    """Less than one of each class would mean none, and not all of them."""
    with pytest.raises(DatasetError, match="samples_per_class"):
        Narrowing(samples_per_class=number).of(esc50)


def test_half_a_choice_of_nodes_is_refused(esc50):
    """A number of nodes without this node, or the reverse, would take everything unseen."""
    for wrong, named in (
        ({"num_nodes": 3}, "node_split_id"),
        ({"samples_per_node": 3}, "node_split_id"),
        ({"dirichlet": 0.5, "num_nodes": 3}, "node_split_id"),
        ({"node_split_id": 1}, "num_nodes.*samples_per_node"),
        ({"node_split_id": 1, "dirichlet": 0.5}, "num_nodes"),
        ({"node_split_id": 3, "num_nodes": 3}, "node_split_id"),
        ({"node_split_id": 3, "num_nodes": 3, "dirichlet": 1.0}, "node_split_id"),
        (
            {"node_split_id": 0, "num_nodes": 2, "dirichlet": 1.0, "node_shares": [1, 1]},
            "dirichlet",
        ),
        (
            {"node_split_id": 0, "num_nodes": 2, "samples_per_node": 2, "dirichlet": 1.0},
            "samples_per_node",
        ),
    ):
        with pytest.raises(DatasetError, match=named):
            Narrowing(**wrong).of(esc50)


def test_every_rule_gives_disjoint_nodes_that_cover(esc50):
    """By count, by share and by Dirichlet, beside any split."""
    for rule, split in itertools.product(
        ({}, {"node_shares": [3, 1]}, {"dirichlet": 0.3}, {"min_per_node": 9}), ("all", "train")
    ):
        nodes = Narrowing(num_nodes=2, split=split, **rule).nodes_of(esc50)
        whole = _ids(Narrowing(split=split).of(esc50))
        assert sorted(_ids(nodes[0]) + _ids(nodes[1])) == sorted(whole)
    with pytest.raises(DatasetError, match="num_nodes"):
        Narrowing().nodes_of(esc50)


def _ids(samples):
    return [f"{sample['file_id']}:{sample['class_name']}" for sample in samples]

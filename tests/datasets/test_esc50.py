"""ESC-50 as it is published."""

from __future__ import annotations

import pytest
from synthetic_layouts import ESC50_CLASSES, make_esc50

from lmdbcache.datasets import Narrowing
from lmdbcache.datasets.esc50 import ESC50Folder
from lmdbcache.errors import DatasetError


@pytest.fixture
def root(tmp_path):
    """Six classes, one clip in each of five folds."""
    return make_esc50(tmp_path / "ESC-50")


def rewrite(root, old, new):
    table = root / "meta" / "esc50.csv"
    table.write_text(table.read_text("utf-8").replace(old, new), "utf-8")


def test_samples_are_the_tables(root):
    """File id, class, label and fold are those of the table."""
    dataset = ESC50Folder(root)
    assert len(dataset.samples) == 30
    assert dataset.class_labels == {name: target for name, (target, _) in ESC50_CLASSES.items()}
    by_id = dict(zip(dataset.sample_ids, dataset.samples, strict=True))
    sample = by_id["3-103049-A-49:hand_saw"]
    assert (sample["class_label"], sample["fold"], sample["esc10"]) == (49, 3, False)
    assert sample["audio_path"] == str(root / "audio" / "3-103049-A-49.wav")
    assert by_id["1-101000-A-0:dog"]["esc10"] is True


def test_listed_files_that_are_missing_are_left_out_and_named(root):
    """A partial download is used; labels stay, and each missing file is listed."""
    before = ESC50Folder(root).class_labels
    for fold in range(1, 6):
        (root / "audio" / f"{fold}-{100000 + 1000 * fold}-A-0.wav").unlink()
    dataset = ESC50Folder(root)
    assert len(dataset.samples) == 25
    assert dataset.class_labels == before
    assert {item.reason for item in dataset.left_out} == {"listed, but not on disk"}
    assert str(root / "audio" / "1-101000-A-0.wav") in {item.name for item in dataset.left_out}
    assert "5 left out: listed, but not on disk" in str(dataset)


def test_splits_go_by_fold(root):
    """Fold 5 is test, fold 4 val, the others train; clips of one recording share a fold."""
    dataset = ESC50Folder(root)
    folds = {
        split: {sample["fold"] for sample in Narrowing(split=split).of(dataset)}
        for split in ("train", "val", "test")
    }
    assert folds == {"train": {1, 2, 3}, "val": {4}, "test": {5}}
    assert {s["fold"] for s in Narrowing(folds=[1, 2]).of(dataset)} == {1, 2}
    with pytest.raises(DatasetError, match="^folds: 6"):
        Narrowing(folds=[1, 6]).of(dataset)
    drawn = Narrowing(split="test", split_by="ratios").of(dataset)
    assert len({sample["fold"] for sample in drawn}) > 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("filename,fold", "file,fold", "has no column filename"),
        (",49,hand_saw", ",x,hand_saw", "target 'x' isn't a whole number"),
        ("3-103049-A-49.wav,3,49,", "3-103049-A-49.wav,3,48,", "'hand_saw' has target 48"),
        ("3-103049-A-49.wav,3,", "3-103049-A-49.wav,three,", "fold 'three'"),
        ("3-103049-A-49.wav,3,49,hand_saw", "3-103049-A-49.wav,3,49,", "line 19: not every one"),
        ("hand_saw", "Dog", "'dog' and 'Dog' have one name"),
    ],
)
def test_a_table_that_cannot_be_used(root, old, new, words):
    """The file, the line and what is wrong are named."""
    rewrite(root, old, new)
    with pytest.raises(DatasetError, match="esc50.csv|ESC-50") as caught:
        ESC50Folder(root)
    assert words in str(caught.value)


def test_bytes_that_are_no_text(root):
    """A table that isn't UTF-8 is named."""
    (root / "meta" / "esc50.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="esc50.csv"):
        ESC50Folder(root)


def test_a_row_listed_twice(root):
    """Two rows for one clip are refused, naming it."""
    table = root / "meta" / "esc50.csv"
    text = table.read_text("utf-8")
    table.write_text(text + text.splitlines()[1] + "\n", "utf-8")
    with pytest.raises(DatasetError, match="1-101000-A-0:dog"):
        ESC50Folder(root)


def test_no_clip_at_all(root):
    """Nothing of what is listed on disk is an error, not an empty dataset."""
    for path in (root / "audio").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match="esc50"):
        ESC50Folder(root)

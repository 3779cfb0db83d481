"""VGGSound as it is published, with videos that are gone."""

from __future__ import annotations

import shutil

import pytest
from synthetic_layouts import VGGSOUND_CLASSES, make_vggsound

from lmdbcache.datasets import Narrowing
from lmdbcache.datasets.splits import SPLITS
from lmdbcache.datasets.vggsound import VGGSoundFolder
from lmdbcache.errors import DatasetError


@pytest.fixture
def root(tmp_path):
    """Three classes of four clips, and two listed clips that aren't there."""
    return make_vggsound(tmp_path / "VGGSound")


def test_samples_are_the_tables(root):
    """File id, class with its comma and brackets, split, id and second are the table's."""
    dataset = VGGSoundFolder(root)
    assert len(dataset.samples) == 12
    assert dataset.class_labels == {name: n for n, name in enumerate(sorted(VGGSOUND_CLASSES))}
    by_id = dict(zip(dataset.sample_ids, dataset.samples, strict=True))
    sample = by_id["--CXy-Zw003_000032:child speech, kid speaking"]
    assert (sample["ytid"], sample["start_second"], sample["split"]) == (
        "--CXy-Zw003",
        32.0,
        "test",
    )
    assert sample["audio_path"].endswith("--CXy-Zw003_000032.wav")


def test_missing_videos_are_counted_and_listed(root):
    """What the table lists and the disk lacks is left out by name, not an error."""
    dataset = VGGSoundFolder(root)
    assert [(item.name, item.reason) for item in dataset.left_out] == [
        ("gone0000000_000030:people marching", "listed, but not on disk"),
        ("gone0000001_000030:people marching", "listed, but not on disk"),
    ]
    shutil.rmtree(root / "audio")
    with pytest.raises(DatasetError):
        VGGSoundFolder(root)


def test_labels_do_not_depend_on_what_is_on_disk(root):
    """A class whose videos are all gone keeps its place among the labels."""
    before = VGGSoundFolder(root).class_labels
    for path in (root / "audio").glob("--A*"):
        path.unlink()
    after = VGGSoundFolder(root)
    assert after.class_labels == before
    assert len(after.samples) == 8


def test_its_own_splits_are_used(root):
    """train and test are the table's; a val is only drawn by ratios, when asked for."""
    dataset = VGGSoundFolder(root)
    assert len(Narrowing(split="train").of(dataset)) == 9
    assert {sample["split"] for sample in Narrowing(split="test").of(dataset)} == {"test"}
    with pytest.raises(DatasetError, match="^split: .*'train', 'test'"):
        Narrowing(split="val").of(dataset)
    drawn = {split: Narrowing(split=split, split_by="ratios").of(dataset) for split in SPLITS}
    assert sum(map(len, drawn.values())) == 12
    assert {sample["split"] for sample in drawn["train"]} == {"train", "test"}


def test_a_table_elsewhere_with_headings_and_repeats(root, tmp_path):
    """A line of headings, repeated rows, empty lines and fractions of seconds are understood."""
    rows = (root / "vggsound.csv").read_text("utf-8").splitlines()
    rows[0] = rows[0].replace(",0,", ",0.0,")
    (root / "vggsound.csv").unlink()
    table = tmp_path / "list.csv"
    table.write_text("\n".join(["ytid,start,label,split", rows[0], "", *rows]), "utf-8")
    with pytest.raises(DatasetError, match="`table`"):
        VGGSoundFolder(root)
    assert len(VGGSoundFolder(root, table=table).samples) == 12


def test_files_in_folders_by_split(root):
    """Files lie in the root or in folders right below; other files don't matter."""
    (root / "train").mkdir()
    for path in sorted((root / "audio").glob("*0000*"))[:3]:
        path.rename(root / "train" / path.name)
    (root / "audio" / "--CXy-Zw001_000012.wav").rename(root / "--CXy-Zw001_000012.wav")
    (root / "train" / "unlisted.wav").write_text("")
    (root / "audio" / "unlisted.wav").write_text("")
    assert len(VGGSoundFolder(root).samples) == 12


def test_two_files_for_one_clip(root):
    """The same clip in two folders or formats is refused, naming both."""
    (root / "old").mkdir()
    shutil.copy(root / "audio" / "--AXy-Zw001_000010.wav", root / "old")
    with pytest.raises(DatasetError, match="audio/--AXy.*old/--AXy"):
        VGGSoundFolder(root)


@pytest.mark.parametrize(
    "row", ["abc,ten,dog,train", "abc,10", ",10,dog,train", "abc,10,,test", "a,1,b,train,more"]
)
def test_a_row_that_cannot_be_used(root, row):
    """The file and the line are named."""
    with (root / "vggsound.csv").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(DatasetError, match="vggsound.csv, line 15: "):
        VGGSoundFolder(root)


def test_a_class_with_a_colon_is_left_out_and_named(root):
    """A class that can't be part of a sample id costs its own clips only."""
    text = (root / "vggsound.csv").read_text("utf-8")
    (root / "vggsound.csv").write_text(text.replace("police car (siren)", "car: police"), "utf-8")
    dataset = VGGSoundFolder(root)
    assert len(dataset.samples) == 8
    assert sum("holds a colon" in item.reason for item in dataset.left_out) == 4
    # One line for all of these, with one of them as an example.
    assert "4 left out: no sample id, such as " in str(dataset)
    assert str(dataset).count("holds a colon") == 1

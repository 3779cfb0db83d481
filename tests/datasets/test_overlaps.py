"""Clips that two parts share are found, by name and by content."""

from __future__ import annotations

import json
import shutil

from lmdbcache.datasets import overlap_audit


def samples(folder, *names):
    return [
        {"file_id": name, "class_name": "dog", "audio_path": str(folder / f"{name}.wav")}
        for name in names
    ]


def test_disjoint_parts(tmp_path):
    """Nothing shared: said in one line."""
    report = overlap_audit([samples(tmp_path, "a"), samples(tmp_path, "b"), []])
    assert report.is_disjoint
    assert str(report) == "no two of 3 parts share a sample id"
    assert report.to_dict()["sizes"] == {"part 0": 1, "part 1": 1, "part 2": 0}


def test_shared_sample_ids(tmp_path):
    """Each pair of parts is named with what it shares, in any spelling of the id."""
    parts = {"node 0": samples(tmp_path, "a", "b"), "node 1": samples(tmp_path, "b", "c")}
    parts["node 2"] = [{**samples(tmp_path, "b")[0], "class_name": "DOG"}]
    report = overlap_audit(parts)
    assert not report.is_disjoint
    assert [(o.first, o.second, o.samples) for o in report.overlaps] == [
        ("node 0", "node 1", (("b:dog", "b:dog"),)),
        ("node 0", "node 2", (("b:dog", "b:dog"),)),
        ("node 1", "node 2", (("b:dog", "b:dog"),)),
    ]
    assert "node 0 and node 1 share by sample id: b:dog" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["overlaps"][0]["samples"] == [["b:dog"] * 2]


def test_equal_content_under_two_names(tmp_path, write_clip):
    """The same bytes as train/x and test/y are found when content is compared, and only then."""
    for number, name in enumerate("abc"):
        write_clip(tmp_path / f"{name}.wav", 200 + 50 * number)
    shutil.copy(tmp_path / "a.wav", tmp_path / "copy.wav")
    parts = {"train": samples(tmp_path, "a", "b"), "test": samples(tmp_path, "c", "copy")}
    assert overlap_audit(parts).is_disjoint
    report = overlap_audit(parts, by_content=True)
    (overlap,) = report.overlaps
    assert (overlap.by, overlap.samples) == ("content", (("a:dog", "copy:dog"),))
    assert str(report) == "train and test share by content: a:dog = copy:dog"


def test_a_shared_sample_is_named_once(tmp_path, write_clip):
    """Its content is equal, of course: that isn't said again."""
    write_clip(tmp_path / "a.wav")
    report = overlap_audit([samples(tmp_path, "a"), samples(tmp_path, "a")], by_content=True)
    assert [overlap.by for overlap in report.overlaps] == ["sample_id"]


def test_files_that_cannot_be_read_are_named(tmp_path, write_clip):
    """A missing file and a folder aren't equal to each other, and are told."""
    write_clip(tmp_path / "a.wav")
    (tmp_path / "b.wav").mkdir()
    report = overlap_audit(
        [samples(tmp_path, "a", "b"), samples(tmp_path, "gone")], by_content=True
    )
    assert report.is_disjoint
    assert report.unreadable == ("b:dog", "gone:dog")
    assert "2 clips couldn't be read: b:dog, gone:dog" in str(report)


def test_many_are_counted(tmp_path):
    """The text names a few and counts the rest; the dict has all."""
    part = samples(tmp_path, *map(str, range(50)))
    report = overlap_audit([part, part])
    assert "45 more" in str(report)
    assert len(report.to_dict()["overlaps"][0]["samples"]) == 50

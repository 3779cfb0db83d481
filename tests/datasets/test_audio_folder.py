"""A plain folder: what is a clip, what is its class, and what it is called."""

from __future__ import annotations

import os
import unicodedata

import pytest
from synthetic_layouts import make_audio_folder, tone, write_audio

from lmdbcache.datasets import Narrowing
from lmdbcache.datasets.audio_folder import AudioFolder
from lmdbcache.errors import DatasetError


@pytest.fixture
def root(tmp_path):
    """Three classes of five clips."""
    return make_audio_folder(tmp_path / "sounds")


def write(path):
    return write_audio(path, tone("x"))


def test_four_formats_and_a_deeper_folder(root):
    """wav, flac, ogg and mp3 are clips; a deeper file's id has its folder in it."""
    dataset = AudioFolder(root)
    ids = [sample_id for sample_id in dataset.sample_ids if sample_id.endswith(":bell")]
    assert ids == [*(f"clip_{n}:bell" for n in range(4)), "more/clip_0:bell"]
    assert dataset.class_labels == {"bell": 0, "siren": 1, "wind": 2}
    assert dataset.left_out == []


def test_hidden_names_and_other_suffixes_are_ignored(root):
    """Neither hidden files and folders nor other files are clips or classes."""
    before = AudioFolder(root).sample_ids
    write(root / "bell" / ".hidden.wav")
    write(root / ".git" / "x.wav")
    write(root / "bell" / ".cache" / "x.wav")
    for name in ("notes.txt", "clip_9.mp4", "wav", ".wav"):
        (root / "bell" / name).write_text("")
    (root / "docs").mkdir()
    (root / "docs" / "readme.txt").write_text("")
    dataset = AudioFolder(root)
    assert dataset.sample_ids == before
    assert "docs" not in dataset.class_labels


def test_equal_stems_do_not_collide_silently(root):
    """dog/a/1.wav and dog/b/1.wav are two clips; dog/1.wav and dog/1.flac are refused by name."""
    write(root / "bell" / "a" / "1.wav")
    write(root / "bell" / "b" / "1.wav")
    assert {"a/1:bell", "b/1:bell"} <= set(AudioFolder(root).sample_ids)
    write(root / "bell" / "a" / "1.flac")
    with pytest.raises(DatasetError, match=r"bell/a/1.flac.*bell/a/1.wav"):
        AudioFolder(root)


def test_two_classes_of_one_name(root):
    """Class folders that differ in case only are refused."""
    write(root / "Bell" / "other.wav")
    with pytest.raises(DatasetError, match="'Bell'.*'bell'"):
        AudioFolder(root)


def test_unicode_and_spaces(tmp_path):
    """Names in any script, decomposed too, are brought to the form of a sample id."""
    decomposed = unicodedata.normalize("NFD", "Café Ärger")
    write(tmp_path / "s" / decomposed / f"naïve {decomposed}.wav")
    write(tmp_path / "s" / "狗" / "一 二.wav")
    dataset = AudioFolder(tmp_path / "s")
    assert dataset.sample_ids == ["naïve Café Ärger:café ärger", "一 二:狗"]
    assert all(os.path.exists(sample["audio_path"]) for sample in dataset.samples)


def test_names_that_are_not_utf8_are_left_out_and_named(root):
    """Such a file, or a whole class of such a name, is left out; the rest is used."""
    before = AudioFolder(root).sample_ids
    try:
        write(root / "bell" / os.fsdecode(b"caf\xe9.wav"))
        write(root / os.fsdecode(b"w\xefnd") / "x.wav")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    dataset = AudioFolder(root)
    assert dataset.sample_ids == before
    assert len(dataset.left_out) == 2
    assert all("aren't UTF-8; rename" in item.reason for item in dataset.left_out)
    assert any(r"caf\xe9.wav" in item.name for item in dataset.left_out)
    str(dataset).encode()


def test_files_without_a_class_are_left_out(root):
    """A clip right in the root has no class."""
    write(root / "stray.wav")
    (item,) = AudioFolder(root).left_out
    assert item.name.endswith("stray.wav")
    assert item.reason == "not in a class folder"


def test_split_folders(tmp_path):
    """train, validation and test above the classes are the clips' splits."""
    for split in ("train", "validation", "test"):
        make_audio_folder(tmp_path / "s" / split, suffixes=["wav"])
    dataset = AudioFolder(tmp_path / "s")
    assert dataset.class_labels == {"bell": 0, "siren": 1, "wind": 2}
    assert "validation/clip_0:bell" in dataset.sample_ids
    assert {sample["split"] for sample in dataset.samples} == {"train", "val", "test"}
    assert len(Narrowing(split="val").of(dataset)) == 6


def test_split_folders_without_classes_are_refused(tmp_path):
    """train/*.wav beside test/*.wav has no classes; one folder `train` is a class."""
    write(tmp_path / "s" / "train" / "a.wav")
    assert AudioFolder(tmp_path / "s").sample_ids == ["a:train"]
    write(tmp_path / "s" / "test" / "a.wav")
    with pytest.raises(DatasetError):
        AudioFolder(tmp_path / "s")


def test_strays_of_a_split_folder_are_left_out(tmp_path):
    """A clip beside a split's class folders ends nothing."""
    for split in ("train", "test"):
        write(tmp_path / "s" / split / "bell" / "a.wav")
    write(tmp_path / "s" / "train" / "stray.wav")
    dataset = AudioFolder(tmp_path / "s")
    assert sorted(dataset.sample_ids) == ["test/a:bell", "train/a:bell"]
    assert [item.reason for item in dataset.left_out] == ["not in a class folder"]


def test_links_end(root):
    """A link to a folder above doesn't send the listing round in a circle."""
    (root / "bell" / "up").symlink_to(root)
    assert len(AudioFolder(root).samples) == 15


def test_nothing_usable(tmp_path):
    """No folder, an empty one, a file: each is named."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("none", "file", "empty"):
        with pytest.raises(DatasetError, match=name):
            AudioFolder(tmp_path / name)

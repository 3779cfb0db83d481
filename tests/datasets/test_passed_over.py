"""Audio that is passed over is counted, and nothing that lies about ends the listing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from synthetic_layouts import make_audio_folder, make_esc50, make_vggsound, tone, write_audio

from lmdbcache.cache import EmbeddingCache, left_out_counts
from lmdbcache.config import CacheConfig
from lmdbcache.datasets import VEGASDataset, open_dataset
from lmdbcache.errors import DatasetError

# Layout → (folder with clips, class of the clips in it as far as the layout knows it)
PLACES = {"vegas": "dog/audios", "esc50": "audio", "vggsound": "clips", "folder": "bell"}
CLASSES = {"vegas": "dog", "folder": "bell"}


@pytest.fixture(params=PLACES)
def kind(request):
    return request.param


@pytest.fixture
def root(kind, tmp_path):
    """A sound dataset of each layout, of which nothing is left out."""
    return make(kind, tmp_path / "data")


def make(kind, root):
    if kind == "vegas":
        for name in ("dog", "drum"):
            for n in range(3):
                write_audio(root / name / "audios" / f"video_{n:05d}.wav", tone(name, n))
    elif kind == "esc50":
        make_esc50(root)
    elif kind == "vggsound":
        make_vggsound(root)
        (root / "clips").mkdir(exist_ok=True)
    else:
        make_audio_folder(root)
    return root


@pytest.fixture
def place(root, kind):
    return root / PLACES[kind]


def some_wav(root):
    return next(path for path in sorted(root.rglob("*.wav")) if path.is_file())


def add_oddities(place, root):
    """Make one thing of each kind; those that are to be left out, by what a listing names."""
    wav = some_wav(root)
    for folder in (place / ".hidden", place / "a" / "b", place / "folder.wav"):
        folder.mkdir(parents=True)
    shutil.copy(wav, place / ".hidden" / "x.wav")
    (root / "__MACOSX" / place.name).mkdir(parents=True)
    (root / "__MACOSX" / place.name / "._x.wav").write_bytes(b"\0\5\x16\7")
    (place / "._video.wav").write_bytes(b"\0\5\x16\7")
    shutil.copy(wav, place / "a" / "b" / "x.m4a")
    shutil.copy(wav, place / "folder.wav" / "x.aac")
    (root / "stray.m4a").write_bytes(b"x")
    links = {
        place / "loop.wav": place / "loop.wav",
        place / "up": root,
        place / "gone.wav": place / "nowhere.wav",
        root / "again": root,
        root / "circle": root / "circle",
    }
    for link, target in links.items():
        link.symlink_to(target)
    pipes = [place / "pipe.wav", root / "pipe.wav"]
    for pipe in pipes:
        os.mkfifo(pipe)
    return {
        *links,
        *pipes,
        place / ".hidden",
        place / "._video.wav",
        place / "a" / "b" / "x.m4a",
        place / "folder.wav" / "x.aac",
        root / "__MACOSX",
        root / "stray.m4a",
    }


def test_odd_things_are_left_out_and_the_rest_is_as_before(root, kind, place):
    """Each is one entry with its place; ids and classes are those of the sound dataset."""
    before = open_dataset(root, kind)
    odd = add_oddities(place, root)
    after = open_dataset(root)
    assert after.kind == kind
    assert after.sample_ids == before.sample_ids
    assert dict(after.class_labels) == dict(before.class_labels)
    new = [item for item in after.left_out if item not in before.left_out]
    assert sorted(item.name for item in new) == sorted(map(str, odd))
    assert all(item.reason for item in new)


@pytest.fixture
def open_folder():
    """A folder that everybody may enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextlib.contextmanager
def an_ordinary_user():
    """Root may list everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_listed_is_left_out(open_folder, kind):
    """One without permission, beside the clips or beside their folders, is named."""
    root = make(kind, open_folder / "data")
    before = open_dataset(root)
    closed = [root / "closed", root / PLACES[kind] / "closed"]
    for folder in closed:
        folder.mkdir(mode=0)
    with an_ordinary_user():
        after = open_dataset(root)
    assert after.sample_ids == before.sample_ids
    new = {item.name for item in after.left_out if item not in before.left_out}
    assert new == {str(folder) for folder in closed}


def test_audio_that_cannot_be_decoded_is_counted_by_suffix_and_class(root, kind, place):
    """Such files beside the clips are counted under their suffix and class."""
    suffixes = (".m4a", ".aac", ".mp4", ".webm", ".WMA", ".mka")
    before = open_dataset(root, kind)
    for number, suffix in enumerate(suffixes, 1):
        for n in range(number):
            (place / f"more{n}{suffix}").write_bytes(b"\0\0\0\x20ftypM4A ")
    dataset = open_dataset(root)
    assert dataset.sample_ids == before.sample_ids
    counts = left_out_counts(dataset.left_out)
    coverage = EmbeddingCache(root / "no cache").coverage(CacheConfig(), dataset)
    assert coverage.left_out == counts
    assert counts["count"] == len(before.left_out) + 21
    for number, suffix in enumerate(suffixes, 1):
        assert counts["by_suffix"][suffix.lower()] == number
    if kind in CLASSES:
        assert counts["by_class"] == {CLASSES[kind]: 21}
    assert f"{len(dataset.left_out) - len(before.left_out)} left out" in str(dataset)


def test_a_listed_clip_of_another_suffix_is_left_out_once(tmp_path):
    """VGGSound comes as mp4: the file is named, with its class, and not called missing."""
    root = make_vggsound(tmp_path / "v")
    before = open_dataset(root)
    path = next(p for p in sorted(root.rglob("*.*")) if p.stem == before.samples[0]["file_id"])
    path.rename(path.with_suffix(".mp4"))
    after = open_dataset(root)
    assert len(after.samples) == len(before.samples) - 1
    (item,) = [item for item in after.left_out if item not in before.left_out]
    assert (item.suffix, item.class_name) == (".mp4", before.samples[0]["class_name"])


@pytest.mark.parametrize("kind", ["vegas", "folder"], indirect=True)
def test_where_all_is_left_out_the_dataset_is_refused(root, kind):
    """Nothing but m4a is an error that names one, not an empty dataset."""
    for path in [p for p in root.rglob("*") if p.is_file()]:
        path.rename(path.with_suffix(".m4a"))
    with pytest.raises(DatasetError, match="m4a"):
        open_dataset(root, kind)


SPELLINGS = {
    "Helicopter": "helicopter",
    "HELICOPTER": "helicopter",
    "Baby cry": "baby_cry",
    "baby-cry": "baby_cry",
    "BabyCry": "baby_cry",
    "baby_cry ": "baby_cry",
    "Rail Transport": "rail_transport",
    "firework": "fireworks",
}


@pytest.mark.parametrize("kind", ["vegas"], indirect=True)
def test_a_class_folder_of_another_spelling_says_what_to_rename(root):
    """Its clips are counted under the folder's name, and the class that is meant is named."""
    for name in SPELLINGS:
        for n in range(2):
            write_audio(root / name / "audios" / f"video_{n:05d}.wav", tone("x", n))
    dataset = open_dataset(root)
    assert {sample["class_name"] for sample in dataset.samples} == {"dog", "drum"}
    assert left_out_counts(dataset.left_out)["by_class"] == dict.fromkeys(SPELLINGS, 2)
    for item in dataset.left_out:
        assert repr(SPELLINGS[item.class_name]) in item.reason


@pytest.mark.parametrize("name", ["Helicopter", "baby cry"])
def test_vegas_with_other_names_only_is_not_taken_for_another_dataset(tmp_path, name):
    """Its labels and ids would be others: what to rename is said; as a folder it opens."""
    for n in range(2):
        write_audio(tmp_path / "x" / name / "audios" / f"{n}.wav", tone("x", n))
    with pytest.raises(DatasetError, match=name):
        open_dataset(tmp_path / "x")
    assert len(open_dataset(tmp_path / "x", "folder").samples) == 2


@pytest.mark.parametrize("kind", ["vegas"], indirect=True)
def test_other_classes_beside_those_of_vegas_are_named(root):
    """A mix isn't silently the known ones; the folder layout takes all of them."""
    for name in ("cat", "gun"):
        write_audio(root / name / "audios" / "1.wav", tone(name))
        (root / name / "videos").mkdir()
        (root / name / "videos" / "1.mp4").write_bytes(b"x")
    dataset = open_dataset(root)
    assert left_out_counts(dataset.left_out)["by_class"] == {"cat": 1, "gun": 1}
    assert all("'folder'" in item.reason for item in dataset.left_out)
    whole = open_dataset(root, "folder")
    assert set(whole.class_labels) == {"cat", "dog", "drum", "gun"}
    assert whole.left_out == []


def test_other_classes_alone_taken_as_vegas_say_what_to_do(tmp_path):
    """The error names a class that there is, and the layout that takes it."""
    write_audio(tmp_path / "x" / "cat" / "audios" / "1.wav", tone("cat"))
    for open_it in (
        lambda: open_dataset(tmp_path / "x", "vegas"),
        lambda: VEGASDataset(tmp_path / "x"),
    ):
        with pytest.raises(DatasetError, match=r"'cat'.*'folder'"):
            open_it()


def test_a_tree_like_vegas_with_other_classes_is_a_folder_dataset(tmp_path):
    """Classes are the folders; videos beside the audio are neither clips nor losses."""
    for name in ("cat", "gun"):
        for n in range(2):
            write_audio(tmp_path / "x" / name / "audios" / f"{n}.wav", tone(name, n))
        (tmp_path / "x" / name / "videos").mkdir()
        (tmp_path / "x" / name / "videos" / "0.mp4").write_bytes(b"x")
    dataset = open_dataset(tmp_path / "x")
    assert dataset.kind == "folder"
    assert dataset.class_labels == {"cat": 0, "gun": 1}
    assert len(dataset.samples) == 4
    assert dataset.left_out == []


@pytest.mark.parametrize("kind", ["vegas"], indirect=True)
def test_audio_beside_a_class_folders_audios_is_counted(root):
    """A clip right in the class folder, or in another folder of it, has been overlooked."""
    write_audio(root / "dog" / "1.wav", tone("dog", 1))
    write_audio(root / "dog" / "Audios" / "2.wav", tone("dog", 2))
    (root / "snoring").write_bytes(b"")
    write_audio(root / "printer" / "3.wav", tone("printer"))
    (root / "chainsaw").mkdir()
    (root / "chainsaw" / "audios").write_bytes(b"")
    (root / "helicopter").mkdir()
    (root / "helicopter" / "audios").symlink_to("audios")
    expected = {"dog": 2, "snoring": 1, "printer": 1, "chainsaw": 1, "helicopter": 1}
    for dataset in (open_dataset(root), VEGASDataset(root)):
        assert left_out_counts(dataset.left_out)["by_class"] == expected


@pytest.mark.parametrize("kind", ["esc50", "vggsound"], indirect=True)
def test_a_table_that_is_a_pipe_is_refused(root, kind):
    """Nothing waits for it."""
    table = next(root.rglob("*.csv"))
    table.unlink()
    os.mkfifo(table)
    with pytest.raises(DatasetError):
        open_dataset(root, kind)


def test_an_extraction_of_a_dataset_says_what_was_left_out(tmp_path):
    """From Python, too: in the summary, its text and its JSON; clips alone leave nothing out."""
    from lmdbcache import CacheConfig, EmbeddingCache
    from lmdbcache.extraction import extract, to_clips
    from lmdbcache.testing import dataset_contract

    root = make_audio_folder(tmp_path / "s")
    (root / "bell" / "x.m4a").write_bytes(b"x")
    dataset = open_dataset(root)
    config = CacheConfig(
        sample_rate=16000, duration=0.1, model_name="m", output="o", namespace=dataset.namespace
    )
    summaries = [
        extract(
            EmbeddingCache(tmp_path / "cache"), config, clips, num_workers=0,
            front_end=dataset_contract._FrontEnd(), make_embedder=dataset_contract._Embedder,
        )
        for clips in (dataset, dataset, to_clips(dataset.samples))
    ]  # fmt: skip
    for summary in summaries[:2]:
        assert summary.left_out["count"] == 1
        assert json.loads(json.dumps(summary.to_dict()))["left_out"]["by_suffix"] == {".m4a": 1}
        assert "1 files or rows of the dataset are left out" in str(summary)
    assert summaries[2].left_out == {}


def test_counts_are_plain_values():
    """They go into JSON; an empty list is zero of everything."""
    counts = left_out_counts([])
    assert json.loads(json.dumps(counts)) == {
        "count": 0, "by_kind": {}, "by_suffix": {}, "by_class": {}
    }  # fmt: skip

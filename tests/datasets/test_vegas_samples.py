"""Which clips a VEGASDataset lists, under which labels and names."""

from __future__ import annotations

import json
import logging
import os
import unicodedata
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from lmdbcache.datasets import AudioDataset, VEGASDataset
from lmdbcache.errors import ConfigError, DatasetError


def test_is_an_audio_dataset(shared_root):
    """It has what extraction asks of a data set."""
    dataset = VEGASDataset(shared_root)
    assert isinstance(dataset, AudioDataset)
    assert dataset.namespace == "vegas"
    assert dataset.sample_ids[0] == "video_00000:baby_cry"
    assert len(set(dataset.sample_ids)) == len(dataset) == 60


def test_sample_has_the_fields_that_scripts_read(root):
    """Names, ids, paths and metadata of one sample; what isn't there has its empty value."""
    (root / "dog" / "video_info.csv").write_text(
        "YTID,start_second,end_second\nabc,1,6\ndef,30,35.5\n", encoding="utf-8"
    )
    (root / "captions.json").write_text(
        json.dumps({"video_00001": "a sound", "video_00001:dog": "a dog barks"}), encoding="utf-8"
    )
    samples = {
        s: x for d in [VEGASDataset(root)] for s, x in zip(d.sample_ids, d.samples, strict=True)
    }
    sample = samples["video_00001:dog"]
    assert sample == {
        "file_id": "video_00001",
        "class_name": "dog",
        "class_label": 2,
        "video_id": "video_00001",
        "audio_path": str(root / "dog" / "audios" / "video_00001.wav"),
        "audio_filename": "video_00001.wav",
        "image_path": None,
        "image_filename": "",
        "video_path": None,
        "video_filename": "",
        "ytid": "def",
        "start_second": 30.0,
        "end_second": 35.5,
        "sample_idx": 7,
        "caption": "a dog barks",
        "audio_emb": None,
    }
    assert samples["video_00001:drum"]["caption"] == "a sound"
    assert samples["video_00002:dog"]["end_second"] == 5.0


def test_labels_are_never_remapped(shared_root):
    """A selection keeps the labels 0 to 9 of all ten classes."""
    dataset = VEGASDataset(shared_root, selected_classes=["drum", "DOG"], split="train")
    assert dataset.active_classes == {"dog": 2, "drum": 3}
    assert {s["class_label"] for s in dataset.samples} == {2, 3}
    assert dataset[0]["label"].item() in {2, 3}
    assert (dataset.get_num_classes(), dataset.get_max_class_label()) == (2, 3)
    assert dataset.get_class_names() == ["dog", "drum"]
    assert dataset.get_class_labels() == [2, 3]


def test_selections_by_name_and_label(shared_root):
    """Names of any case and labels (also numpy's) select and exclude; empty means all."""
    chosen = VEGASDataset(shared_root, selected_classes=[2, np.int64(9), "Drum"], split="all")
    assert chosen.get_class_labels() == [2, 3, 9]
    rest = VEGASDataset(shared_root, excluded_classes=[2, "snoring"], split="all")
    assert rest.get_class_labels() == [0, 1, 3, 4, 5, 6, 7, 9]
    assert len(VEGASDataset(shared_root, selected_classes=[], split="all")) == 60
    assert VEGASDataset(shared_root, selected_classes="dog").get_class_names() == ["dog"]


@pytest.mark.parametrize("unknown", ["cat", 10, -1, True, 2.0, None])
def test_unknown_classes_are_refused(shared_root, unknown):
    """A class that VEGAS doesn't have raises, and the ten are listed."""
    with pytest.raises(DatasetError, match=r"baby_cry \(0\).*water_flowing \(9\)"):
        VEGASDataset(shared_root, selected_classes=["dog", unknown])


def test_setting_a_selection_reloads_the_samples(shared_root):
    """The properties work after construction, for the splits as well."""
    dataset = VEGASDataset(shared_root)
    dataset.selected_classes = ["dog", 3]
    assert (dataset.selected_classes, len(dataset)) == (["dog", "drum"], 12)
    dataset.excluded_classes = ["drum"]
    assert dataset.active_classes == dataset.train.active_classes == {"dog": 2}
    assert len(dataset.train) + len(dataset.val) + len(dataset.test) == len(dataset) == 6
    dataset.selected_classes = dataset.excluded_classes = None
    assert len(dataset) == 60
    assert len(dataset.available_classes) == 10


def test_split_none_has_all_and_its_parts(shared_root):
    """With split=None the data set is the union of .train, .val and .test."""
    dataset = VEGASDataset(shared_root, train_ratio=0.5, val_ratio=0.25, test_ratio=0.25)
    parts = [dataset.train, dataset.val, dataset.test]
    assert sorted(chain.from_iterable(part.sample_ids for part in parts)) == sorted(
        dataset.sample_ids
    )
    assert dataset.train.get_samples_per_class() == dict.fromkeys(dataset.active_classes, 3)
    for part, split in zip(parts, ("train", "val", "test"), strict=True):
        alone = VEGASDataset(shared_root, split=split, train_ratio=2, val_ratio=1, test_ratio=1)
        assert (part.split, part.sample_ids) == (split, alone.sample_ids)
        assert not hasattr(part, "train")
    assert dataset.verify_stratification(dataset.train)
    assert sum(dataset.get_class_distribution().values()) == pytest.approx(100)


def test_splits_to_load_is_a_union(shared_root):
    """splits_to_load holds the listed splits once each, and leaves the others empty."""
    dataset = VEGASDataset(shared_root, splits_to_load=["train", "val"])
    assert len(dataset) == len(dataset.train) + len(dataset.val)
    assert len(dataset.test) == 0
    with pytest.raises(DatasetError, match="'valid'"):
        VEGASDataset(shared_root, splits_to_load=["valid"])


def test_nodes_share_a_class_with_disjoint_samples(shared_root):
    """Two nodes of one class train, validate and test on different clips."""
    options = {"selected_classes": ["dog"], "num_nodes": 2}
    nodes = [VEGASDataset(shared_root, node_split_id=node, **options) for node in (0, 1)]
    seen = Counter(
        name for n in nodes for part in (n.train, n.val, n.test) for name in part.sample_ids
    )
    assert len(seen) == 6
    assert set(seen.values()) == {1}
    some = VEGASDataset(shared_root, node_split_id=1, samples_per_node=2, num_samples_per_class=1)
    assert some.get_samples_per_class() == dict.fromkeys(some.active_classes, 2)


def test_num_samples_per_class_takes_the_first(shared_root):
    """The limit takes the first clips of each class; 0 means no limit."""
    dataset = VEGASDataset(shared_root, num_samples_per_class=2, split="all")
    assert {s["file_id"] for s in dataset.samples} == {"video_00000", "video_00001"}
    assert len(VEGASDataset(shared_root, num_samples_per_class=0, split="all")) == 60


def test_hostile_file_names(root, write_clip):
    """Spaces, colons, accents, dots and capitals in a name or extension are no obstacle."""
    folder = root / "dog" / "audios"
    decomposed = unicodedata.normalize("NFD", "chien été")
    for name in ("my dog.wav", "a:b:c.wav", f"{decomposed}.WAV", "犬.Wav", "x.y..wav", "l\nf.wav"):
        write_clip(folder / name)
    write_clip(folder / "._video_00000.wav")
    (folder / "notes.txt").write_text("no clip", encoding="utf-8")
    (folder / "folder.wav").mkdir()
    dataset = VEGASDataset(root, selected_classes=["dog"], split="all", audio_duration=0.1)
    found = {s["file_id"] for s in dataset.samples} - {f"video_{i:05d}" for i in range(6)}
    assert found == {
        "my dog",
        "a:b:c",
        unicodedata.normalize("NFC", decomposed),
        "犬",
        "x.y.",
        "l\nf",
    }
    assert "a:b:c:dog" in dataset.sample_ids
    for item in dataset:
        assert item["audio"].shape == (1600,)


def test_two_files_with_one_id_are_refused(root, write_clip):
    """Same stem under two extensions, or two forms of one accent: both files are named."""
    write_clip(root / "dog" / "audios" / "video_00001.FLAC")
    with pytest.raises(DatasetError, match=r"video_00001\.FLAC.*video_00001\.wav"):
        VEGASDataset(root)
    for form in ("NFC", "NFD"):
        write_clip(root / "drum" / "audios" / f"{unicodedata.normalize(form, 'é')}.wav")
    with pytest.raises(DatasetError, match="é"):
        VEGASDataset(root, selected_classes=["drum"])


def test_names_that_are_not_text_are_left_out(root, caplog):
    """One name in no known encoding is named in a warning; the rest of the folder is used."""
    before = VEGASDataset(root).sample_ids
    path = Path(os.fsdecode(os.fsencode(root / "dog" / "audios") + b"/\xff.wav"))
    try:
        path.touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    caplog.clear()
    assert VEGASDataset(root).sample_ids == before
    (message,) = [m for m in caplog.messages if "left out" in m]
    assert r"\xff.wav" in message


def test_missing_folders(root, tmp_path, caplog):
    """No root or no class at all raises with the layout; a missing class is one warning."""
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DatasetError, match="root_dir"):
            VEGASDataset(folder)
    with pytest.raises(DatasetError, match="chainsaw"):
        VEGASDataset(root, selected_classes=["chainsaw"])
    with caplog.at_level(logging.WARNING):
        assert len(VEGASDataset(root)) == 18
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "snoring" in record.getMessage()


def test_impossible_arguments_are_refused(shared_root):
    """Split, rate and duration are checked when the data set is made."""
    with pytest.raises(DatasetError, match="'training'"):
        VEGASDataset(shared_root, split="training")
    with pytest.raises(ConfigError, match="duration"):
        VEGASDataset(shared_root, audio_duration=0)


def test_damaged_side_files(root, caplog):
    """A caption file that isn't JSON raises; a bad number in the table is told and replaced."""
    (root / "dog" / "video_info.csv").write_text("YTID,start_second\nabc,soon\n", encoding="utf-8")
    assert VEGASDataset(root, split="all").samples[6]["start_second"] == 0.0
    assert "'soon'" in caplog.text
    (root / "captions.json").write_text("{", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"captions\.json"):
        VEGASDataset(root)


def test_every_old_keyword_is_accepted(shared_root, tmp_path, caplog):
    """Keywords of earlier versions are taken; those without effect leave nothing on disk."""
    dataset = VEGASDataset(
        root_dir=str(shared_root),
        audio_embedding_file=None,
        embedding_file=None,
        splits_to_load=None,
        split_ratio=0.8,
        use_folds=True,
        train_folds=[0],
        val_folds=[1],
        test_folds=[2],
        use_saved_audio_embeddings=True,
        enable_cache=True,
        cache_dir=str(tmp_path / "lists"),
        image_size=(224, 224),
        video_fps=25,
        transform_audio=None,
        transform_image=None,
        transform_video=None,
        load_image=False,
        load_video=False,
    )
    assert len(dataset.test) == 10
    assert "deprecated" in caplog.text
    (message,) = [m for m in caplog.messages if "without effect" in m]
    assert all(name in message for name in ("use_folds", "train_folds", "cache_dir"))
    assert (dataset.use_folds, dataset.train_folds) == (True, [0])
    with pytest.raises(TypeError, match="sample_rat"):
        VEGASDataset(shared_root, sample_rat=16000)
    dataset.clear_cache()
    dataset.print_split_statistics()
    assert dataset.to("cpu") is dataset
    assert not (tmp_path / "lists").exists()
    assert not (shared_root / "ast_cache").exists()

"""A row without an id column is known by its content, wherever it stands."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")

from huggingface_tables import CLASSES, encoded, table  # noqa: E402
from synthetic_layouts import tone, write_audio  # noqa: E402

from lmdbcache import CacheConfig, EmbeddingCache  # noqa: E402
from lmdbcache.datasets import sample_id_of, source_of  # noqa: E402
from lmdbcache.datasets.huggingface import HuggingFaceDataset  # noqa: E402

NUM = 20
# How rows may be called that nobody gave an id. Position and repeated names identify nothing.
NAMES = {
    "no paths": lambda _: None,
    "one path": lambda _: "audio.wav",
    "repeated paths": lambda n: f"clip{n % 10}.wav",
    "paths in folders": lambda n: f"{n // 10}/{n % 10}.wav",
    "own paths": lambda n: f"clip{n}.wav",
}


def rows_called(name, count=NUM):
    return [(CLASSES[0], encoded(CLASSES[0], n), name(n)) for n in range(count)]


def contents(dataset):
    """Sample id → the bytes behind it."""
    found = {}
    for sample in dataset.samples:
        with source_of(sample).open_binary() as file:
            found[sample_id_of(sample)] = file.read()
    return found


def opened(part):
    return HuggingFaceDataset(part, namespace="x")


PARTS = {
    "select a range": lambda ds, _: ds.select(range(5, 15)),
    "select rows": lambda ds, _: ds.select([17, 3, 3 + 4, 0]),
    "shuffle": lambda ds, _: ds.shuffle(seed=3),
    "filter": lambda ds, _: ds.filter(_odd, with_indices=True, input_columns="label"),
    "train_test_split": lambda ds, _: ds.train_test_split(test_size=0.3, seed=1),
    "shard": lambda ds, _: ds.shard(3, 1),
    "concatenate": lambda ds, _: datasets.concatenate_datasets(
        [ds.select(range(10, 20)), ds.select(range(3))]
    ),
    "save_to_disk": lambda ds, folder: _saved(ds.select(range(4, 12)), folder),
    "parquet": lambda ds, folder: _parquet(ds.select(range(4, 12)), folder),
    "decode=False": lambda ds, _: ds.cast_column("audio", datasets.Audio(decode=False)),
}


def _odd(_, index):
    return index % 2 == 1


def _saved(part, folder):
    part.save_to_disk(folder / "saved")
    return folder / "saved"


def _parquet(part, folder):
    (folder / "pq").mkdir()
    part.to_parquet(folder / "pq" / "train-00000-of-00001.parquet")
    return folder / "pq"


@pytest.mark.parametrize("name", NAMES)
def test_a_part_gives_each_clip_the_id_that_it_has_in_the_whole(name, tmp_path, monkeypatch):
    """An id never means other bytes, whatever was selected, and none is new."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    whole = table(rows_called(NAMES[name]), split="train")
    of_whole = contents(opened(whole))
    assert len(of_whole) == NUM
    for how, part_of in PARTS.items():
        part = contents(opened(part_of(whole, tmp_path)))
        assert part, how
        assert part.items() <= of_whole.items(), how


@pytest.mark.parametrize("name", ["no paths", "repeated paths"])
def test_an_extraction_of_another_range_has_no_false_hits(name, tmp_path):
    """After rows 0 to 9, rows 5 to 14 find five embeddings, and those are their own."""
    pytest.importorskip("torch")
    from lmdbcache.extraction import extract
    from lmdbcache.testing import dataset_contract

    ds = table(rows_called(NAMES[name]), split="train")
    cache = EmbeddingCache(tmp_path / "cache")
    config = CacheConfig(
        sample_rate=16000, duration=0.1, model_name="m", output="spectrum", namespace="x"
    )
    front_end = dataset_contract._FrontEnd()
    for part, hits in ((range(10), 0), (range(5, 15), 5)):
        dataset = opened(ds.select(part))
        found = cache.coverage(config, dataset)
        assert found.num_present == hits
        summary = extract(
            cache, config, dataset, front_end=front_end, num_workers=0,
            make_embedder=dataset_contract._Embedder,
        )  # fmt: skip
        assert (summary.num_cached, summary.num_extracted) == (hits, 10 - hits)
        with cache.reader(config) as reader:
            for sample in dataset.samples:
                expected = front_end(dataset_contract._decoded(sample))
                np.testing.assert_array_equal(reader[sample_id_of(sample)], expected)


def test_ids_are_the_same_in_every_process(tmp_path):
    """Neither a hash seed nor the library's cache goes into them."""
    table(rows_called(NAMES["no paths"]), split="train").save_to_disk(tmp_path / "saved")
    code = (
        "import sys; from lmdbcache.datasets.huggingface import HuggingFaceDataset\n"
        "print(*HuggingFaceDataset(sys.argv[1], namespace='x').sample_ids)"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "saved")],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(printed) == 1


def test_files_that_rows_name_are_known_by_their_content(tmp_path):
    """Bytes in the table and the same bytes in a file have one id; base names play no part."""
    rows = []
    for n in range(3):
        path = write_audio(tmp_path / str(n) / "a.wav", tone("bell", n))
        rows.append(("bell", None, str(path)))
    ids = opened(table(rows)).sample_ids
    assert len(set(ids)) == 3
    inside = [("bell", (tmp_path / str(n) / "a.wav").read_bytes(), None) for n in range(3)]
    assert opened(table(inside)).sample_ids == ids


def test_the_same_audio_twice_is_one_sample_of_a_class_and_one_of_another():
    """The second row of a class is left out by name; with another class it is another sample."""
    sound = encoded("bell", 0)
    rows = [("bell", sound, "a.wav"), ("bell", sound, "b.wav"), ("wind", sound, "c.wav")]
    dataset = opened(table(rows))
    assert sorted(sample["class_name"] for sample in dataset.samples) == ["bell", "wind"]
    (item,) = dataset.left_out
    assert "row 1" in item.name
    assert "row 0" in item.reason


@pytest.mark.parametrize("kind", ["fifo", "folder", "gone", "neither"])
def test_a_row_without_a_readable_file_fails_by_name(kind, tmp_path):
    """Nothing waits for a pipe; the other rows keep their ids."""
    from lmdbcache.audio import load_waveform
    from lmdbcache.errors import AudioDecodeError

    path = tmp_path / "x.wav"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    bad = ("bell", None, None if kind == "neither" else str(path))
    good = ("bell", encoded("bell", 0), None)
    dataset = opened(table([bad, good]))
    assert set(opened(table([good])).sample_ids) < set(dataset.sample_ids)
    (sample,) = [each for each in dataset.samples if each["audio_path"].endswith("row 0")]
    with pytest.raises(AudioDecodeError, match="row 0"):
        load_waveform(source_of(sample), 16000, 0.1)


LABELS = {
    "class labels": (datasets.Sequence(datasets.ClassLabel(names=["car", "dog", "rain"])), int),
    "text": (datasets.Sequence(datasets.Value("string")), ["car", "dog", "rain"].__getitem__),
}


@pytest.mark.parametrize("kind", LABELS)
def test_several_labels_in_a_row_are_a_multi_hot_target(kind):
    """All labels of a row reach the training loop; a row without any has a target of zeros."""
    torch = pytest.importorskip("torch")
    from lmdbcache.datasets import CachedAudioDataset, collate_mixed

    feature, written = LABELS[kind]
    given = [[0, 2], [1], [], [2, 1, 0], None]
    column = [None if row is None else [written(label) for label in row] for row in given]
    rows = [(None, encoded("bell", n), None) for n in range(5)]
    plain = table(rows).remove_columns("label")
    ds = plain.add_column("label", column, feature=feature)
    dataset = opened(ds)
    assert dataset.target_names == ("car", "dog", "rain")
    assert dataset.class_labels == {"multilabel": 0}
    assert [item.kind for item in dataset.left_out] == ["no label"]
    by_place = {sample["audio_path"][-1]: sample["target"].tolist() for sample in dataset.samples}
    assert by_place == {
        "0": [True, False, True], "1": [False, True, False], "2": [False] * 3, "3": [True] * 3
    }  # fmt: skip
    assert {name: row.tolist() for name, row in dataset.targets.items()} == {
        sample_id_of(sample): sample["target"].tolist() for sample in dataset.samples
    }
    config = CacheConfig(sample_rate=16000, duration=0.1, namespace="x")
    clips = CachedAudioDataset("none", config, dataset)
    labels = collate_mixed([clips[n] for n in range(4)])["labels"]
    assert labels.dtype == torch.bool
    assert labels.tolist() == [sample["target"].tolist() for sample in dataset.samples]


def test_the_same_audio_with_other_labels_is_left_out_by_name():
    """One clip can't have two targets, and neither is chosen without a word."""
    sound = encoded("bell", 0)
    plain = table([(None, sound, None), (None, sound, None)]).remove_columns("label")
    labels = datasets.Sequence(datasets.Value("string"))
    dataset = opened(plain.add_column("label", [["a"], ["b"]], feature=labels))
    (item,) = dataset.left_out
    assert "other labels" in item.kind

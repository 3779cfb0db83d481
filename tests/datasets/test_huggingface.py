"""Hugging Face datasets: columns, classes, ids, and where the bytes are."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

datasets = pytest.importorskip("datasets")

from huggingface_tables import CLASSES, encoded, table, two_splits  # noqa: E402
from synthetic_layouts import tone, write_audio  # noqa: E402

from lmdbcache.audio import load_waveform  # noqa: E402
from lmdbcache.datasets import Narrowing, open_dataset, source_of  # noqa: E402
from lmdbcache.datasets.huggingface import HuggingFaceDataset  # noqa: E402
from lmdbcache.errors import AudioDecodeError, DatasetError  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A DatasetDict of two splits, saved to disk; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "My Sounds"
    two_splits().save_to_disk(folder)
    return folder


def rows(count=4, *, paths=True):
    return [
        (CLASSES[n % 3], encoded(CLASSES[n % 3], n), f"clip{n}.wav" if paths else None)
        for n in range(count)
    ]


def test_classes_ids_and_splits_are_the_datasets(saved):
    """Labels are the ClassLabel's, ids the file names where asked for, `validation` is val."""
    dataset = HuggingFaceDataset(saved, id_column="audio.path")
    assert dataset.class_labels == {"siren": 0, "bell": 1, "wind": 2}
    assert "train_bell_0:bell" in dataset.sample_ids
    assert {sample["split"] for sample in dataset.samples} == {"train", "val"}
    assert len(Narrowing(split="val").of(dataset)) == 6
    assert dataset.namespace.startswith("hf-my-sounds-")
    assert dataset.root == str(saved)


def test_clips_sound_as_they_were_written(saved):
    """Bytes of wav, flac, ogg and mp3 in Arrow files decode by our own path."""
    for sample in HuggingFaceDataset(saved).samples:
        waveform = load_waveform(source_of(sample), 16000, 0.1)
        name = next(name for name in CLASSES if name.lower() == sample["class_name"])
        reference = tone(name)[:1600]
        assert abs(waveform @ reference) / (reference @ reference) > 0.5


def test_a_source_is_a_reference(tmp_path):
    """Pickled sources of a saved dataset name its files; they don't hold its bytes."""
    big = [(CLASSES[0], bytes(1_000_000), f"{n}.wav") for n in range(10)]
    table(big).save_to_disk(tmp_path / "big")
    dataset = HuggingFaceDataset(tmp_path / "big")
    assert len(pickle.dumps([source_of(sample) for sample in dataset.samples])) < 20_000


def test_only_the_row_is_read(tmp_path):
    """Opening one clip of a large Arrow file takes that clip's bytes, not the table's."""
    big = [
        (CLASSES[n % 3], encoded(CLASSES[n % 3], n) + bytes(1_000_000), f"{n}.wav")
        for n in range(60)
    ]
    table(big).save_to_disk(tmp_path / "big")
    code = (
        "import sys, resource\n"
        "from lmdbcache.datasets.huggingface import HuggingFaceDataset\n"
        "from lmdbcache.datasets import source_of\n"
        "dataset = HuggingFaceDataset(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with source_of(dataset.samples[40]).open_binary() as file:\n"
        "    assert len(file.read()) > 1_000_000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 20_000  # KiB; the table has 60 MB


def test_columns_by_name_and_by_type():
    """Columns are found by their type, else by their usual names, or said."""
    plain = table(rows(), label=datasets.Value("string"), audio=False)
    assert len(HuggingFaceDataset(plain, namespace="x").samples) == 4
    renamed = plain.rename_column("audio", "sound").rename_column("label", "what")
    with pytest.raises(DatasetError, match="`audio_column`"):
        HuggingFaceDataset(renamed, namespace="x")
    with pytest.raises(DatasetError, match="`label_column`.*sound, what"):
        HuggingFaceDataset(renamed, audio_column="sound", namespace="x")
    found = HuggingFaceDataset(renamed, audio_column="sound", label_column="what", namespace="x")
    assert len(found.samples) == 4
    with pytest.raises(DatasetError, match="id_column 'no'"):
        HuggingFaceDataset(plain, id_column="no", namespace="x")


def test_text_and_number_labels():
    """Text labels are numbered in sorted order over all splits; numbers are labels themselves."""
    text = datasets.DatasetDict(
        a=table(rows(2), label=datasets.Value("string")),
        b=table([("apple", encoded("apple", 0), "z.wav")], label=datasets.Value("string")),
    )
    dataset = HuggingFaceDataset(text, namespace="x")
    assert dataset.class_labels == {"siren": 0, "apple": 1, "bell": 2}
    numbers = [(5, encoded("a", 0), "a.wav"), (-2, encoded("b", 0), "b.wav")]
    dataset = HuggingFaceDataset(table(numbers, label=datasets.Value("int64")), namespace="x")
    assert dataset.class_labels == {"-2": -2, "5": 5}
    odd = [(0.5, encoded("a", 0), "a.wav")]
    with pytest.raises(DatasetError, match="'label'.*0.5"):
        HuggingFaceDataset(table(odd, label=datasets.Value("float64")), namespace="x")


def test_rows_without_a_label_are_left_out():
    """-1 of a ClassLabel, and null, are no class."""
    dataset = HuggingFaceDataset(table([*rows(2), (None, encoded("a", 0), "x.wav")]), namespace="x")
    assert len(dataset.samples) == 2
    (item,) = dataset.left_out
    assert item.name.endswith("row 2")
    assert item.reason == "no label"


def test_audio_files_beside_the_rows_are_left_out(tmp_path):
    """A file that has no row's name is counted; one that has may be what a row was made of."""
    folder = tmp_path / "saved"
    table([(name, content, "known.wav") for name, content, _ in rows()]).save_to_disk(folder)
    for name in ("known.wav", "stray.wav", "stray.m4a", "deeper/stray.opus", "._known.wav"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    dataset = open_dataset(folder)
    assert len(dataset.samples) == len(rows())
    assert sorted(item.suffix for item in dataset.left_out) == [".m4a", ".opus", ".wav", ".wav"]


def test_ids_by_column_and_by_file_name():
    """The id column's values, or the files' names; a row without one is an error."""
    by_column = table(rows(), id=["p", "q", "r", "s"])
    ids = HuggingFaceDataset(by_column, id_column="id", namespace="x").sample_ids
    assert ids == ["q:bell", "p:siren", "s:siren", "r:wind"]
    named = HuggingFaceDataset(table(rows()), id_column="audio.path", namespace="x")
    assert "clip0:siren" in named.sample_ids
    missing = table(rows(), id=["p", None, "r", "s"])
    with pytest.raises(DatasetError, match="'id'.*row 1"):
        HuggingFaceDataset(missing, id_column="id", namespace="x")
    with pytest.raises(DatasetError, match="'audio.path'.*row 0"):
        HuggingFaceDataset(table(rows(paths=False)), id_column="audio.path", namespace="x")
    same = [(CLASSES[0], content, "audio.wav") for _, content, _ in rows()]
    with pytest.raises(DatasetError, match="row 1"):
        HuggingFaceDataset(table(same), id_column="audio.path", namespace="x")


def test_two_rows_of_one_id_are_refused():
    """Both rows are named."""
    twice = table(rows(), id=["p", "q", "r", "p"])
    with pytest.raises(DatasetError, match="row 0.*row 3.*'p:siren'"):
        HuggingFaceDataset(twice, id_column="id", namespace="x")


def test_rows_that_name_files(tmp_path):
    """A path instead of bytes is opened; one that is gone, or a row with neither, names the row."""
    path = write_audio(tmp_path / "clips" / "a.wav", tone("bell"))
    gone = str(tmp_path / "gone.wav")
    made = table([("bell", None, str(path)), ("wind", None, gone), ("wind", None, None)])
    dataset = HuggingFaceDataset(made, namespace="x")
    assert load_waveform(source_of(dataset.samples[0]), 16000, 0.1).any()
    for row, sample in enumerate(dataset.samples[1:], 1):
        with pytest.raises(AudioDecodeError, match=f"row {row}"):
            load_waveform(source_of(sample), 16000, 0.1)


def test_parquet_files(tmp_path, monkeypatch):
    """A folder of parquet files is opened, splits by the files' names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    (tmp_path / "pq").mkdir()
    for split, part in two_splits().items():
        part.to_parquet(tmp_path / "pq" / f"{split}-00000-of-00001.parquet")
    dataset = open_dataset(tmp_path / "pq")
    assert dataset.kind == "huggingface"
    assert len(dataset.samples) == 12
    assert dataset.namespace == "hf-pq"
    assert load_waveform(source_of(dataset.samples[3]), 16000, 0.1).any()


def test_what_cannot_be_opened(tmp_path):
    """A folder without a dataset, a streamed one, one without a name: each says what to do."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError):
        HuggingFaceDataset(tmp_path / "empty")
    with pytest.raises(DatasetError, match="load_dataset"):
        HuggingFaceDataset("someone/sounds")
    with pytest.raises(DatasetError, match="stream_clips"):
        HuggingFaceDataset(table(rows()).to_iterable_dataset(), namespace="x")
    with pytest.raises(DatasetError, match="`namespace`"):
        HuggingFaceDataset(table(rows()))


def test_damaged_arrow_files(saved, tmp_path):
    """Garbage in place of the table is one error that names the folder."""
    import shutil

    shutil.copytree(saved, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.arrow"):
        path.write_bytes(b"not arrow")
    with pytest.raises(DatasetError, match="copy"):
        HuggingFaceDataset(tmp_path / "copy")


def test_no_torch_is_imported(saved):
    """Opening and reading such a dataset needs no torch."""
    code = (
        "import sys; from lmdbcache.datasets import open_dataset\n"
        "from lmdbcache.datasets import source_of\n"
        "dataset = open_dataset(sys.argv[1])\n"
        "source_of(dataset.samples[0]).open_binary().close()\n"
        "assert dataset.kind == 'huggingface' and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True)


def test_without_the_package(saved):
    """Where `datasets` isn't installed, the extra is named; other layouts don't need it."""
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from lmdbcache.datasets import open_dataset\n"
        "from lmdbcache.errors import MissingDependencyError\n"
        "try: open_dataset(sys.argv[1])\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True
    )
    assert '"lmdbcache[huggingface]"' in done.stdout

"""Which layout a folder is taken for."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from synthetic_layouts import make_audio_folder, make_esc50, make_vggsound, tone, write_audio

from lmdbcache.datasets import open_dataset
from lmdbcache.datasets.opening import ADAPTERS
from lmdbcache.errors import DatasetError


def make_vegas(root):
    for name in ("dog", "drum"):
        write_audio(root / name / "audios" / "video_00000.wav", tone(name))
    return root


def make_saved(root):
    """The marks of a saved dataset; enough to be recognised."""
    root.mkdir()
    (root / "dataset_dict.json").write_text(json.dumps({"splits": []}))
    return root


MAKERS = {
    "vegas": make_vegas,
    "esc50": make_esc50,
    "vggsound": make_vggsound,
    "folder": make_audio_folder,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_layouts_are_recognised(tmp_path, kind, caplog):
    """`auto` takes each layout for what it is, and says so."""
    root = MAKERS[kind](tmp_path / "some data")
    with caplog.at_level(logging.INFO, "lmdbcache.datasets.opening"):
        dataset = open_dataset(root)
    assert dataset.kind == kind
    assert str(dataset) in caplog.text
    assert open_dataset(str(root), kind).sample_ids == dataset.sample_ids


def test_an_adapter_of_ones_own_is_given_back(tmp_path):
    """What has the interface already is taken as it is."""
    dataset = open_dataset(make_esc50(tmp_path / "x"))
    assert open_dataset(dataset) is dataset


def test_two_layouts_in_one_folder_are_refused(tmp_path):
    """The error names both and the option; saying which helps."""
    root = make_esc50(tmp_path / "x")
    make_vggsound(root)
    with pytest.raises(DatasetError, match="esc50 or vggsound"):
        open_dataset(root)
    assert open_dataset(root, "esc50").kind == "esc50"
    assert open_dataset(root, "vggsound").kind == "vggsound"


def test_a_stray_file_beside_class_folders_hinders_nothing(tmp_path):
    """It is left out and counted; as many as there are folders make a folder of clips."""
    for name in ("cat/a", "dog/a", "stray"):
        write_audio(tmp_path / "s" / f"{name}.wav", tone(name))
    dataset = open_dataset(tmp_path / "s")
    assert (dataset.kind, len(dataset.samples), len(dataset.left_out)) == ("folder", 2, 1)
    write_audio(tmp_path / "s" / "stray2.wav", tone("b"))
    with pytest.raises(DatasetError):
        open_dataset(tmp_path / "s")


def test_what_is_no_dataset(tmp_path):
    """Nothing recognised names all layouts, and counts the files of a flat folder."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("")
    write_audio(tmp_path / "flat" / "a.wav", tone("a"))
    write_audio(tmp_path / "audio-only" / "audio" / "a.wav", tone("a"))
    write_audio(tmp_path / "deep" / "a" / "b" / "c" / "x.wav", tone("a"))
    for name in ("text", "flat", "audio-only", "deep"):
        with pytest.raises(DatasetError) as caught:
            open_dataset(tmp_path / name)
        assert name in str(caught.value)
        assert all(f"{kind}: " in str(caught.value) for kind in ADAPTERS)
        assert ("1 audio files" in str(caught.value)) == (name == "flat")
    with pytest.raises(DatasetError, match="nowhere"):
        open_dataset(tmp_path / "nowhere")
    assert open_dataset(tmp_path / "audio-only", "folder").sample_ids == ["a:audio"]


def test_an_export_in_a_dataset_changes_nothing(tmp_path):
    """Parquet files that `export` has written in a folder below are no audio of a table."""
    for name in ("a", "b"):
        write_audio(tmp_path / name / "1.wav", tone(name))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "embeddings-00001.parquet").write_bytes(b"PAR1")
    assert (open_dataset(tmp_path).kind, len(open_dataset(tmp_path))) == ("folder", 2)
    (tmp_path / "out" / "embeddings-00001.parquet").rename(tmp_path / "out" / "train.parquet")
    with pytest.raises(DatasetError):
        open_dataset(tmp_path)


def test_a_table_says_vggsound(tmp_path):
    """With a table a folder of clips is VGGSound, whatever its table is called."""
    root = make_vggsound(tmp_path / "x")
    table = (root / "vggsound.csv").rename(tmp_path / "mine.csv")
    assert open_dataset(root, table=table).kind == "vggsound"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "fsd50k"}, "dataset: 'fsd50k'"),
        ({"kind": "esc50", "table": "x.csv"}, "^table: "),
        ({"kind": "folder", "id_column": "id"}, "^id_column: "),
        ({"kind": "folder", "namespace": "vegas"}, "^namespace: 'vegas'"),
        ({"kind": "folder", "namespace": "ESC50"}, "^namespace: 'ESC50'"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, words):
    """An option of another layout, or another dataset's name, is refused."""
    with pytest.raises(DatasetError, match=words):
        open_dataset(make_audio_folder(tmp_path / "x"), **options)
    with pytest.raises(DatasetError, match="esc50"):
        open_dataset(5, "esc50")


def test_no_heavy_import(tmp_path):
    """Opening needs neither torch, an audio library, nor `datasets`."""
    root = make_esc50(tmp_path / "x")
    code = (
        "import sys; from lmdbcache.datasets import open_dataset\n"
        "assert len(open_dataset(sys.argv[1]).samples) == 30\n"
        "heavy = {'torch', 'transformers', 'soundfile', 'soxr', 'datasets', 'pandas', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], check=True)

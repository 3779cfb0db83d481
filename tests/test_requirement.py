"""Coverage before training: the table, the threshold, and a command that fills the gap."""

from __future__ import annotations

import shlex
from typing import ClassVar

import numpy as np
import pytest
from extraction.clips import write_tones
from small_ast import save_small_ast
from synthetic_layouts import make_audio_folder, make_esc50, make_vggsound
from typer.testing import CliRunner

import lmdbcache
from lmdbcache import CacheConfig, VEGASDataset, model_identity, open_dataset
from lmdbcache.cache import ClipFailure, DatasetCoverage, is_covered, update_failures
from lmdbcache.cli.main import app
from lmdbcache.errors import ConfigError, CoverageError


def command_of(error):
    (line,) = [line for line in str(error).splitlines() if line.startswith("    lmdbcache ")]
    words = shlex.split(line)
    assert words[0] == "lmdbcache"
    return words[1:]


class Clips:
    """A dataset by the protocol, its samples with split and node."""

    namespace = "mine"
    root = "/data/my clips"
    command_line_options: ClassVar = {"--dataset": "folder", "--namespace": "mine"}

    def __init__(self, sample_ids):
        self.samples = [
            {
                "file_id": name.split(":")[0],
                "class_name": name.split(":")[1],
                "split": "train" if number % 2 else "val",
                "node": number // 10,
            }
            for number, name in enumerate(sample_ids)
        ]
        self.sample_ids = list(sample_ids)


def test_enough_is_stored(filled, config, embeddings):
    """The coverage comes back, by class, split and node."""
    found = filled.require(config, Clips(embeddings))
    assert (found.num_present, found.num_asked, found.fraction) == (20, 20, 1.0)
    assert found.by_split == {"val": (10, 10), "train": (10, 10)}
    assert found.by_node == {"0": (10, 10), "1": (10, 10)}
    assert filled.require(config, list(embeddings)).by_class == {"drum": (10, 10), "dog": (10, 10)}
    assert filled.require(config, []).fraction == 1.0


def test_too_little_is_stored(filled, config, embeddings):
    """The table has every class, split and node; the threshold decides."""
    wanted = {
        "a": {"train": [*embeddings, "new:dog"], "val": ["new:cat"]},
        "b": {"train": ["x:cat"]},
    }
    with pytest.raises(CoverageError) as caught:
        filled.require(config, wanted)
    rows = [line.split() for line in str(caught.value).splitlines()]
    assert ["class", "node", "a", "train", "node", "a", "val", "node", "b", "train"] in rows
    assert ["dog", "10/11", "-", "-"] in rows
    assert ["cat", "-", "0/1", "0/1"] in rows
    assert ["all", "20/21", "0/1", "0/1"] in rows
    assert filled.require(config, wanted, min_coverage=20 / 23).num_present == 20
    with pytest.raises(CoverageError):
        filled.require(config, wanted, min_coverage=0.88)
    with pytest.raises(ConfigError, match="min_coverage"):
        filled.require(config, wanted, min_coverage=95)
    with pytest.raises(ConfigError, match="isn't a dataset"):
        filled.require(config, 7)


@pytest.mark.parametrize(
    ("num_stored", "num_asked", "min_coverage", "is_enough"),
    [
        (7, 100, 0.07, True),  # as floats multiply, 7.000000000000001 are asked for
        (6, 100, 0.07, False),
        (19, 20, 0.95, True),
        (19, 20, 0.951, False),  # of 19.02 samples 19 are too few
        (19, 20, 0.975, False),  # of 19.5, too
        (0, 20, 0.0, True),
        (20, 20, 1.0, True),
        (19, 20, 1.0, False),
    ],
)
def test_threshold_is_a_number_of_samples(num_stored, num_asked, min_coverage, is_enough):
    """Enough is at least that share of what is asked for, and no rounding moves the threshold."""
    names = [f"{number}:x" for number in range(num_asked)]
    found = DatasetCoverage(num_asked, tuple(names[num_stored:]), {})
    assert is_covered(found, min_coverage, allow_failed=False) is is_enough


@pytest.mark.parametrize("min_coverage", [-0.01, 1.01, float("nan")])
def test_threshold_outside_0_to_1_is_refused(filled, config, embeddings, min_coverage):
    """A share is 0 to 1, even where everything is stored."""
    with pytest.raises(ConfigError, match="min_coverage"):
        filled.require(config, list(embeddings), min_coverage=min_coverage)


def test_sample_listed_twice_is_one_sample(filled, config, embeddings):
    """A part that names a sample twice asks for it once, stored or missing."""
    asked = [*embeddings, *embeddings, "new:dog", "new:dog"]
    with pytest.raises(CoverageError, match=r"all\s+20/21"):
        filled.require(config, {"train": asked})
    found = filled.require(config, {"train": asked}, min_coverage=0.9)
    assert (found.num_present, found.num_asked) == (20, 21)
    assert found.by_split == {"train": (20, 21)}
    assert {row.class_name: (row.num_present, row.num_asked) for row in found.rows} == {
        "dog": (10, 11),
        "drum": (10, 10),
    }


def test_nothing_is_stored_names_the_nearest_config(filled, config, embeddings):
    """A wrong duration is told before the command that would compute everything anew."""
    with pytest.raises(CoverageError, match=r"duration: 10.0 asked, 5.0 stored; 20 embeddings"):
        filled.require(config.replace(duration=10), list(embeddings))


def test_failed_clips_are_counted_apart(filled, config, embeddings):
    """No run fills them: the table says so, and allow_failed leaves them out."""
    update_failures(filled.path(config), [], [ClipFailure("x:dog", "x.wav", "empty")])
    asked = [*embeddings, "x:dog"]
    with pytest.raises(CoverageError) as caught:
        filled.require(config, {"train": asked})
    assert "10/11, 1 failed" in str(caught.value)
    assert "lmdbcache extract" not in str(caught.value)
    found = filled.require(config, asked, allow_failed=True)
    assert found.failed == ("x:dog",)
    assert found.fraction_of_possible == 1.0
    with pytest.raises(CoverageError):
        filled.require(config, [*asked, "y:dog"], allow_failed=True)


def test_command_is_quoted_and_complete(filled, config):
    """Every field of the config, and folders with spaces, as one shell command."""
    other = config.replace(
        duration=0.1 + 0.2, dtype="bfloat16", compute_dtype="float16", namespace="mine"
    )
    with pytest.raises(CoverageError) as caught:
        filled.require(other, Clips(["a:b c", "b:x"]))
    words = command_of(caught.value)
    assert words[:2] == ["extract", "/data/my clips"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options == {
        "--dataset": "folder",
        "--namespace": "mine",
        "--root": str(filled.root),
        "--model": config.model_name,
        "--output": "pooler_output",
        "--sample-rate": "16000",
        "--duration": "0.30000000000000004",
        "--dtype": "bfloat16",
        "--compute-dtype": "float16",
    }


@pytest.mark.parametrize("part", [{}, {"split": "val"}, {"node_split_id": 1, "num_nodes": 2}])
def test_command_fills_the_gap_and_nothing_else(cache, tmp_path, part):
    """Run as it stands it computes what is missing: of this split, node and class."""
    folder = tmp_path / "my clips"
    write_tones(folder, 10, "dog")
    write_tones(folder, 10, "drum")
    model = save_small_ast(tmp_path / "small ast", max_length=128)
    config = CacheConfig(duration=0.5, model_name=model_identity(model), namespace="vegas")
    dataset = VEGASDataset(folder, load_audio=False, **part)
    with cache.writer(config) as writer:
        for name in dataset.sample_ids:
            if name.endswith("dog"):
                writer.put(name, np.zeros(64, np.float32))
    with pytest.raises(CoverageError, match="CHECKPOINT_FOLDER: give require model="):
        cache.require(config, dataset)
    with pytest.raises(CoverageError) as caught:
        cache.require(config, dataset, model=model)
    result = CliRunner().invoke(app, [*command_of(caught.value), "--num-workers", "0"])
    assert result.exit_code == 0, result.output
    found = cache.require(config, dataset)
    with cache.reader(config) as reader:
        assert len(reader) == found.num_asked
    if not part:
        assert found.by_split == {"train": (14, 14), "val": (2, 2), "test": (4, 4)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint; not to be changed."""
    return save_small_ast(tmp_path_factory.mktemp("model") / "small ast", max_length=128)


def vegas(folder):
    write_tones(folder, 2, "dog")
    return open_dataset(folder)


def vegas_of_another_name(folder):
    write_tones(folder, 2, "dog")
    return open_dataset(folder, namespace="half-of-vegas")


def vegas_for_training(folder):
    write_tones(folder, 2, "dog")
    return VEGASDataset(folder, load_audio=False)


def esc50(folder):
    return open_dataset(make_esc50(folder))


def vggsound_with_a_table_elsewhere(folder):
    table = make_vggsound(folder) / "vggsound.csv"
    return open_dataset(folder, table=table.rename(folder.parent / "other table.csv"))


def folder_with_a_namespace(folder):
    return open_dataset(make_audio_folder(folder, classes=["bell"]), namespace="mine")


def folder_that_looks_like_hugging_face(folder):
    make_audio_folder(folder, classes=["bell"])
    (folder / "metadata.csv").write_text("file_name\n")
    return open_dataset(folder, "folder")


def hugging_face_with_columns(folder):
    saved_table(folder)
    columns = {"id_column": "key", "audio_column": "audio", "label_column": "label"}
    return open_dataset(folder, **columns)


def saved_table(folder):
    tables = pytest.importorskip("huggingface_tables")
    rows = [(name, tables.encoded(name, 0), None) for name in tables.CLASSES]
    table = tables.table(rows, key=["a", "b", "c"])
    table.save_to_disk(folder)
    return table


ADAPTERS = [
    vegas,
    vegas_of_another_name,
    vegas_for_training,
    esc50,
    vggsound_with_a_table_elsewhere,
    folder_with_a_namespace,
    folder_that_looks_like_hugging_face,
    hugging_face_with_columns,
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
def test_command_fills_the_gap_of_every_adapter(cache, tmp_path, model, adapter, monkeypatch):
    """The dataset's folder and how it was opened are in the command, from any working directory."""
    monkeypatch.chdir(tmp_path)
    dataset = adapter(tmp_path / "my clips")
    config = CacheConfig(
        duration=0.2, model_name=model_identity(model), namespace=dataset.namespace
    )
    with pytest.raises(CoverageError) as caught:
        cache.require(config, dataset, model=model)
    monkeypatch.chdir("/")
    result = CliRunner().invoke(app, [*command_of(caught.value), "--num-workers", "0"])
    assert result.exit_code == 0, result.output
    assert cache.require(config, dataset).num_asked == len(dataset.samples)
    assert cache.require(config, {"train": dataset}).num_asked == len(dataset.samples)


def test_command_for_a_dataset_that_was_moved(cache, tmp_path, model):
    """data_dir names the folder; the namespace stays that of the config."""
    dataset = open_dataset(make_audio_folder(tmp_path / "here", classes=["bell"]))
    config = CacheConfig(duration=0.2, model_name=model_identity(model), namespace="folder-here")
    (tmp_path / "here").rename(tmp_path / "there")
    for asked in (dataset, {"train": dataset}, dataset.sample_ids):
        with pytest.raises(CoverageError) as caught:
            cache.require(config, asked, model=model, data_dir=tmp_path / "there")
        assert str(tmp_path / "there") in command_of(caught.value)
        result = CliRunner().invoke(app, [*command_of(caught.value), "--num-workers", "0"])
        assert result.exit_code == 0, result.output
        assert cache.require(config, asked).fraction == 1.0
        cache.clear()


def test_what_no_command_line_can_open(cache, tmp_path, model):
    """A dataset in memory, or of a class of one's own: the Python way is told, and it works."""
    in_memory = open_dataset(saved_table(tmp_path / "unused"), namespace="mine")

    class Own:
        namespace = "mine"
        samples = in_memory.samples
        sample_ids = in_memory.sample_ids

    config = CacheConfig(duration=0.2, model_name=model_identity(model), namespace="mine")
    for dataset in (in_memory, Own()):
        with pytest.raises(CoverageError, match="in Python") as caught:
            cache.require(config, dataset, model=model)
        text = str(caught.value)
        assert "lmdbcache extract" not in text
        code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
        names = {"lmdbcache": lmdbcache, "cache": cache, "config": config, "dataset": dataset}
        exec(code, names)
        assert cache.require(config, dataset).num_present == 3
        cache.clear()


def test_another_namespace_than_the_config(cache, tmp_path, config):
    """No command can fill that gap: the two names are told instead."""
    dataset = open_dataset(make_audio_folder(tmp_path / "x", classes=["bell"]), namespace="mine")
    for asked in (dataset, {"train": dataset}):
        with pytest.raises(CoverageError, match=r"'mine'.*'vegas'") as caught:
            cache.require(config.replace(namespace="vegas"), asked, model="ast")
        assert "lmdbcache extract" not in str(caught.value)


@pytest.mark.parametrize("given", [[{"file_id": "a"}], {"train": [{"file_id": "a"}]}, "a:b", 7])
def test_what_is_no_dataset_is_refused(cache, config, given):
    """Samples in place of sample ids, one id, a number: an error that says what to give."""
    with pytest.raises(ConfigError, match="sample id"):
        cache.require(config, given)

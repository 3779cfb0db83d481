"""`lmdbcache dataset` and `partition`, and extraction from every layout."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from synthetic_layouts import make_audio_folder, make_esc50, make_vggsound

from lmdbcache import CacheConfig, EmbeddingCache, model_identity
from lmdbcache.cache import read_failures
from lmdbcache.datasets import open_dataset, partition_samples, split_samples


@pytest.fixture
def esc50(tmp_path):
    return make_esc50(tmp_path / "ESC-50")


@pytest.fixture
def options(ast_folder):
    return ("--model", ast_folder, "--duration", "0.2", "--num-workers", "0")


def counts(cli, *arguments):
    """(samples asked, extracted, failed) of an extraction."""
    result = cli("extract", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    return summary["num_samples"], summary["num_extracted"], len(summary["failures"])


def test_dataset_shows_what_a_folder_is(cli, esc50):
    """Layout, namespace, classes, labels, splits and folds, as a table and as JSON."""
    text = cli("dataset", esc50).stdout
    assert "esc50" in text
    assert "train: 18, val: 6, test: 6" in text
    assert "hand_saw" in text
    found = json.loads(cli("dataset", esc50, "--class", "dog", "--json").stdout)
    assert (found["dataset"], found["namespace"], found["clips"]) == ("esc50", "esc50", 5)
    assert found["splits"] == {"train": 3, "val": 1, "test": 1}
    assert found["labels"] == {"dog": 0}


def test_what_is_passed_over_is_counted_by_every_command(cli, tmp_path, options):
    """`dataset`, `extract` and `coverage` count it by kind, suffix and class, and warn."""
    root = make_audio_folder(tmp_path / "sounds")
    assert "left out" not in cli("extract", root, *options).stderr
    for n in range(5):
        (root / "bell" / f"m{n}.m4a").write_bytes(b"x")
    (root / "stray.aac").write_bytes(b"x")
    (root / "wind" / "gone.wav").symlink_to("nowhere.wav")
    (root / "wind" / "loop").symlink_to("loop")
    expected = {
        "count": 8,
        "by_suffix": {".m4a": 5, ".aac": 1, ".wav": 1},
        "by_class": {"bell": 5, "wind": 2},
    }
    found = json.loads(cli("dataset", root, "--json").stdout)
    assert len(found["left_out"]) == 8
    assert expected.items() <= found["left_out_counts"].items()
    for command in (["extract", "--dry-run"], ["extract"], ["coverage"]):
        result = cli(*command, root, *options[:4], "--json")
        assert result.returncode == 0, result.stderr
        assert expected.items() <= json.loads(result.stdout)["left_out"].items()
        assert "6 left out" in result.stderr
    text = cli("dataset", root).stdout
    row = next(line.split() for line in text.splitlines() if ".m4a" in line)
    assert row[-3:] == ["bell", ".m4a", "5"]
    assert "8 files or rows" in cli("coverage", root, *options[:4]).stdout


def test_missing_files_are_reported_and_listed(cli, tmp_path, options):
    """A warning counts them, --left-out lists them, --json has them."""
    root = make_vggsound(tmp_path / "VGGSound")
    result = cli("extract", root, *options, "--dry-run")
    assert "2 left out: listed, but not on disk" in result.stderr
    listed = cli("dataset", root, "--left-out").stdout
    assert "left out: gone0000000_000030:people marching: listed, but not on disk" in listed
    found = json.loads(cli("dataset", root, "--json").stdout)
    assert [item["name"] for item in found["left_out"]] == [
        "gone0000000_000030:people marching",
        "gone0000001_000030:people marching",
    ]


def test_extract_from_esc50_by_fold_and_split(cli, esc50, options, tmp_path):
    """Folds and splits choose; what another run has stored isn't computed again."""
    assert counts(cli, esc50, *options, "--fold", 1, "--fold", 2, "--class", "dog") == (2, 2, 0)
    assert counts(cli, esc50, *options, "--split", "test", "--dataset", "esc50") == (6, 6, 0)
    result = cli("coverage", esc50, *options[:4])
    assert result.returncode == 1
    assert "8 of 30 stored" in result.stdout
    (store,) = EmbeddingCache(tmp_path / "cache").stores()
    assert store.config.namespace == "esc50"
    assert store.dataset_root == str(esc50)


def test_extract_from_vggsound_with_a_table_elsewhere(cli, tmp_path, options):
    """--csv names the table; its own splits are used."""
    root = make_vggsound(tmp_path / "VGGSound")
    table = (root / "vggsound.csv").rename(tmp_path / "elsewhere.csv")
    assert counts(cli, root, *options, "--csv", table, "--split", "test") == (3, 3, 0)


def test_extract_from_a_folder_of_four_formats(cli, tmp_path, options):
    """wav, flac, ogg and mp3 under two classes."""
    root = make_audio_folder(tmp_path / "my sounds", classes=["bell", "wind"])
    assert counts(cli, root, *options) == (10, 10, 0)


def test_two_folders_of_one_name_in_one_root(cli, refused, tmp_path, options):
    """The second is refused until it gets a namespace of its own."""
    one, other = (make_audio_folder(tmp_path / p / "data", classes=["bell"]) for p in "ab")
    config = CacheConfig(
        duration=0.2, model_name=model_identity(options[1]), namespace="folder-data"
    )
    with EmbeddingCache(tmp_path / "cache").writer(config, dataset_root=one) as writer:
        writer.put("clip_0:bell", np.ones(64))
    assert "1 of 5 stored" in cli("coverage", one, *options[:4]).stdout
    line = refused("extract", other, *options)
    assert "folder-data" in line
    assert str(one) in line
    assert "--namespace" in line
    assert "--namespace" in refused("coverage", other, *options[:4])
    result = cli("extract", other, *options, "--namespace", "other", "--dry-run")
    assert "5 samples: 0 are cached, 5 to extract" in result.stdout


def test_extract_from_hugging_face(cli, tmp_path, options):
    """Clips as bytes in a saved dataset, decoded in worker processes; a bad one is named."""
    tables = pytest.importorskip("huggingface_tables")
    rows = [(name, tables.encoded(name, 0), None) for name in tables.CLASSES]
    rows.append(("wind", b"not audio", None))
    tables.table(rows, key=["a", "b", "c", "d"]).save_to_disk(tmp_path / "saved")
    arguments = (tmp_path / "saved", *options[:4], "--id-column", "key", "--num-workers", "1")
    result = cli("extract", *arguments)
    assert result.returncode == 1
    first, second, _ = result.stdout.splitlines()
    assert first.startswith("4 samples: 0 were cached, 3 extracted, 1 failed")
    assert second.startswith("failed: d:wind: ")
    assert "row 3" in second
    assert "not readable as audio" in second
    again = cli("coverage", *arguments[:-2], "--audio-column", "audio", "--label-column", "label")
    assert "3 of 4 stored" in again.stdout


def test_partition_shows_nodes_and_audits_them(cli, esc50):
    """Classes by node, sizes by split, and whether clips are shared; the same as extract takes."""
    arguments = ("--num-nodes", 3, "--dirichlet", 0.3, "--seed", 1)
    result = cli("partition", esc50, *arguments)
    assert result.returncode == 0
    assert "no two of 9 parts share a sample id" in result.stdout
    assert "node 2 train" in result.stdout
    found = json.loads(cli("partition", esc50, *arguments, "--json").stdout)
    assert found["audit"]["is_disjoint"]
    assert sum(node["samples"] for node in found["nodes"]) == 30
    for number, node in enumerate(found["nodes"]):
        if node["samples"]:
            one = cli("dataset", esc50, *arguments, "--node-split-id", number, "--json")
            assert json.loads(one.stdout)["classes"] == node["classes"]


def test_partition_finds_copies_between_splits(cli, tmp_path):
    """A file that lies in train and test is found by its content; exit code 1."""
    for split in ("train", "test"):
        make_audio_folder(tmp_path / "data" / split, classes=["bell"], suffixes=["wav"])
    by_name = cli("partition", tmp_path / "data", "--num-nodes", 1)
    assert by_name.returncode == 0
    result = cli("partition", tmp_path / "data", "--num-nodes", 1, "--content")
    assert result.returncode == 1
    assert "share by content: test/clip_0:bell" in result.stdout.replace("train/clip_0:bell = ", "")


def test_partition_by_samples_per_node(cli, refused, esc50, options):
    """Node k gets its K of every class, as extract takes them with either number beside K."""
    arguments = ("--samples-per-node", 2)
    assert "--num-nodes" in refused("partition", esc50, *arguments)
    found = json.loads(cli("partition", esc50, *arguments, "--num-nodes", 2, "--json").stdout)
    assert found["audit"]["is_disjoint"]
    assert [set(node["classes"].values()) for node in found["nodes"]] == [{2}, {2}]
    for more in ((), ("--num-nodes", 2)):
        chosen = (*arguments, "--node-split-id", 1, *more)
        one = json.loads(cli("dataset", esc50, *chosen, "--json").stdout)
        assert one["classes"] == found["nodes"][1]["classes"]
    line = refused("extract", esc50, *options, *arguments, "--num-nodes", 2, "--node-split-id", 2)
    assert "it is 0 to 1" in line
    assert "--samples-per-node" in refused("extract", esc50, *options, "--node-split-id", 2)


def test_splits_of_scikit_learn(cli, tmp_path):
    """--split-method is that of nodes and ratios, in every command."""
    root = make_audio_folder(tmp_path / "sounds", classes=["bell", "wind"], suffixes=["wav"] * 12)
    samples = open_dataset(root).samples
    part = ("--num-nodes", 2, "--split-method", "sklearn", "--json")
    found = json.loads(cli("partition", root, *part).stdout)
    nodes = partition_samples(samples, 2, split_method="sklearn")
    assert found["audit"]["sizes"] == {
        f"node {node} {split}": len(
            split_samples(nodes[node], split, seed=42 + node, split_method="sklearn")
        )
        for node in range(2)
        for split in ("train", "val", "test")
    }
    shown = json.loads(cli("dataset", root, *part, "--node-split-id", 1).stdout)
    assert shown["splits"] == {
        split: found["audit"]["sizes"][f"node 1 {split}"] for split in shown["splits"]
    }


def test_partition_shows_one_node(cli, refused, esc50):
    """--node-split-id shows that node alone; out of range is an error."""
    whole = json.loads(cli("partition", esc50, "--num-nodes", 3, "--json").stdout)
    arguments = ("--num-nodes", 3, "--node-split-id", 1)
    found = json.loads(cli("partition", esc50, *arguments, "--json").stdout)
    assert found["nodes"] == [whole["nodes"][1]]
    text = cli("partition", esc50, *arguments).stdout
    assert "node 1" in text
    assert "node 0" not in text
    for number in (7, 3, -1):
        line = refused("partition", esc50, "--num-nodes", 3, "--node-split-id", number)
        assert f": {number}" in line


@pytest.mark.parametrize("layout", ["esc50", "vegas", "folder"])
@pytest.mark.parametrize("number", [0, -3])
def test_samples_per_class_below_one(refused, esc50, data, tmp_path, layout, number):
    """An error on every layout, not all samples."""
    folder = {"esc50": esc50, "vegas": data}.get(layout)
    folder = folder or make_audio_folder(tmp_path / "sounds", classes=["bell"])
    for command, *more in (["dataset"], ["partition", "--num-nodes", 1]):
        line = refused(command, folder, "--samples-per-class", number, *more)
        assert f"--samples-per-class: {number}" in line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--layout", "fsd50k"], "'fsd50k'"),
        (["--fold", "9"], "folds are 1, 2"),
        (["--split", "dev"], "'train', 'val'"),
        (["--split-by", "own"], "--split-by: 'own'"),
        (["--split-method", "random"], "--split-method: 'random'"),
        (["--num-nodes", "3"], "--node-split-id"),
        (
            ["--num-nodes", "3", "--node-split-id", "0", "--node-shares", "a,b"],
            "--node-shares: 'a,b'",
        ),
        (["--namespace", "vegas"], "it belongs to vegas"),
        (["--csv", "x.csv", "--dataset", "esc50"], "--csv: not an option"),
        (["--class", "cow"], "'cow'"),
    ],
)
def test_wrong_choices(refused, esc50, options, arguments, word):
    """One line that says what may be chosen."""
    assert word in refused("extract", esc50, *options, *arguments)


def test_partition_needs_a_number_of_nodes(refused, esc50):
    """Without it there is nothing to divide by."""
    assert "--num-nodes" in refused("partition", esc50)


@pytest.mark.parametrize("command", ["dataset", "partition"])
def test_no_heavy_imports(command, esc50):
    """Looking at a dataset needs neither torch nor an audio library, nor `datasets`."""
    code = (
        "import sys\nfrom lmdbcache.cli import main\n"
        f"sys.argv = ['lmdbcache', {command!r}, {str(esc50)!r}, '--num-nodes', '2',"
        " '--node-split-id', '0']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'soundfile', 'soxr', 'tqdm', 'datasets', 'pyarrow'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_failures_of_vegas_have_whole_paths(cli, data, options, tmp_path):
    """As in every other layout, also where the folder was named by a relative path."""
    (data / "dog" / "audios" / "broken.wav").write_bytes(b"no audio")
    assert cli("extract", data.relative_to(tmp_path), *options).returncode == 1
    (store,) = EmbeddingCache(tmp_path / "cache").stores()
    (failure,) = read_failures(store.path)
    assert failure.path == str(data / "dog" / "audios" / "broken.wav")


def test_hint_at_the_nearest_store(cli, refused, esc50, options):
    """Told for a new store that differs in few fields; not beside a usage error, not at others."""
    options = (*options, "--class", "dog")
    assert cli("extract", esc50, *options).stderr == ""
    near = (*options[-2:], "--model", options[1], "--duration", "0.3", "--num-workers", "0")
    assert "output" in refused("extract", esc50, *near, "--output", "foo")
    hint = cli("extract", esc50, *near).stderr
    assert "new store; the nearest stored" in hint
    assert "--duration 0.3 here, 0.2 there" in hint
    assert "miss" not in hint
    other = ("--duration", "0.4", "--dtype", "float16")
    chosen = (*options[:2], *options[-2:], "--num-workers", "0")
    assert cli("extract", esc50, *chosen, *other, "--output", "mean").stderr == ""

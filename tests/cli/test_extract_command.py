"""`lmdbcache extract`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_disks import empty, fill, small_disk

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.extraction import extract


@pytest.fixture
def options(ast_folder):
    return ("--model", ast_folder, "--duration", "0.5", "--class", "dog", "--class", "drum")


@pytest.fixture
def filled(tmp_path, data, ast_folder):
    """The root with the embeddings of the dataset's sound clips."""
    from lmdbcache import model_identity

    config = CacheConfig(duration=0.5, model_name=model_identity(ast_folder), namespace="vegas")
    clips = {f"{path.stem}:{path.parts[-3]}": path for path in sorted(data.glob("*/audios/*.wav"))}
    cache = EmbeddingCache(tmp_path / "cache")
    extract(cache, config, clips, model=ast_folder, num_workers=0)
    return cache, config


def test_first_run(cli, data, options, tmp_path):
    """All sound clips are stored, the broken one is told; exit code 1 as one failed."""
    broken = data / "dog" / "audios" / "bröken.wav"
    broken.write_bytes(b"not audio")
    result = cli("extract", data.name, *options, "--progress")
    assert result.returncode == 1, result.stderr
    first, second, store = result.stdout.splitlines()
    assert first.startswith("7 samples: 0 were cached, 6 extracted, 1 failed")
    assert second.startswith("failed: bröken:dog: ")
    assert "not readable as audio" in second
    assert store.startswith(str(tmp_path / "cache"))
    assert "7/7" in result.stderr
    (info,) = EmbeddingCache(tmp_path / "cache").stores()
    assert info.num_embeddings == 6
    assert info.dataset_root == str(data)


def test_several_stores(cli, data, options, tmp_path):
    """Each output is planned and stored as each dtype; a clip that fails is printed once."""
    (data / "dog" / "audios" / "broken.wav").write_bytes(b"not audio")
    several = ("--output", "mean", "--output", "pooler_output", "--dtype", "float32")
    several += ("--dtype", "float16", "--dtype", "float32")
    plans = json.loads(cli("extract", data, *options, *several, "--dry-run", "--json").stdout)
    assert len({plan["store"] for plan in plans}) == 4
    together = sum(plan["bytes_needed"] for plan in plans)
    assert {plan["bytes_needed_together"] for plan in plans} == {together}
    result = cli("extract", data, *options, *several)
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("6 extracted, 1 failed") == 4
    assert result.stdout.count("failed: broken:dog: ") == 1
    stores = {info.path for info in EmbeddingCache(tmp_path / "cache").stores()}
    assert stores == {Path(plan["store"]) for plan in plans}


def test_windows(cli, data, ast_folder):
    """Recordings are planned, stored, counted and removed by their ids in the dataset."""
    model = ("--model", ast_folder, "--window", "0.2", "--hop", "0.1")
    (clip, *_) = sorted(path.stem for path in data.glob("dog/audios/*.wav"))
    plan = json.loads(cli("extract", data, *model, "--dry-run", "--json").stdout)
    assert plan["num_windows"] == 4 * plan["num_missing"]
    result = cli("extract", data, *model)
    assert result.returncode == 0, result.stderr
    assert f"{plan['num_missing']} extracted ({plan['num_windows']} windows)" in result.stdout
    assert cli("coverage", data, *model).returncode == 0
    assert cli("explain", *model, f"{clip}:dog").returncode == 0
    removed = cli("rm", "--all", "--sample", f"{clip}:dog", "--yes")
    assert "removed 4 embeddings" in removed.stdout, removed.stderr
    found = json.loads(cli("coverage", data, *model, "--json").stdout)
    assert found["missing"] == [f"{clip}:dog"]
    both = cli("extract", data, *model, "--duration", "5")
    assert both.returncode == 1
    assert "duration: 5.0 s, where the window is 0.2 s" in both.stderr


def test_cached_run(cli, filled, data, options):
    """A run that finds everything says so, in JSON completely, and exits with 0."""
    cache, config = filled
    result = cli("extract", data, *options)
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith("6 samples: 6 were cached, 0 extracted, 0 failed")
    summary = json.loads(cli("extract", data, *options, "--json").stdout)
    assert summary.pop("seconds") >= 0
    assert summary == {
        "store": str(cache.path(config)),
        "fingerprint": config.fingerprint,
        "num_samples": 6,
        "num_cached": 6,
        "num_extracted": 0,
        "num_silent": 0,
        "silent": [],
        "cancelled": [],
        "equal": [],
        "num_equal": 0,
        "left_out": {"count": 0, "by_kind": {}, "by_suffix": {}, "by_class": {}},
        "failures": [],
        "moved_model": "",
        "compute_seconds": 0.0,
        "built_model": False,
        "num_suspects": 0,
        "num_windows": None,
        "rank": 0,
        "world_size": 1,
    }


def test_cached_run_imports_no_model_library(imported, filled, data, options):
    """A fully cached run imports neither torch nor transformers."""
    heavy = ["torch", "transformers", "torchaudio", "soundfile"]
    assert imported(heavy, "extract", data, "--root", filled[0].root, *options) == (0, set())


def test_coverage_takes_the_same_options(cli, filled, data, options):
    """What `extract` has stored, `coverage` with its options finds."""
    result = cli("coverage", data, *options)
    assert result.returncode == 0
    assert "6 of 6 stored (100.0 %)" in result.stdout


def test_compute_dtype(cli, filled, data, options):
    """What the model computes in is part of the store's identity, for every command."""
    bfloat16 = (*options, "--compute-dtype", "bfloat16")
    assert cli("coverage", data, *bfloat16).returncode == 1
    result = json.loads(cli("extract", data, *bfloat16, "--json").stdout)
    assert (result["num_cached"], result["num_extracted"]) == (0, 6)
    assert cli("coverage", data, *bfloat16).returncode == 0
    assert json.loads(cli("info", result["fingerprint"], "--json").stdout)["config"][
        "compute_dtype"
    ] == ("bfloat16")
    _, config = filled
    assert result["fingerprint"] == config.replace(compute_dtype="bfloat16").fingerprint


def test_dry_run(cli, data, options, tmp_path):
    """It tells what is missing and the space for it, and changes nothing."""
    result = cli("extract", data, *options, "--dry-run")
    assert result.returncode == 0
    counts, space, _ = result.stdout.splitlines()
    assert counts == "6 samples: 0 are cached, 6 to extract"
    assert "needed" in space
    assert "free" in space
    plan = json.loads(cli("extract", data, *options, "--dry-run", "--json").stdout)
    assert (plan["num_missing"], plan["embedding_shape"], plan["fits"]) == (6, [64], True)
    assert not (tmp_path / "cache").exists()


def test_warnings_of_a_plan(cli, data, options):
    """What the machine won't bear is said after the plan, with the way out, and in JSON."""
    tiny = (
        "from lmdbcache.cli import extract\n"
        "from lmdbcache.extraction import estimate\n"
        "extract._TRIAL_SECONDS = 0.1\n"
        "estimate.memory_limit = lambda: 4096\n"  # a very small machine
    )

    def run(*more):
        result = cli("extract", data, *options, *more, prepare=tiny)
        assert result.returncode == 0, result.stderr
        return result.stdout

    warnings = [line for line in run("--dry-run").splitlines() if line.startswith("warning: ")]
    (memory,) = [line for line in warnings if "of random reads will wait" in line]
    assert "4.0 KiB of memory" in memory
    assert "--dtype float16" in memory
    found = [entry["name"] for entry in json.loads(run("--plan", "--json"))["limits"]]
    assert found == ["memory"]
    assert len(found) == len(warnings)


def test_full_disk(cli, data, options, tmp_path):
    """Exit code 3, one line with the bytes and what is stored; again once there is room."""
    with small_disk(tmp_path / "disk", 32) as disk:
        root = disk / "cache"
        fill(disk, 8 << 20)
        result = cli("extract", data, *options, root=root)
        assert result.returncode == 3
        (line,) = result.stderr.splitlines()
        assert "8.0 MiB are free" in line
        assert "0 of 6 are stored; run the same command again after that" in line
        assert cli("extract", data, *options, "--dry-run", root=root).returncode == 3
        empty(disk)
        assert cli("extract", data, *options, root=root).returncode == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--sample-rate", "0"], ["--sample-rate: 0", "16000"]),
        (["--sample-rate", "8000"], ["--sample-rate: 8000", "16000"]),
        (["--duration", "nan"], ["duration: nan", "5.0"]),
        (["--duration", "-1"], ["duration: -1"]),
        (["--duration", "0.01"], ["duration: 0.01", "400"]),
        (["--dtype", "foo"], ["dtype: 'foo'", "bfloat16"]),
        (["--compute-dtype", "foo"], ["--compute-dtype: 'foo'", "bfloat16"]),
        (["--output", "logits"], ["output: 'logits'", "pooler_output"]),
        (["--batch-size", "-1"], ["--batch-size: -1"]),
        (["--num-workers", "-1"], ["--num-workers: -1"]),
        (["--commit-seconds", "nan"], ["--commit-seconds: nan"]),
        (["--class", "cow"], ["'cow'", "baby_cry"]),
        (["--split", "holdout"], ["split: 'holdout'", "train"]),
        (["--model", "./nowhere"], ["nowhere: no such folder", "save_pretrained"]),
    ],
)
def test_wrong_values(refused, data, options, tmp_path, wrong, words):
    """A value that can't be used is one line that names the field and what it may be."""
    line = refused("extract", data, *options, *wrong)
    assert all(word in line for word in words), line
    assert not (tmp_path / "cache").exists()


def test_not_a_number(cli, data, options):
    """Text where a number belongs is wrong usage: exit code 2, naming the option."""
    for option in ("--sample-rate", "--duration", "--batch-size"):
        result = cli("extract", data, *options, option, "abc")
        assert result.returncode == 2
        assert option in result.stderr


def test_no_such_dataset(refused, options, tmp_path):
    """A folder that isn't there is named, one that isn't a dataset with the expected layout."""
    for folder in (tmp_path / "nowhere", tmp_path):
        line = refused("extract", folder, *options)
        assert str(folder) in line
        assert ("audios" in line) == folder.exists()


def test_root_that_is_a_file(refused, filled, data, options, tmp_path):
    """A root that can't hold anything is one line."""
    (tmp_path / "file").write_text("")
    line = refused("extract", data, *options, root=tmp_path / "file")
    assert str(tmp_path / "file") in line

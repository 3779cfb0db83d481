"""`lmdbcache verify --sources`, `audit`, `extract --plan` and `extract --changed`."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from extraction.clips import tone, write
from small_disks import fill, small_disk

from lmdbcache import CacheConfig, EmbeddingCache, model_identity
from lmdbcache.cache import SOURCES_NAME
from lmdbcache.extraction import extract


@pytest.fixture
def options(ast_folder):
    return ("--model", ast_folder, "--duration", "0.5", "--num-workers", 0)


@pytest.fixture
def filled(tmp_path, data, ast_folder):
    """(cache, config) with the embeddings of six clips."""
    config = CacheConfig(duration=0.5, model_name=model_identity(ast_folder), namespace="vegas")
    clips = {f"{path.stem}:{path.parts[-3]}": str(path) for path in data.glob("*/audios/*.wav")}
    cache = EmbeddingCache(tmp_path / "cache")
    extract(cache, config, clips, model=ast_folder, num_workers=0, dataset_root=data)
    return cache, config


def clip(data, name, number):
    return data / name / "audios" / f"video_{number:05d}.wav"


def test_changed_files_are_shown_and_computed_again(cli, filled, data, options):
    """Found, named, recomputed by `extract --changed`, and fine after that."""
    store = filled[1].fingerprint
    result = cli("verify", store, "--sources")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "6 unchanged, 0 touched, 0 changed, 0 vanished, 0 unknown" in result.stdout
    write(clip(data, "dog", 0), tone(900.0))
    os.utime(clip(data, "dog", 1), (1, 1))
    result = cli("verify", store, "--sources", "--progress")
    assert result.returncode == 1
    assert "4 unchanged, 1 touched, 1 changed" in result.stdout
    assert "changed: video_00000:dog: " in result.stdout
    assert "--changed" in result.stdout
    assert "6/6" in result.stderr
    assert "2 cached clips" in cli("extract", data, *options).stdout
    result = cli("extract", data, *options, "--changed")
    assert result.returncode == 0, result.stderr
    assert "5 were cached, 1 extracted" in result.stdout
    (found,) = json.loads(cli("verify", store, "--sources", "--hash", "--json").stdout)
    assert found["is_trusted"]
    assert (found["num_unchanged"], found["num_touched"]) == (5, 1)
    assert found["by_class"]["dog"] == {"unchanged": 2, "touched": 1}


def test_moved_and_vanished(cli, filled, data):
    """A moved dataset is found with --data; a deleted clip isn't."""
    store = filled[1].fingerprint
    moved = data.rename(data.parent / "moved")
    result = cli("verify", store, "--sources")
    assert result.returncode == 1
    assert "6 vanished" in result.stdout
    assert "--data" in result.stdout
    assert cli("verify", store, "--sources", "--data", moved).returncode == 0
    clip(moved, "drum", 2).unlink()
    (found,) = json.loads(cli("verify", "--all", "--sources", "--data-dir", moved, "--json").stdout)
    (vanished,) = found["found"]
    assert vanished["sample_id"] == "video_00002:drum"
    assert vanished["path"] == str(clip(moved, "drum", 2))


def test_adopting(cli, refused, filled, data):
    """Embeddings without records are unknown, which is no failure; --adopt records their files."""
    cache, config = filled
    (cache.path(config) / SOURCES_NAME).unlink()
    result = cli("verify", config.fingerprint, "--sources")
    assert result.returncode == 0
    assert "no file is known for 6 embeddings" in result.stdout
    assert "--data" in refused("verify", config.fingerprint, "--sources", "--adopt")
    adopt = ("verify", config.fingerprint, "--sources", "--data-dir", data, "--adopt")
    result = cli(*adopt)
    assert "recorded 6 sources" in result.stdout
    assert "6 unchanged" in result.stdout
    (cache.path(config) / SOURCES_NAME).write_bytes(b"rubbish" * 1000)
    assert "is damaged" in refused("verify", config.fingerprint, "--sources")
    assert cli(*adopt).returncode == 0


def test_options_that_need_sources(refused, filled):
    """An option that would be ignored is refused."""
    for option in (("--hash",), ("--data", "x"), ("--adopt",)):
        assert "need --sources" in refused("verify", filled[1].fingerprint, *option)


def test_adopting_another_dataset(refused, cache, configs, data, tmp_path):
    """The files of one dataset aren't taken for those of another."""
    other = EmbeddingCache(tmp_path / "other")
    config = configs[0].replace(namespace="esc50")
    with other.writer(config) as writer:
        writer.put("a:dog", np.ones(8))
    line = refused("verify", "--all", "--sources", "--data-dir", data, "--adopt", root=other.root)
    assert "esc50" in line


def test_audit(cli, filled, tmp_path, ast_folder):
    """Agrees with the model that filled the store, which is looked for where it was."""
    _, config = filled
    other = tmp_path / "elsewhere"
    ast_folder.rename(other)
    try:
        result = cli("audit", config.fingerprint)
        assert result.returncode == 1
        assert "small-ast@" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        audit = ("audit", config.fingerprint, "--model", other, "--num-workers", 0)
        found = json.loads(cli(*audit, "--samples", 2, "--json").stdout)
        assert found["is_sound"]
        assert len(found["samples"]) == 2
    finally:
        other.rename(ast_folder)
    result = cli("audit", config.fingerprint, "--num-workers", 0)
    assert result.returncode == 0, result.stderr
    assert "6 embeddings compared, all as stored (tolerance 1e-05)" in result.stdout


def test_audit_names_other_weights_first(cli, filled, tmp_path):
    """The reason comes before the figures."""
    from small_ast import save_small_ast

    other = save_small_ast(tmp_path / "other-ast", seed=1, max_length=128)
    result = cli("audit", filled[1].fingerprint, "--model", other, "--num-workers", 0)
    assert result.returncode == 1
    assert result.stdout.startswith("OTHER WEIGHTS: ")
    assert "6 of 6 embeddings DRIFTED" in result.stdout


def test_audit_of_vanished_files(cli, filled, data):
    """Nothing to compare is no success."""
    data.rename(data.parent / "moved")
    result = cli("audit", filled[1].fingerprint)
    assert result.returncode == 1
    assert "NOTHING compared" in result.stdout
    assert "skipped: " in result.stdout


SHORT_TRIAL = "from lmdbcache.cli import extract; extract._TRIAL_SECONDS = 0.2"


def test_plan(cli, data, options, tmp_path):
    """A table of every output and dtype, and a time; nothing is stored."""
    arguments = ("extract", data, *options, "--plan", "--dtype", "float16")
    result = cli(*arguments, prepare=SHORT_TRIAL)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "cache").exists()
    (chosen,) = [line for line in result.stdout.splitlines() if line.startswith("*")]
    assert chosen.split()[1:3] == ["pooler_output", "float16"]
    assert "last_hidden_state  bfloat16" in result.stdout
    assert "clips/s" in result.stdout


def test_plan_that_does_not_fit(cli, data, options):
    """Exit code 3, as for an extraction that has no room."""
    with small_disk(data.parent / "disk", 4) as disk:
        fill(disk, 1 << 20)
        arguments = ("extract", data, *options, "--plan", "--json")
        result = cli(*arguments, root=disk / "cache", prepare=SHORT_TRIAL)
    assert result.returncode == 3
    plan = json.loads(result.stdout)
    assert not plan["fits"]
    assert plan["num_missing"] == 6
    assert plan["seconds"] > 0
    assert len(plan["choices"]) == 4 * 4  # outputs and dtypes

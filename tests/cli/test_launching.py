"""`lmdbcache extract` as one of several processes."""

from __future__ import annotations

import json

import pytest

from lmdbcache import EmbeddingCache


@pytest.fixture
def options(data, ast_folder):
    """Six clips in units of two."""
    fixed = ("--model", ast_folder, "--duration", "0.5", "--class", "dog", "--class", "drum")
    return (data, *fixed, "--batch-size", 2, "--num-workers", 0)


def slurm_array(task, count):
    names = {"ID": task, "COUNT": count, "MIN": 0, "MAX": count - 1, "STEP": 1}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


def counts(result):
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    return tuple(summary[n] for n in ("rank", "world_size", "num_samples", "num_extracted"))


def test_tasks_of_an_array_stage_and_merge(cli, options, tmp_path):
    """Each task fills a store of its own; `merge` makes one of them, and nothing is left to do."""
    staging = tmp_path / "staging"
    array = (*options, "--launcher", "auto", "--staging", staging, "--json")
    for task, number in ((2, 2), (0, 2), (1, 2)):
        result = cli("extract", *array, **slurm_array(task, 3))
        assert counts(result) == (task, 3, 2, number)
        assert result.stderr == ""
    assert not (tmp_path / "cache").exists()
    resumed = cli("extract", *array, **slurm_array(0, 1))
    assert counts(resumed) == (0, 1, 6, 0)
    merged = cli("merge", staging)
    assert merged.returncode == 0, merged.stderr
    (info,) = EmbeddingCache(tmp_path / "cache").stores()
    assert info.num_embeddings == 6
    assert counts(cli("extract", *options, "--json")) == (0, 1, 6, 0)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"},
        slurm_array(1, 2),
    ],
)
def test_a_rank_says_which_it_is(cli, options, environment):
    """Its summary and its lines on standard error begin with the rank."""
    result = cli("-v", "extract", *options, "--launcher", "auto", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("rank 1 of 2: 2 samples: 0 were cached, 2 extracted")
    assert "rank 1 of 2: INFO lmdbcache.extraction.pipeline: 2 clips to extract, 0 cached" in (
        result.stderr.splitlines()
    )


def test_errors_of_a_rank_name_it(refused, options, tmp_path):
    """Several processes write to one terminal."""
    (tmp_path / "file").write_text("")
    options = (*options, "--rank", 0, "--world-size", 2, "--staging", tmp_path / "file")
    assert refused("extract", *options).startswith("lmdbcache: rank 0 of 2: ")


def test_any_other_launcher(cli, options):
    """--rank and --world-size stand for what no variable says; a dry run tells of the share."""
    result = cli("extract", *options, "--rank", 2, "--world-size", 4, "--json")
    assert counts(result) == (2, 4, 2, 2)
    plan = json.loads(
        cli("extract", *options, "--rank", 3, "--world-size", 4, "--dry-run", "--json").stdout
    )
    assert (plan["num_samples"], plan["num_missing"]) == (0, 0)
    nothing = cli("extract", *options, "--rank", 3, "--world-size", 4, "--json")
    assert counts(nothing) == (3, 4, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--rank", 1), {}, "--rank and --world-size: give both"),
        (("--rank", 2, "--world-size", 2), {}, "rank: 2 "),
        (("--rank", 0, "--world-size", 2, "--launcher", "auto"), {}, "not with --launcher auto"),
        (("--launcher", "mpi"), {}, "known are"),
        (("--launcher", "torchrun"), {}, "RANK and WORLD_SIZE aren't set"),
        (("--launcher", "slurm"), {}, "neither a task of srun"),
        (("--launcher", "auto"), {"RANK": "0"}, "WORLD_SIZE isn't set"),
    ],
)
def test_what_makes_no_sense_is_refused(refused, options, arguments, environment, message):
    """In one line, and nothing is computed."""
    assert message in refused("extract", *options, *arguments, **environment)


def test_a_launcher_that_is_not_asked_for_is_named(cli, options):
    """Under torchrun a command without --launcher computes everything, and says so."""
    result = cli("extract", *options, "--json", RANK="0", WORLD_SIZE="2")
    assert counts(result) == (0, 1, 6, 6)
    assert "this process takes all clips; --launcher torchrun takes its share" in result.stderr


def test_several_machines_without_staging_are_told(cli, options, tmp_path):
    """Each machine would keep a part, and nothing would bring them together."""
    machines = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
    launched = (*options, "--launcher", "auto", "--json")
    warned = cli("extract", *launched, **machines)
    assert counts(warned) == (0, 4, 2, 2)
    assert "there are ranks on other machines" in warned.stderr
    staged = cli("extract", *launched, "--staging", tmp_path / "staging", **machines)
    assert counts(staged) == (0, 4, 2, 0)
    assert staged.stderr == ""


def test_auto_without_a_launcher_takes_everything(cli, options):
    """One script serves one process and many."""
    result = cli("extract", *options, "--launcher", "auto", "--json")
    assert counts(result) == (0, 1, 6, 6)
    assert result.stderr == ""

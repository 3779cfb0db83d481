"""Shares: whole units, each in one share; and what launchers say about them."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given, strategies as st

from lmdbcache.embedders import PretrainedModel, device_of_rank
from lmdbcache.errors import ConfigError
from lmdbcache.extraction import (
    RankShare,
    extract,
    is_on_several_machines,
    launched_by,
    share_from_environment,
)
from lmdbcache.extraction.pipeline import units_of
from lmdbcache.machine import available_cores

_samples = st.sets(st.integers(0, 999).map(lambda number: f"{number:03d}:dog"), max_size=60)


@given(_samples, _samples, st.integers(1, 9), st.integers(1, 7))
def test_shares_are_whole_units(asked, stored, unit_size, world_size):
    """Cut again, a share's samples are `units[rank::world_size]`, whatever is stored already."""
    shuffled = random.sample(sorted(asked), len(asked))
    units = units_of(asked, asked - stored, unit_size)
    for rank in range(world_size):
        share = RankShare(rank, world_size).of(shuffled, unit_size)
        assert units_of(share, asked - stored, unit_size) == units[rank::world_size]


@given(_samples, _samples, st.integers(1, 9))
def test_what_is_stored_moves_nothing_to_another_unit(asked, stored, unit_size):
    """A sample is computed with the same others, whatever is stored already."""
    whole = units_of(asked, asked, unit_size)
    rest = units_of(asked, asked - stored, unit_size)
    assert rest == [[i for i in unit if i not in stored] for unit in whole]


@pytest.mark.parametrize("fields", [(2, 2), (-1, 2), (0, 0), (0, 2, -1, 2)])
def test_impossible_shares_are_refused(fields):
    """A rank counts from 0 and is less than the world size."""
    with pytest.raises(ConfigError):
        RankShare(*fields)


def test_units_of_nothing_are_refused():
    """Also in a dry run."""
    with pytest.raises(ConfigError, match="batch_size: 0"):
        RankShare(0, 2).of(["a:dog"], 0)


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    """Decoding processes are chosen so that all ranks of a machine fit; never none."""
    monkeypatch.setattr("lmdbcache.extraction.ranks.available_cores", lambda: 16)
    assert RankShare().decoding_processes() == 8
    assert RankShare(1, 8, 1, 4).decoding_processes() == 2
    assert RankShare(1, 8, 1, 2, num_cores=12).decoding_processes() == 6
    assert RankShare(31, 32, 31, 32).decoding_processes() == 1


def of_srun(rank, size, **others):
    return {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size), **others}


def of_array(task, count, first=0, step=1):
    return {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_MAX": str(first + (count - 1) * step),
        "SLURM_ARRAY_TASK_STEP": str(step),
    }


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("launcher", "environment", "expected"),
    [
        ("auto", {}, RankShare()),
        ("none", TORCHRUN, RankShare()),
        ("auto", TORCHRUN, RankShare(5, 8, 1, 4)),
        ("torchrun", {**TORCHRUN, **of_srun(0, 2)}, RankShare(5, 8, 1, 4)),
        ("auto", {**TORCHRUN, **of_srun(1, 2)}, RankShare(5, 8, 1, 4)),
        ("slurm", {**TORCHRUN, **of_srun(1, 2)}, RankShare(1, 2)),
        ("auto", {"RANK": "1", "WORLD_SIZE": "2"}, RankShare(1, 2)),
        ("auto", of_srun(3, 4), RankShare(3, 4)),
        # The tasks of the step, not those of the whole job.
        ("auto", of_srun(1, 8, SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2"), RankShare(1, 2)),
        # The batch script itself is no task.
        ("auto", of_srun(0, 4, ENVIRONMENT="BATCH"), RankShare()),
        ("auto", of_srun(2, 4, ENVIRONMENT="BATCH", SLURM_STEP_ID="0"), RankShare(2, 4)),
        (
            "auto",
            of_srun(4, 5, SLURM_LOCALID="1", SLURM_NODEID="1", SLURM_STEP_TASKS_PER_NODE="3,2"),
            RankShare(4, 5, 1, 2),
        ),
        (
            "auto",
            of_srun(5, 7, SLURM_LOCALID="1", SLURM_NODEID="2", SLURM_TASKS_PER_NODE="2(x3),1"),
            RankShare(5, 7, 1, 2),
        ),
        ("auto", of_array(2, 8), RankShare(2, 8)),
        ("slurm", of_array(7, 3, first=1, step=3), RankShare(2, 3)),
        ("auto", of_array(5, 1, first=5), RankShare()),
        # Each task of an array starts three of its own.
        ("auto", {**of_array(2, 4, first=1), **of_srun(1, 3)}, RankShare(4, 12)),
        ("slurm", {**of_array(4, 4, first=1), **of_srun(2, 3)}, RankShare(11, 12)),
        ("auto", {**TORCHRUN, **of_array(1, 2)}, RankShare(13, 16, 1, 4)),
        ("torchrun", {**TORCHRUN, **of_array(1, 2)}, RankShare(5, 8, 1, 4)),
        ("auto", {**of_array(1, 2), **of_srun(0, 1, ENVIRONMENT="BATCH")}, RankShare(1, 2)),
    ],
)
def test_shares_of_launchers(launcher, environment, expected):
    """The rank and the world size that the variables say."""
    assert share_from_environment(launcher, environment) == expected


@pytest.mark.parametrize(("array", "tasks"), [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_every_share_is_taken_once(array, tasks):
    """A job array whose tasks start several processes has each rank once."""
    shares = [
        share_from_environment("auto", {**of_array(2 + a, array, first=2), **of_srun(t, tasks)})
        for a in range(array)
        for t in range(tasks)
    ]
    assert sorted(share.rank for share in shares) == list(range(array * tasks))
    assert {share.world_size for share in shares} == {array * tasks}


def test_cores_of_a_slurm_task():
    """`--cpus-per-task` is this task's alone, as far as the machine has them."""
    share = share_from_environment("slurm", of_srun(0, 4, SLURM_CPUS_PER_TASK="1000"))
    assert share.num_cores == available_cores()
    assert share_from_environment("slurm", of_srun(0, 4, SLURM_CPUS_PER_TASK="1")).num_cores == 1


@pytest.mark.parametrize(
    ("launcher", "environment", "named"),
    [
        ("mpi", {}, "'mpi'"),
        ("torchrun", {}, "WORLD_SIZE"),
        ("torchrun", of_srun(0, 2), "WORLD_SIZE"),
        ("slurm", TORCHRUN, "srun"),
        ("slurm", of_srun(0, 2, ENVIRONMENT="BATCH"), "srun"),
        ("auto", {"RANK": "1"}, "WORLD_SIZE"),
        ("auto", {"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "rank: 2"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT"),
        # A list of indexes, such as --array=1,3,7.
        ("auto", {**of_array(3, 3, first=1), "SLURM_ARRAY_TASK_MAX": "7"}, "0-2"),
        ("auto", {**of_array(2, 2, first=1), "SLURM_ARRAY_TASK_MAX": "7"}, "0-1"),
    ],
)
def test_what_makes_no_sense_is_refused(launcher, environment, named):
    """A rank that isn't known is never taken for rank 0: its clips would be missing."""
    with pytest.raises(ConfigError, match=named):
        share_from_environment(launcher, environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({**TORCHRUN, "GROUP_WORLD_SIZE": "1"}, False),
        ({**TORCHRUN, "GROUP_WORLD_SIZE": "2"}, True),
        (of_srun(0, 2, SLURM_STEP_NUM_NODES="2"), True),
        (of_srun(0, 2, SLURM_STEP_NUM_NODES="2", ENVIRONMENT="BATCH"), False),
    ],
)
def test_several_machines(environment, expected):
    """As far as the launcher tells."""
    assert is_on_several_machines(environment) == expected


@pytest.mark.parametrize(("num_gpus", "expected"), [(0, None), (1, None), (2, "cuda:1")])
def test_each_local_rank_has_a_gpu(num_gpus, expected, monkeypatch):
    """The launcher's choice stands where it shows one alone; more ranks than GPUs take turns."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    assert device_of_rank(1) == device_of_rank(3) == expected
    monkeypatch.setitem(sys.modules, "torch", None)
    assert device_of_rank(1) is None  # without torch the model says what it needs


@pytest.mark.parametrize(("device", "expected"), [(None, "cuda:1"), ("cpu", "cpu")])
def test_the_model_goes_to_the_gpu_of_its_rank(
    device, expected, monkeypatch, cache, clips, config, ast_folder
):
    """Unless a device is asked for."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    share, seen = RankShare(1, 4, 3, 4), []

    def note(self, config, device=None):
        seen.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(PretrainedModel, "make_embedder", note)
    with pytest.raises(KeyboardInterrupt):
        options = {"batch_size": 1, "num_workers": 0, "share": share, "device": device}
        extract(cache, config, clips, model=ast_folder, **options)
    assert seen == [expected]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, "torchrun"),
        (of_srun(0, 2), "slurm"),
        (of_srun(0, 1), None),
        (of_srun(0, 2, ENVIRONMENT="BATCH"), None),
        ({"RANK": "high"}, None),
    ],
)
def test_who_has_started_this_process(environment, expected):
    """Only a launcher that has started several."""
    assert launched_by(environment) == expected

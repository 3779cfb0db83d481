"""What a launcher says about the processes that it has started: torchrun, srun, job arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

from lmdbcache.errors import ConfigError
from lmdbcache.extraction.rank_share import RankShare
from lmdbcache.machine import available_cores

__all__ = ["LAUNCHERS", "is_on_several_machines", "launched_by", "share_from_environment"]

LAUNCHERS: Final = ("auto", "none", "slurm", "torchrun")
_SEVERAL_TASKS: Final = re.compile(r"(\d+)(?:\(x(\d+)\))?")  # 2(x3): two each on three machines


def share_from_environment(
    launcher: str = "auto", environment: Mapping[str, str] | None = None
) -> RankShare:
    """The share of this process, by the variables that its launcher has set.

    Args:
        launcher: `"torchrun"` (also accelerate) reads RANK and WORLD_SIZE; `"slurm"` the task of
            srun, SLURM_PROCID, and of a job array, SLURM_ARRAY_TASK_ID, and multiplies where there
            are both; `"auto"` takes what there is: torchrun before srun, each with the array;
            `"none"` takes everything.
        environment: None takes `os.environ`.

    Returns:
        All of it, with `"auto"`, where no launcher is at work.

    Raises:
        ConfigError: An unknown launcher, or its variables are missing or make no sense.
    """
    given = os.environ if environment is None else environment
    if launcher == "none":
        return RankShare()
    if launcher == "torchrun":
        share = _torchrun(given)
        if share is None:
            raise ConfigError(
                "launcher: RANK and WORLD_SIZE aren't set; start it with `torchrun --no-python "
                "lmdbcache extract …`"
            )
        return share
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher: {launcher!r}; known are {', '.join(LAUNCHERS)}, ray")
    tasks = _torchrun(given) if launcher == "auto" else None
    tasks = tasks or _srun(given)
    array = _array(given)
    if launcher == "slurm" and tasks is None and array is None:
        raise ConfigError(
            "launcher: neither a task of srun nor one of a job array; start it with `srun "
            "lmdbcache extract …`, or submit it with `sbatch --array=0-7`"
        )
    return _product(array or RankShare(), tasks or RankShare())


def launched_by(environment: Mapping[str, str] | None = None) -> str | None:
    """The launcher that has started this process among others; None if none has."""
    given = os.environ if environment is None else environment
    for launcher, find in (("torchrun", _torchrun), ("slurm", _srun)):
        with suppress(ConfigError):  # variables of something else
            found = find(given)
            if found is not None and not found.is_all:
                return launcher
    return None


def is_on_several_machines(environment: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun or srun has started processes on other machines, too, as far as is told."""
    given = os.environ if environment is None else environment
    with suppress(ConfigError):
        return _number(given, "GROUP_WORLD_SIZE", 1) > 1 or (
            _srun(given) is not None and _number(given, "SLURM_STEP_NUM_NODES", 1) > 1
        )
    return False


def _product(array: RankShare, tasks: RankShare) -> RankShare:
    """Each task of an array starts ranks of its own."""
    return replace(
        tasks,
        rank=array.rank * tasks.world_size + tasks.rank,
        world_size=array.world_size * tasks.world_size,
    )


def _torchrun(given: Mapping[str, str]) -> RankShare | None:
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return None
    local_rank = _number(given, "LOCAL_RANK", 0)
    local_world_size = _number(given, "LOCAL_WORLD_SIZE", local_rank + 1)
    return RankShare(
        _number(given, "RANK"), _number(given, "WORLD_SIZE"), local_rank, local_world_size
    )


def _srun(given: Mapping[str, str]) -> RankShare | None:
    # The batch script itself has a SLURM_PROCID of 0 and the job's SLURM_NTASKS: it is no task.
    is_step = "SLURM_STEP_ID" in given or given.get("ENVIRONMENT") != "BATCH"
    if "SLURM_PROCID" not in given or not is_step:
        return None
    size = next((n for n in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if n in given), "SLURM_NPROCS")
    local_rank = _number(given, "SLURM_LOCALID", 0)
    cores = None
    if "SLURM_CPUS_PER_TASK" in given:
        cores = max(1, min(available_cores(), _number(given, "SLURM_CPUS_PER_TASK")))
    return RankShare(
        _number(given, "SLURM_PROCID"),
        _number(given, size),
        local_rank,
        max(local_rank + 1, _tasks_here(given)),
        cores,
    )


def _tasks_here(given: Mapping[str, str]) -> int:
    """Tasks of this step on this machine; 1 if that isn't told."""
    text = given.get("SLURM_STEP_TASKS_PER_NODE", given.get("SLURM_TASKS_PER_NODE", ""))
    machines = [
        int(tasks) for tasks, times in _SEVERAL_TASKS.findall(text) for _ in range(int(times or 1))
    ]
    number = _number(given, "SLURM_NODEID", 0)
    return machines[number] if number < len(machines) else 1


def _array(given: Mapping[str, str]) -> RankShare | None:
    if "SLURM_ARRAY_TASK_ID" not in given:
        return None
    task, count = _number(given, "SLURM_ARRAY_TASK_ID"), _number(given, "SLURM_ARRAY_TASK_COUNT")
    first = _number(given, "SLURM_ARRAY_TASK_MIN", 0)
    last = _number(given, "SLURM_ARRAY_TASK_MAX", first + count - 1)
    step = (last - first) // (count - 1) if count > 1 else 1
    rank, rest = divmod(task - first, max(1, step))
    is_range = first + (count - 1) * step == last
    is_range &= count == 1 or step == _number(given, "SLURM_ARRAY_TASK_STEP", step)
    if not is_range or rest or not 0 <= rank < count:
        raise ConfigError(
            f"launcher: task {task} of a job array of {count} tasks from {first} to {last}: a list "
            "such as --array=1,3,7 doesn't tell the number of shares. Submit a range such as "
            f"--array=0-{max(1, count) - 1}, or give --rank and --world-size"
        )
    return RankShare(rank, count)


def _number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = given.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        said = f"is {text!r}, and no number" if name in given else "isn't set"
        raise ConfigError(
            f"launcher: {name} {said}; give --launcher none, or --rank and --world-size"
        ) from None

"""The processes that do one extraction together: which share each takes, as its launcher says.

torchrun, srun and job arrays set environment variables for the processes that they start.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final

from lmdbcache.errors import ConfigError
from lmdbcache.machine import available_cores

_logger: Final = logging.getLogger(__name__)

LAUNCHERS: Final = ("auto", "none", "slurm", "torchrun")
_SEVERAL_TASKS: Final = re.compile(r"(\d+)(?:\(x(\d+)\))?")  # 2(x3): two each on three machines
_POLL_SECONDS: Final = 0.5
_CONNECT_SECONDS: Final = 60.0


@dataclass(frozen=True)
class RankShare:
    """The units `units[rank::world_size]` of an extraction that several processes do together.

    Args:
        rank: Which of them, from 0.
        world_size: How many there are.
        local_rank: Which of those on this machine, from 0; chooses the GPU.
        local_world_size: How many there are on this machine, which share its cores.
        num_cores: Cores of this process; None divides the machine's.

    Raises:
        ConfigError: No such rank.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    num_cores: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or self.local_rank < 0:
            raise ConfigError(
                f"rank: {self.rank} (local_rank {self.local_rank}) with a world_size of "
                f"{self.world_size}; it must be 0 or more and less than world_size"
            )
        object.__setattr__(
            self, "local_world_size", max(self.local_world_size, self.local_rank + 1)
        )

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"

    @property
    def is_all(self) -> bool:
        """Whether this is the only process."""
        return self.world_size == 1

    def of(self, sample_ids: Iterable[str], unit_size: int) -> list[str]:
        """Return the samples of this share, sorted.

        They are whole units: cut again, they give the same ones.

        Args:
            sample_ids: All samples of the extraction, in any order.
            unit_size: Clips of a unit.

        Raises:
            ConfigError: Units of no clips.
        """
        if unit_size < 1:
            raise ConfigError(f"batch_size: {unit_size}; it must be 1 or more")
        ordered = sorted(sample_ids)
        starts = range(self.rank * unit_size, len(ordered), self.world_size * unit_size)
        return [sample_id for at in starts for sample_id in ordered[at : at + unit_size]]

    def decoding_processes(self) -> int:
        """Return how many decoding processes keep a model busy without taking its cores."""
        cores = self.num_cores or available_cores() // self.local_world_size
        return max(1, min(8, cores // 2))


def share_from_environment(
    launcher: str = "auto", environment: Mapping[str, str] | None = None
) -> RankShare:
    """Return the share of this process, by the variables that its launcher has set.

    Args:
        launcher: `"torchrun"` (also accelerate) reads RANK and WORLD_SIZE; `"slurm"` the task of
            srun, SLURM_PROCID, and of a job array, SLURM_ARRAY_TASK_ID, and multiplies them
            where there are both; `"auto"` takes what there is: torchrun before srun, each with the
            array; `"none"` takes everything.
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
                "launcher: RANK and WORLD_SIZE aren't set; start the program with torchrun or "
                "accelerate, or give `rank` and `world_size`"
            )
        return share
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher: {launcher!r}; known are {', '.join(LAUNCHERS)}, ray")
    tasks = _torchrun(given) if launcher == "auto" else None
    tasks = tasks or _srun(given)
    array = _array(given)
    if launcher == "slurm" and tasks is None and array is None:
        raise ConfigError(
            "launcher: neither a task of srun nor one of a job array; start the program with srun, "
            "submit an array, or give `rank` and `world_size`"
        )
    return _product(array or RankShare(), tasks or RankShare())


def launched_by(environment: Mapping[str, str] | None = None) -> str | None:
    """Return the launcher that has started this process among others; None if none has."""
    given = os.environ if environment is None else environment
    for launcher, find in (("torchrun", _torchrun), ("slurm", _srun)):
        with suppress(ConfigError):  # variables of something else
            found = find(given)
            if found is not None and not found.is_all:
                return launcher
    return None


def is_on_several_machines(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether torchrun or srun says that it has started processes on other machines."""
    given = os.environ if environment is None else environment
    with suppress(ConfigError):
        return _number(given, "GROUP_WORLD_SIZE", 1) > 1 or (
            _srun(given) is not None and _number(given, "SLURM_STEP_NUM_NODES", 1) > 1
        )
    return False


def _product(array: RankShare, tasks: RankShare) -> RankShare:
    """Number the ranks that each task of an array starts."""
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
    # The batch script itself has a SLURM_PROCID of 0 and the job's SLURM_NTASKS: it isn't a task.
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
    """Return the tasks of this step on this machine; 1 if SLURM doesn't say."""
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
            "such as 1,3,7 doesn't determine the number of shares. Submit the range "
            f"0-{max(1, count) - 1}, or give `rank` and `world_size`"
        )
    return RankShare(rank, count)


def _number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = given.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        said = f"is {text!r}, not a number" if name in given else "isn't set"
        raise ConfigError(
            f"launcher: {name} {said}; give `launcher='none'`, or `rank` and `world_size`"
        ) from None


def finish_with_other_ranks(exit_code: int) -> None:
    """Wait for the other ranks if this one is about to end with another exit code than 0.

    At the first such code torchrun ends all ranks: a clip that can't be decoded must not stop the
    others. Counted in the store that torchrun itself keeps; without torchrun nothing happens.

    Args:
        exit_code: Of this rank; with 0 the others are notified and not waited for.
    """
    store = _store_of_torchrun()
    if store is None:
        return
    name = f"lmdbcache/finished/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        num_finished = store.add(name, 1)
        while exit_code and num_finished < int(os.environ["WORLD_SIZE"]):
            time.sleep(_POLL_SECONDS)
            num_finished = store.add(name, 0)
    except RuntimeError as error:  # torchrun has ended
        _logger.info("the other ranks aren't waited for: %s", error)


def _store_of_torchrun() -> Any:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
        )
    except (KeyError, ValueError, RuntimeError) as error:
        _logger.info("torchrun can't be reached: %s", error)
        return None

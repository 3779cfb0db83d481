"""What the machine and the shell leave to this process: limits, shared memory, cores, clock."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lmdbcache.cli.doctor.findings import Finding, note, ok, problem
from lmdbcache.machine import available_cores

_LITTLE_ADDRESS_SPACE: Final = 8 << 30
_FEW_FILES: Final = 1024
_LITTLE_SHARED_MEMORY: Final = 1 << 30
_FEW_MAPS: Final = 65530  # the kernel's default
_RELEASED: Final = 1735689600  # 2025-01-01: no clock of a machine in use is before
_SKEW_SECONDS: Final = 120
_GIB: Final = 1 << 30


def check_machine() -> Iterator[Finding]:
    """Limits of this process, shared memory, cores."""
    yield _address_space()
    yield _open_files()
    if finding := _shared_memory(Path("/dev/shm")):
        yield finding
    if finding := _max_maps(Path("/proc/sys/vm/max_map_count")):
        yield finding
    yield _cores()


def check_clock(newest: Path | None) -> Finding:
    """The clock against the newest file that is known: it decides the ages of stores.

    Args:
        newest: A file that was written lately, or None.
    """
    now = time.time()
    remedy = "set the clock (timedatectl, chrony): ages of stores and prune go by it"
    if now < _RELEASED:
        return problem("clock", f"says {time.ctime(now)}", remedy)
    with contextlib.suppress(OSError):
        ahead = newest.stat().st_mtime - now if newest else 0.0
        if ahead > _SKEW_SECONDS:
            text = f"{newest} was written {ahead:.0f} s in the future; now is {time.ctime(now)}"
            return problem("clock", text, remedy)
    return ok("clock", time.strftime("%Y-%m-%d %H:%M:%S %z"))


def _address_space() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return ok("ulimit -v", "unlimited")
    text = f"{limit / _GIB:.1f} GiB of address space; maps are made to fit"
    if limit < _LITTLE_ADDRESS_SPACE:
        remedy = "ulimit -v unlimited; batch systems limit memory better by cgroups"
        return note("ulimit -v", f"{text}, torch alone wants about 8 GiB", remedy)
    return ok("ulimit -v", text)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        remedy = f"ulimit -n {_FEW_FILES if hard < 0 else min(hard, 65536)}"
        text = f"{soft} open files; a store takes 3, a DataLoader worker several per batch"
        return note("ulimit -n", text, remedy)
    return ok("ulimit -n", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


def _shared_memory(folder: Path) -> Finding | None:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        if not sys.platform.startswith("linux"):
            return None
        return problem(
            "/dev/shm",
            "isn't there; DataLoader workers hand over their batches in it",
            "mount a tmpfs there, or use num_workers=0",
        )
    text = f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f}"
    if usage.free < _LITTLE_SHARED_MEMORY:
        return note(
            "/dev/shm",
            f"{text}; DataLoader workers hand over their batches in it, and die of SIGBUS when it "
            "is full",
            "docker run --shm-size=8g (or --ipc=host), or fewer workers",
        )
    return ok("/dev/shm", text)


def _max_maps(file: Path) -> Finding | None:
    try:
        number = int(file.read_text())
    except (OSError, ValueError):
        return None
    if number < _FEW_MAPS:
        remedy = f"sysctl vm.max_map_count={_FEW_MAPS}"
        return note("max_map_count", f"{number} maps for a process", remedy)
    return ok("max_map_count", str(number))


def _cores() -> Finding:
    cores = available_cores()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    text = f"{cores} of {os.cpu_count()} for this process"
    if asked.isdigit() and int(asked) > cores:
        return note(
            "cores",
            f"{text}, OMP_NUM_THREADS={asked}: threads wait for each other",
            f"export OMP_NUM_THREADS={cores}",
        )
    return ok("cores", f"{text}{f', OMP_NUM_THREADS={asked}' if asked else ''}")

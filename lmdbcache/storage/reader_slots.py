"""Who uses a store: the snapshots in LMDB's reader table, and the locks that processes hold."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import lmdb

from lmdbcache.files import check_file, occupy_standard_descriptors
from lmdbcache.machine import is_alive


@dataclass(frozen=True)
class SlotUse:
    """The slots of LMDB's reader table that are taken.

    Args:
        num_slots: How many there are.
        alive: Process ids of living processes with a slot, one for each slot.
        dead: Process ids of ended ones whose slots are still taken.
    """

    num_slots: int
    alive: tuple[int, ...] = ()
    dead: tuple[int, ...] = ()


def slot_use(generation: Path) -> SlotUse | None:
    """Who has slots in the reader table, as it is: nothing is cleared.

    None while no other process has it open (the next one makes the table anew), and where that
    isn't known.
    """
    if not others(generation):
        return None
    processes = []
    occupy_standard_descriptors()
    try:
        for name in ("data.mdb", "lock.mdb"):
            check_file(generation / name)
        with lmdb.open(os.fsencode(generation), readonly=True, create=False) as environment:
            num_slots = int(environment.max_readers())
            for line in environment.readers().splitlines():
                fields = line.split()
                if len(fields) == 3 and fields[0].isdigit():
                    processes.append(int(fields[0]))
    except (lmdb.Error, OSError, MemoryError):
        return None  # open in this process already, full, or not ours to read
    alive = tuple(process for process in processes if is_alive(process))
    dead = tuple(process for process in processes if process not in alive)
    return SlotUse(num_slots, alive, dead)


def slots(environment: lmdb.Environment) -> list[tuple[int, int]]:
    """(process id, transaction id) of every snapshot that is held; without lock file none."""
    held = []
    for line in environment.readers().splitlines():
        fields = line.split()
        # The other lines: a heading, and slots that are taken but hold nothing at the moment.
        if len(fields) == 3 and fields[0].isdigit() and fields[2].isdigit():
            held.append((int(fields[0]), int(fields[2])))
    return held


def holders(files: Iterable[Path], *, but: int = 0) -> list[str]:
    """Return `4711 python` of every living process that has a lock on one of these files.

    LMDB keeps one on its lock file for as long as a process has the store open. Unlike the reader
    table, locks can be listed when that is full. Empty where the system doesn't show locks.

    Args:
        files: The files.
        but: A process that is left out.
    """
    named = []
    for process in _lock_owners(files):
        if process != str(but):
            command = ""
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{process}/comm").read_text(errors="replace").strip()
            named.append(f"{process} {command}".rstrip())
    return named


def others(folder: Path) -> list[str]:
    """Return `4711 python` of every other process that has this generation or store open."""
    files = [folder / "lock.mdb", *folder.glob("gen-*/lock.mdb")]
    return holders(files, but=os.getpid())


def _lock_owners(files: Iterable[Path]) -> list[str]:
    """Process ids that hold a lock on one of the files, of all that this user may see."""
    processes: dict[str, None] = {}
    with contextlib.suppress(OSError):
        inodes = {str(file.lstat().st_ino) for file in files if file.exists()}
        for line in Path("/proc/locks").read_text().splitlines():
            # 1: POSIX  ADVISORY  READ 4711 08:01:393304 4711 4711
            fields = line.split()
            if len(fields) == 8 and fields[5].rpartition(":")[2] in inodes:
                processes[fields[4]] = None
    return list(processes)

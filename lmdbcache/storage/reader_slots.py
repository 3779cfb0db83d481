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
from lmdbcache.storage.layout import WRITER_LOCK_NAME

__all__ = ["SlotUse", "holders", "others", "slot_use", "slots", "writing_processes"]


@dataclass(frozen=True)
class SlotUse:
    """The slots of LMDB's reader table that are taken.

    Args:
        num_slots: How many there are.
        alive: Process ids of living processes with a slot, one for each slot.
        dead: Process ids of ended ones whose slots nobody has cleared.
    """

    num_slots: int
    alive: tuple[int, ...] = ()
    dead: tuple[int, ...] = ()


def slot_use(generation: Path) -> SlotUse | None:
    """Who has slots in the reader table, as it is: nothing is cleared.

    None while no other process has it open (the next one makes the table anew), and where that
    can't be told.
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


def holders(folder: Path) -> list[str]:
    """`4711 python` of every living process that has this generation or store open.

    From the locks that LMDB keeps on its lock file, as a full reader table can't even be opened to
    be listed. Empty where the system doesn't show locks.
    """
    return _named(_lock_owners([folder / "lock.mdb", *folder.glob("gen-*/lock.mdb")]))


def others(folder: Path) -> list[str]:
    """`holders` without this process."""
    owners = _lock_owners([folder / "lock.mdb", *folder.glob("gen-*/lock.mdb")])
    return _named(owner for owner in owners if owner != str(os.getpid()))


def writing_processes(store: Path) -> list[str]:
    """`4711 python` of whoever holds the store's writer lock; empty where locks aren't shown."""
    return _named(_lock_owners([store / WRITER_LOCK_NAME]))


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


def _named(processes: Iterable[str]) -> list[str]:
    return [f"{process}{_command(process)}" for process in processes]


def _command(process: str) -> str:
    with contextlib.suppress(OSError):
        return " " + Path(f"/proc/{process}/comm").read_text(errors="replace").strip()
    return ""

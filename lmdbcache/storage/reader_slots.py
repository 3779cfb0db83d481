"""LMDB's reader table: which processes hold which snapshots, and which have it open at all."""

from __future__ import annotations

import contextlib
from pathlib import Path

import lmdb

__all__ = ["holders", "slots"]


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
    files = [folder / "lock.mdb", *folder.glob("gen-*/lock.mdb")]
    processes: dict[str, None] = {}
    with contextlib.suppress(OSError):
        inodes = {str(file.stat().st_ino) for file in files if file.exists()}
        for line in Path("/proc/locks").read_text().splitlines():
            # 1: POSIX  ADVISORY  READ 4711 08:01:393304 4711 4711
            fields = line.split()
            if len(fields) == 8 and fields[5].rpartition(":")[2] in inodes:
                processes[fields[4]] = None
    return [f"{process}{_command(process)}" for process in processes]


def _command(process: str) -> str:
    with contextlib.suppress(OSError):
        return " " + Path(f"/proc/{process}/comm").read_text(errors="replace").strip()
    return ""

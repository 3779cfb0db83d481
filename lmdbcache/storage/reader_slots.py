"""LMDB's reader table: which processes hold which snapshots."""

from __future__ import annotations

import contextlib
from pathlib import Path

import lmdb

__all__ = ["readers_full", "slots"]

_NAMED: int = 3


def slots(environment: lmdb.Environment) -> list[tuple[int, int]]:
    """(process id, transaction id) of every snapshot that is held; without lock file none."""
    held = []
    for line in environment.readers().splitlines():
        fields = line.split()
        # The other lines: a heading, and slots that are taken but hold nothing at the moment.
        if len(fields) == 3 and fields[0].isdigit() and fields[2].isdigit():
            held.append((int(fields[0]), int(fields[2])))
    return held


def readers_full(generation: Path, environment: lmdb.Environment) -> str:
    """The message for a reader table without a free slot; names who holds most of them."""
    held: dict[int, int] = {}
    for line in environment.readers().splitlines():
        first = line.split()[:1]
        if first and first[0].isdigit():
            held[int(first[0])] = held.get(int(first[0]), 0) + 1
    most = sorted(held, key=lambda pid: -held[pid])
    named = ", ".join(f"{pid}{_command(pid)} ({held[pid]})" for pid in most[:_NAMED])
    more = f" and {len(most) - _NAMED} more" if len(most) > _NAMED else ""
    return (
        f"{generation}: all {sum(held.values())} reader slots are taken by living processes: "
        f"{named}{more}. Close readers there, or end those processes, and read again"
    )


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return " " + Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return ""

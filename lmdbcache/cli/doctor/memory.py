"""The memory of a process: private, and pages of stores that the system can take back.

A mapped store counts as resident memory of every process that has read it. It is the page cache:
shared by all of them, and given up when memory is needed. Only what is private is the process's.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lmdbcache.errors import StorageError
from lmdbcache.storage import Report

_FIELD: Final = re.compile(r"(\w+):\s+([0-9]+) kB")
# 7f00-7f10 r--s 00000000 fe:00 4711   /path/data.mdb
_MAPPING: Final = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")


@dataclass(frozen=True)
class MemoryUse(Report):
    """One process's memory, in bytes.

    Args:
        pid: The process.
        command: Its name.
        resident: What `top` shows as RES.
        private: Its own: what would be free if it ended (USS), without pages of stores.
        store_pages: Pages of stores' data.mdb that it has mapped; a page that is mapped twice
            counts twice. The system takes them back when memory is needed.
        shared: The rest: libraries, shared memory, pages common with other processes after a fork.
        swapped: Its own, moved to the swap.
    """

    pid: int
    command: str
    resident: int
    private: int
    store_pages: int
    shared: int
    swapped: int


def memory_of(pid: int) -> MemoryUse:
    """The memory of a process, from /proc/<pid>/smaps_rollup and smaps.

    Raises:
        StorageError: No such process, another user's, or a system without these files.
    """
    folder = Path("/proc", str(pid))
    try:
        total = _fields((folder / "smaps_rollup").read_text())
        in_stores = _of_stores((folder / "smaps").read_text(errors="replace"))
        command = (folder / "comm").read_text(errors="replace").strip()
    except PermissionError:
        raise StorageError(f"process {pid} is another user's; its memory can't be seen") from None
    except OSError:
        if not sys.platform.startswith("linux"):
            raise StorageError(
                "the memory of a process is read from /proc, which only Linux has. On macOS use "
                "`vmmap --summary PID`"
            ) from None
        raise StorageError(f"there is no process {pid}; see `ps`") from None
    private = total.get("Private_Clean", 0) + total.get("Private_Dirty", 0)
    resident, store_pages = total.get("Rss", 0), in_stores.get("Rss", 0)
    own = private - in_stores.get("Private_Clean", 0) - in_stores.get("Private_Dirty", 0)
    return MemoryUse(
        pid,
        command,
        resident,
        max(0, own),
        store_pages,
        max(0, resident - own - store_pages),
        total.get("Swap", 0),
    )


def _fields(text: str) -> dict[str, int]:
    return {name: 1024 * int(number) for name, number in _FIELD.findall(text)}


def _of_stores(smaps: str) -> dict[str, int]:
    """The sums over all mappings of a data.mdb."""
    sums: dict[str, int] = {}
    is_store = False
    for line in smaps.splitlines():
        if _MAPPING.match(line):
            is_store = line.endswith(("/data.mdb", "/data.mdb (deleted)"))
        elif is_store and (field := _FIELD.match(line)):
            sums[field[1]] = sums.get(field[1], 0) + 1024 * int(field[2])
    return sums

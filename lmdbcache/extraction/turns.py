"""Several runs that fill one store at once: each takes the units in an order of its own.

Two runs that begin at opposite ends meet in the middle; side by side they would compute the same
clips twice.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import xxhash

from lmdbcache.extraction.rank_share import RankShare

__all__ = ["order_of_units", "place_among_runs"]

_MOST_RUNS: Final = 64
_GOLDEN_RATIO: Final = 0.618034


@contextlib.contextmanager
def place_among_runs(store: Path, share: RankShare | None = None) -> Iterator[int]:
    """Which run of this store on this machine we are: 0 if there is no other, else 1, 2, ….

    Ranks have different units and don't meet: only runs of the same share count.

    Only a hint for the order. An abstract socket's name leaves nothing on disk and is free again
    with its process; where there are none (macOS) every run is the first.
    """
    name = xxhash.xxh3_64_hexdigest(os.fsencode(store.resolve()))
    if share is not None and not share.is_all:
        name += f"-{share.rank}-{share.world_size}"
    with contextlib.ExitStack() as stack:
        place = 0
        while sys.platform == "linux" and place < _MOST_RUNS:
            mark = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            try:
                mark.bind(f"\0lmdbcache-extraction-{name}-{place}")
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    place += 1
                    continue
            break
        yield place


def order_of_units(num_units: int, place: int) -> Iterable[int]:
    """The order for a run: from the front, from the back, or from somewhere between."""
    if place < 2:
        return range(num_units) if place == 0 else range(num_units - 1, -1, -1)
    start = int(num_units * (place * _GOLDEN_RATIO % 1))
    return [(start + number) % num_units for number in range(num_units)]

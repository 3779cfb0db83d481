"""Descriptors 0, 1 and 2, kept for what a process prints.

A process that was started with one of them closed (daemons, cron, `2>&-`) gives that number to the
next file it opens. If that is data.mdb, each warning that a library prints is written into it.
"""

from __future__ import annotations

import os
from typing import Final

__all__ = ["occupy_standard_descriptors"]

_FIRST_FREE: Final = 3


def occupy_standard_descriptors() -> None:
    """Open the null device in place of each standard descriptor that is closed.

    Call it before a file of a store is opened and kept: a program may close one at any time. What
    the process prints to it is lost, as before.

    Raises:
        OSError: The null device can't be opened.
    """
    if _are_open():
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < _FIRST_FREE:
        os.set_inheritable(descriptor, True)  # noqa: FBT003 - has no name; for programs started here
    os.close(descriptor)


def _are_open() -> bool:
    try:
        for descriptor in range(_FIRST_FREE):
            os.get_inheritable(descriptor)  # of all calls that fail for a closed one the fastest
    except OSError:
        return False
    return True

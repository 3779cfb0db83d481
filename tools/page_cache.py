"""What of a store's file the page cache holds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

__all__ = ["evict"]


def evict(root: str, share: float) -> float:
    """Drop a share of data.mdb, in pieces of 2 MiB; returns what is left, 0 to 1."""
    [path] = Path(root).rglob("data.mdb")
    size, piece = path.stat().st_size, 2 << 20
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        for start in range(0, size, 64 << 20):
            os.pread(descriptor, 64 << 20, start)
        dropped = np.random.default_rng(7).random(-(-size // piece)) < share
        if share >= 1:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            for number in np.flatnonzero(dropped).tolist():
                os.posix_fadvise(descriptor, number * piece, piece, os.POSIX_FADV_DONTNEED)
        return resident_share(descriptor, size)
    finally:
        os.close(descriptor)


def resident_share(descriptor: int, size: int) -> float:
    """How much of a file the page cache holds, by mincore."""
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as view:
        array = np.frombuffer(view, np.uint8)
        pages = -(-size // mmap.PAGESIZE)
        answer = np.empty(pages, np.uint8)
        address = ctypes.c_void_p(array.ctypes.data)
        done = libc.mincore(address, ctypes.c_size_t(size), answer.ctypes.data_as(ctypes.c_void_p))
        assert done == 0, os.strerror(ctypes.get_errno())
        del array
    return float((answer & 1).mean())

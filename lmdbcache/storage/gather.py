"""Batches copied straight from the mapped data file.

A value's place is known from `pages.read_value_table`; while the snapshot's transaction is pinned
the pages under it don't change, so copying is all that is left to do. The file is mapped by us,
read-only, beside LMDB's own map of it: same page cache, and it stays valid when LMDB's is closed.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import IntegrityError
from lmdbcache.storage.engine_errors import truncated

__all__ = ["LARGE_VALUE_BYTES", "BatchBuffers", "MappedFile", "batch_buffers"]

# From here on a loop of plain copies is as fast as one gather, and can fill a given buffer.
LARGE_VALUE_BYTES: Final = 64 << 10
_REUSED_FROM_BYTES: Final = 1 << 20
_KEPT_BUFFERS: Final = 4


class BatchBuffers:
    """Memory of large batches that are no longer used, kept for the next ones.

    A fresh buffer of some 30 MB costs up to four times its copy in page faults. A buffer is free
    again when nobody but this pool refers to it: arrays, their slices, and tensors made of them
    all hold on to it.
    """

    def __init__(self) -> None:
        self._buffers: list[npt.NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """(num_bytes,) uint8, uninitialised, not shared with anything alive."""
        if num_bytes < _REUSED_FROM_BYTES:
            return np.empty(num_bytes, np.uint8)
        with self._lock:
            for index in range(len(self._buffers)):
                # The list's reference and getrefcount's own.
                is_free = sys.getrefcount(self._buffers[index]) == 2
                if is_free and num_bytes <= self._buffers[index].nbytes <= 2 * num_bytes:
                    return self._buffers[index][:num_bytes]
            buffer = np.empty(num_bytes, np.uint8)
            self._buffers = [*self._buffers[-(_KEPT_BUFFERS - 1) :], buffer]
            return buffer[:]

    def clear(self) -> None:
        """Forget what is kept."""
        with self._lock:
            self._buffers.clear()


batch_buffers: Final = BatchBuffers()


class MappedFile:
    """data.mdb of one generation, mapped as far as it reached when this was made."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            self._map = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        self.path = path
        self.file_id = (status.st_dev, status.st_ino)
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self._views: dict[int, npt.NDArray[np.void]] = {}

    def value(self, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A view of one value; read-only, for as long as the snapshot is pinned."""
        view: npt.NDArray[Any] = np.ndarray(shape, dtype, self._map, offset)
        return view

    def gather(
        self,
        offsets: npt.NDArray[np.int64],
        length: int,
        out: npt.NDArray[np.uint8] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Copy values of equal length.

        Args:
            offsets: (n,) places in the file.
            length: Bytes of each value.
            out: (n, length) C-contiguous uint8 to fill, instead of a new one.

        Returns:
            (n, length) uint8, owned.

        Raises:
            IntegrityError: The file was truncated meanwhile.
        """
        self.check_whole()
        if length >= LARGE_VALUE_BYTES or out is not None:
            if out is None:
                out = batch_buffers.take(len(offsets) * length).reshape(len(offsets), length)
            for row, offset in zip(out, offsets.tolist(), strict=True):
                row[:] = self.data[offset : offset + length]
            return out
        taken = self._view(length)[offsets]
        return taken.view(np.uint8).reshape(len(offsets), length)

    def check_whole(self) -> None:
        """Notice that something has truncated the file: reading beyond its end is SIGBUS.

        Raises:
            IntegrityError: It has become shorter.
        """
        size = self._map.size()  # an fstat, 0.2 us
        if size < len(self.data):
            raise IntegrityError(truncated(self.path, size, len(self.data)))

    def will_need(self, offsets: Sequence[int] | npt.NDArray[np.int64], length: int) -> None:
        """Tell the kernel to read these values ahead; returns at once."""
        if not hasattr(self._map, "madvise"):  # pragma: no cover - macOS before Python 3.8
            return
        page = mmap.PAGESIZE
        for offset in np.asarray(offsets).tolist():
            start = offset - offset % page
            self._map.madvise(mmap.MADV_WILLNEED, start, offset + length - start)

    def _view(self, length: int) -> npt.NDArray[np.void]:
        """Every position of the file as the start of an item: one index gathers a batch."""
        view = self._views.get(length)
        if view is None:
            count = max(0, len(self.data) - length + 1)
            view = np.ndarray((count,), f"V{length}", self._map, 0, (1,))
            self._views[length] = view
        return view

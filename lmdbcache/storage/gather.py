"""Batches copied straight from the mapped data file.

A value's place is known from `pages.read_table`; while the snapshot's transaction is pinned
the pages under it don't change, so copying is all that is left to do. The file is mapped by us,
read-only, next to LMDB's own map of it: same page cache, and it stays valid when LMDB's is closed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import IntegrityError
from lmdbcache.files import open_file
from lmdbcache.machine import memory_limit
from lmdbcache.storage.engine_errors import truncated
from lmdbcache.storage.quantization import SCALE_BYTES, dequantized

# From here on a loop of plain copies is as fast as one gather, and can fill a given buffer.
LARGE_VALUE_BYTES: Final = 64 << 10
_REUSED_FROM_BYTES: Final = 1 << 20
_KEPT_BUFFERS: Final = 1


class BatchBuffers:
    """Memory of large batches that are no longer used, kept for the next ones.

    A fresh buffer of some 30 MB costs up to four times its copy in page faults. A buffer comes
    back when the last array or tensor that is made of it has gone, whichever thread lets it go.
    """

    def __init__(self) -> None:
        # Only whole operations of a deque: a buffer may come back in the middle of one.
        self._free: deque[npt.NDArray[np.uint8]] = deque(maxlen=_KEPT_BUFFERS)

    def take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """(num_bytes,) uint8, uninitialised, not shared with anything alive."""
        if num_bytes < _REUSED_FROM_BYTES:
            return np.empty(num_bytes, np.uint8)
        buffer = self._fitting(num_bytes)
        if buffer is None:
            buffer = np.empty(num_bytes, np.uint8)
        return np.asarray(_Lease(self, buffer))[:num_bytes]

    def give_back(self, buffer: npt.NDArray[np.uint8]) -> None:
        """Keep this memory; nothing else may refer to it."""
        self._free.append(buffer)

    def clear(self) -> None:
        """Forget what is kept."""
        self._free.clear()

    def _fitting(self, num_bytes: int) -> npt.NDArray[np.uint8] | None:
        with contextlib.suppress(IndexError):
            while True:  # one of another size is let go: batches have changed
                buffer = self._free.pop()
                if num_bytes <= buffer.nbytes <= 2 * num_bytes:
                    return buffer
        return None


class _Lease:
    """What arrays over a lent buffer hold on to: its end gives the buffer back."""

    __slots__ = ("__array_interface__", "_buffer", "_owner")

    def __init__(self, owner: BatchBuffers, buffer: npt.NDArray[np.uint8]) -> None:
        self._owner, self._buffer = owner, buffer
        self.__array_interface__ = buffer.__array_interface__

    def __del__(self) -> None:
        self._owner.give_back(self._buffer)


batch_buffers: Final = BatchBuffers()


class MappedFile:
    """data.mdb of one generation, mapped as far as it reached when this was made.

    Attributes:
        mapped: The map, read-only.
        data: The same as an array, (size,) uint8.
    """

    def __init__(self, path: Path) -> None:
        descriptor = open_file(path)
        try:
            status = os.fstat(descriptor)
            self.mapped = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        self.path = path
        self.file_id = (status.st_dev, status.st_ino)
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self.mapped, np.uint8)
        self._views: dict[int, npt.NDArray[np.void]] = {}
        # Page faults wait for one place at a time, and read what lies around it, too. That fills
        # the page cache of a file that fits, and ruins that of one that doesn't.
        self.is_asked_for: Final = status.st_size > memory_limit()

    def value(self, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A view of one value; read-only, for as long as the snapshot is pinned."""
        view: npt.NDArray[Any] = np.ndarray(shape, dtype, self.mapped, offset)
        return view

    def gather(
        self,
        offsets: npt.NDArray[np.int64],
        length: int,
        out: npt.NDArray[np.uint8] | None = None,
    ) -> npt.NDArray[Any]:
        """Copy values of equal length.

        Args:
            offsets: (n,) places in the file.
            length: Bytes of each value.
            out: (n, length) C-contiguous uint8 to fill, instead of a new one.

        Returns:
            The n values, one after the other, owned; `out` if it was given.

        Raises:
            IntegrityError: The file was truncated since.
        """
        self.prepare(offsets, length)
        if length < LARGE_VALUE_BYTES and out is None:
            return self._view(length)[offsets]
        if out is None:
            out = batch_buffers.take(len(offsets) * length).reshape(len(offsets), length)
        for row, offset in zip(out, offsets.tolist(), strict=True):
            row[:] = self.data[offset : offset + length]
        return out

    def dequantize(
        self, offsets: npt.NDArray[np.int64], length: int, out: npt.NDArray[np.float32]
    ) -> None:
        """Fill an array with the rows of int8 that lie at these places.

        Args:
            offsets: (n,) places in the file.
            length: Bytes of each value.
            out: (..., hidden_size) C-contiguous, of as many rows as the n values have.
        """
        hidden_size = out.shape[-1]
        shape = (length // (hidden_size + SCALE_BYTES), hidden_size + SCALE_BYTES)
        rows = out.reshape(len(offsets), shape[0], hidden_size)
        if length < LARGE_VALUE_BYTES:
            stored = self.gather(offsets, length).view(np.int8)
            dequantized(stored.reshape(len(offsets), *shape), rows)
            return
        self.prepare(offsets, length)
        for row, offset in zip(rows, offsets.tolist(), strict=True):
            dequantized(self.value(offset, np.dtype(np.int8), shape), row)

    def prepare(self, offsets: Sequence[int] | npt.NDArray[np.int64], length: int) -> None:
        """See that these values can be copied; if the memory can't hold the file, ask for them.

        Raises:
            IntegrityError: See `check_whole`.
        """
        self.check_whole()
        if self.is_asked_for:
            self.will_need(offsets, length)

    def check_whole(self) -> None:
        """Notice that something has truncated the file: reading beyond its end is SIGBUS.

        Raises:
            IntegrityError: It has become shorter.
        """
        size = self.mapped.size()  # an fstat, 0.2 us
        if size < len(self.data):
            raise IntegrityError(truncated(self.path, size, len(self.data)))

    def read_single_pages(self) -> None:
        """Have faults in this map read one page each, and not what lies around it."""
        if hasattr(self.mapped, "madvise"):
            self.mapped.madvise(mmap.MADV_RANDOM)

    def will_need(self, offsets: Sequence[int] | npt.NDArray[np.int64], length: int) -> None:
        """Ask the kernel to read these values ahead; returns at once."""
        if not hasattr(self.mapped, "madvise"):  # pragma: no cover - macOS before Python 3.8
            return
        page = mmap.PAGESIZE
        for offset in np.asarray(offsets).tolist():
            start = offset - offset % page
            self.mapped.madvise(mmap.MADV_WILLNEED, start, offset + length - start)

    def _view(self, length: int) -> npt.NDArray[np.void]:
        """Every position of the file as the start of an item: one index gathers a batch."""
        view = self._views.get(length)
        if view is None:
            count = max(0, len(self.data) - length + 1)
            view = np.ndarray((count,), f"V{length}", self.mapped, 0, (1,))
            self._views[length] = view
        return view

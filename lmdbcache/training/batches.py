"""Batches as tensors: gathered from the mapped file into whatever memory they are needed in."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache.cache import ViewSelection
from lmdbcache.errors import CacheFullError
from lmdbcache.storage import LARGE_VALUE_BYTES, MappedFile, Selection, batch_buffers
from lmdbcache.training.tensors import as_tensor

__all__ = ["DTYPES", "CopyThreads", "fetch_batch", "shared_memory"]

DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class CopyThreads:
    """Threads that copy parts of a batch; one core alone doesn't use all of the memory's speed.

    Args:
        num_threads: With the calling one.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads - 1, thread_name_prefix="lmdbcache-copy")

    def share(self, num_rows: int, copy: Callable[[slice], object]) -> None:
        """Have `copy` called for all rows, part by part, and wait."""
        step = max(1, -(-num_rows // self.num_threads))
        parts = [slice(start, start + step) for start in range(0, num_rows, step)]
        others = [self._pool.submit(copy, part) for part in parts[1:]]
        try:
            copy(parts[0])
        finally:  # nothing may be written to the batch after this
            wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False)


_views: WeakKeyDictionary[MappedFile, dict[int, torch.Tensor]] = WeakKeyDictionary()


def fetch_batch(
    selection: Selection | ViewSelection,
    positions: Sequence[int] | npt.NDArray[np.int64],
    *,
    in_background: bool = False,
    pin_memory: bool = False,
    threads: CopyThreads | None = None,
) -> torch.Tensor:
    """One batch as a CPU tensor of its own memory.

    In a DataLoader's worker process it lies in shared memory, so that it isn't copied again on
    its way to the main process.

    Args:
        selection: Where to read.
        positions: Positions in the selection, `(n,)`.
        in_background: Copy so that the main thread's Python can run meanwhile.
        pin_memory: Put it into page-locked memory, for an asynchronous copy to a GPU.
        threads: Share the copying of large embeddings with these.

    Returns:
        `(n, *embedding_shape)`, stored dtype.
    """
    if isinstance(selection, ViewSelection):
        if selection.view.is_mean:
            batch = as_tensor(selection.get_batch(positions))
        else:
            batch = fetch_batch(
                selection.rows, positions, in_background=in_background, threads=threads
            )
            batch = batch[:, 0] if selection.view.is_row else batch
        return batch.pin_memory() if pin_memory else batch
    is_worker = torch.utils.data.get_worker_info() is not None
    if in_background or pin_memory or is_worker or threads:

        def copy(file: MappedFile, offsets: npt.NDArray[np.int64], length: int) -> torch.Tensor:
            raw = _memory(len(offsets) * length, shared=is_worker, pinned=pin_memory)
            _fill(raw.view(len(offsets), length), file, offsets, length, threads)
            return raw

        raw = selection.copy_with(positions, copy)
        if raw is not None:
            metadata = selection.reader.metadata
            shape = [-1 if n is None else n for n in metadata.embedding_shape or ()]
            if selection.part is not None:
                shape[0] = -1
            if -1 in shape:
                row_bytes = math.prod(n for n in shape if n > 0)
                itemsize = DTYPES[metadata.config.dtype].itemsize
                shape[0] = raw.numel() // max(1, len(positions)) // (row_bytes * itemsize)
            return raw.view(DTYPES[metadata.config.dtype]).view(len(positions), *shape)
    batch = as_tensor(selection.get_batch(positions))
    return batch.pin_memory() if pin_memory else batch


def _memory(num_bytes: int, *, shared: bool, pinned: bool) -> torch.Tensor:
    return shared_memory(num_bytes) if shared else _plain_memory(num_bytes, pinned=pinned)


def shared_memory(num_bytes: int) -> torch.Tensor:
    """(num_bytes,) uint8 that other processes can be handed without a copy.

    Raises:
        CacheFullError: There isn't so much shared memory.
    """
    new_shared: Any = getattr(torch.UntypedStorage, "_new_shared", None)
    try:
        if new_shared is None:  # not public; torch's default_collate uses it, too
            plain: torch.Tensor = torch.empty(num_bytes, dtype=torch.uint8)
            return plain.share_memory_()  # type: ignore[no-untyped-call, no-any-return]
        storage = new_shared(num_bytes, device="cpu")
    except RuntimeError as error:
        raise CacheFullError(
            f"{num_bytes / (1 << 20):.1f} MiB of shared memory can't be had ({error}). Enlarge "
            "/dev/shm (docker run --shm-size=8g, or --ipc=host), or read the store without preload "
            "and with num_workers=0"
        ) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (num_bytes,), (1,))


def _plain_memory(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(batch_buffers.take(num_bytes))


def _fill(
    out: torch.Tensor,
    file: MappedFile,
    offsets: npt.NDArray[np.int64],
    length: int,
    threads: CopyThreads | None,
) -> None:
    # For small values one index_select is faster than a loop of copies; both release the GIL.
    if length >= LARGE_VALUE_BYTES:
        rows = out.numpy()
        if threads is None:
            file.gather(offsets, length, rows)
        else:
            threads.share(len(rows), lambda part: file.gather(offsets[part], length, rows[part]))
    else:
        torch.index_select(_view(file, length), 0, torch.from_numpy(offsets), out=out)


def _view(file: MappedFile, length: int) -> torch.Tensor:
    """Every position of the file as the start of a row. It never leaves this module."""
    views = _views.setdefault(file, {})
    if length not in views:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not writable: it is only read
            data = torch.from_numpy(file.data)
        views[length] = data.as_strided((len(data) - length + 1, length), (1, 1))
    return views[length]

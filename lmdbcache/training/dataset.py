"""Cached embeddings as a map-style Dataset: batches gathered from the mapped file, collated.

A batch is copied once, into whatever memory it is needed in: shared with the main process from a
worker, page-locked for a GPU, or plain.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache.cache import HiddenStateView, ViewSelection, clip_lengths
from lmdbcache.errors import CacheFullError, ConfigError
from lmdbcache.files import few, readable_size
from lmdbcache.storage import (
    LARGE_VALUE_BYTES,
    EmbeddingReader,
    MappedFile,
    Selection,
    batch_buffers,
    recording_of,
    value_bytes,
)
from lmdbcache.training.targets import Targets, target_tensor
from lmdbcache.training.tensors import as_tensor

DTYPES: Final = {  # of what is read
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,  # read as such
}


class EmbeddingSource(Protocol):
    """Where a Dataset reads: an `EmbeddingReader`, a `HiddenStateView`, or RAM (`preload`)."""

    def select(self, sample_ids: Sequence[str] | None = None) -> Any:
        """Return the samples by position."""


class EmbeddingDataset(torch.utils.data.Dataset[Any]):
    """Cached embeddings as a map-style Dataset, for torch's DataLoader.

    An item is `embedding`, or `(embedding, label)` with labels; `with_num_valid` adds an int64 at
    the end. A batch is fetched with one call,
    whether the DataLoader collates with torch's default or with `collate_embeddings`, which saves
    a copy. Works with any `num_workers`, start method, and `persistent_workers`.

    Args:
        source: Where the embeddings are, such as `cache.reader(config)`; the attribute `reader`.
        sample_ids: The samples, in order; None takes all that are stored. Of a store of windows
            the samples are windows: the id of a recording means all of its windows, each with the
            recording's label, and None all of the recordings that are stored in full.
        labels: One target for each sample: a sequence, array or tensor of numbers or of rows such
            as multi-hot ones, or a Mapping of class name or sample id to target. Integers become
            int64; floats and bools stay what they are.
        collated: Give DataLoader the batch itself instead of a list of samples. For
            `collate_fn=collate_embeddings` alone; small embeddings are read in half the time.
        with_num_valid: Add how many samples of the clip came from its file (`clip_lengths`), to
            each item and, `(batch,)`, to each batch; the attribute `num_valid`.

    Raises:
        ValueError: Not as many labels as samples.
        ConfigError: The labels aren't numbers, or differ in shape; or the length of a clip isn't
            recorded.
        MissingLabelError: A sample has no label; also a `KeyError`.
    """

    def __init__(
        self,
        source: EmbeddingReader | EmbeddingSource,
        sample_ids: Sequence[str] | None = None,
        labels: Targets | None = None,
        *,
        collated: bool = False,
        with_num_valid: bool = False,
    ) -> None:
        self.reader: Final = source
        self.collated = collated
        sample_ids, labels = _windows_of(source, sample_ids, labels)
        self.selection = source.select(sample_ids)
        self.labels = None if labels is None else target_tensor(self.sample_ids, labels)
        self.num_valid = _num_valid(source, self.sample_ids) if with_num_valid else None

    def __getstate__(self) -> dict[str, Any]:
        # A tensor pickles with its address: never twice to the same bytes.
        state = dict(self.__dict__)
        for name in ("labels", "num_valid"):
            if (tensor := state[name]) is not None:
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                state[name] = (tensor.dtype, tuple(tensor.shape), raw)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in ("labels", "num_valid"):
            if state[name] is not None:
                dtype, shape, raw = state[name]
                flat = (
                    torch.frombuffer(bytearray(raw), dtype=dtype)
                    if raw
                    else torch.empty(0, dtype=dtype)
                )
                setattr(self, name, flat.reshape(shape))

    @property
    def _further(self) -> list[torch.Tensor]:
        """What comes with the embeddings, one row for each sample."""
        return [part for part in (self.labels, self.num_valid) if part is not None]

    @property
    def sample_ids(self) -> list[str]:
        """The samples, in order."""
        sample_ids: list[str] = self.selection.sample_ids
        return sample_ids

    @property
    def is_ragged(self) -> bool:
        """Whether embeddings differ in their first dimension."""
        return None in (getattr(self.reader, "embedding_shape", None) or ())

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, index: int) -> Any:
        embedding = self._one(range(len(self))[index])
        further = self._further
        return (embedding, *(part[index] for part in further)) if further else embedding

    def __getitems__(self, indices: Sequence[int]) -> Any:
        if self.is_ragged:
            return [self[index] for index in indices]  # for a collate_fn that pads
        if self.collated:
            return self.fetch(indices)
        return CollatedBatch(self.fetch(indices))

    def fetch(
        self,
        indices: Sequence[int] | npt.NDArray[np.int64],
        *,
        in_background: bool = False,
        pin_memory: bool = False,
        threads: CopyThreads | None = None,
    ) -> Any:
        """Return a collated batch: `embeddings`, or a tuple of parts. See `fetch_batch`."""
        if isinstance(self.selection, (Selection, ViewSelection)):
            embeddings = fetch_batch(
                self.selection,
                indices,
                in_background=in_background,
                pin_memory=pin_memory,
                threads=threads,
            )
        else:
            embeddings = as_tensor(self.selection.get_batch(indices))
            embeddings = embeddings.pin_memory() if pin_memory else embeddings
        further = self._further
        if not further:
            return embeddings
        rows = torch.as_tensor(indices)
        return (embeddings, *(part[rows] for part in further))

    def will_need(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Ask the kernel to read these embeddings from disk, in the background."""
        self.selection.will_need(indices)

    def _one(self, index: int) -> torch.Tensor:
        if isinstance(self.selection, Selection):
            return as_tensor(self.selection.reader[self.selection.sample_ids[index]])
        if isinstance(self.selection, ViewSelection):
            return as_tensor(self.selection.get_batch([index])[0])
        return as_tensor(self.selection.get_batch([index]))[0]


def _num_valid(source: Any, sample_ids: Sequence[str]) -> torch.Tensor:
    reader = getattr(source, "reader", source)  # a view's
    lengths = clip_lengths(reader, sample_ids) if isinstance(reader, EmbeddingReader) else {}
    unknown = [sample_id for sample_id in sample_ids if sample_id not in lengths]
    if unknown:
        raise ConfigError(
            f"`with_num_valid`: how long the clips were isn't recorded for {few(unknown, 3)}: the "
            "source isn't a store's, or they weren't extracted here. Extract them again, or leave "
            "`with_num_valid` out"
        )
    return torch.tensor([lengths[sample_id] for sample_id in sample_ids], dtype=torch.long)


def _windows_of(
    source: Any, sample_ids: Sequence[str] | None, labels: Targets | None
) -> tuple[Sequence[str] | None, Targets | None]:
    """Return the samples with windows in place of recordings, and a label for each.

    Raises:
        SampleNotFoundError: A recording isn't stored in full.
    """
    reader = source.reader if isinstance(source, HiddenStateView) else source
    if not isinstance(reader, EmbeddingReader) or reader.config.window is None:
        return sample_ids, labels
    names = list(reader.recordings() if sample_ids is None else sample_ids)
    groups = [[name] if recording_of(name) != name else reader.windows_of(name) for name in names]
    if labels is not None and not isinstance(labels, Mapping):
        rows = np.repeat(np.arange(len(names)), list(map(len, groups)))
        labels = target_tensor(names, labels)[torch.from_numpy(rows)]
    return [window for group in groups for window in group], labels


class CollatedBatch(list[Any]):
    """A batch that is collated already, and still a list of samples for any collate function.

    Making the list takes as long as copying small embeddings does; `collated=True` leaves it out.
    """

    def __init__(self, collated: Any) -> None:
        self.collated = collated
        parts = collated if isinstance(collated, tuple) else (collated,)
        rows = [part.unbind(0) for part in parts]
        super().__init__(zip(*rows, strict=True) if isinstance(collated, tuple) else rows[0])


def collate_embeddings(batch: Any) -> Any:
    """Return the batch that an `EmbeddingDataset` has collated, as a `collate_fn`.

    Returns:
        `embeddings` of shape `(batch, *embedding_shape)`, or `(embeddings, labels)` with labels
        of shape `(batch, *label_shape)`: int64 `(batch,)` for labels by class. `with_num_valid`
        adds int64 `(batch,)`.
    """
    if isinstance(batch, CollatedBatch):
        return batch.collated
    if isinstance(batch, (torch.Tensor, tuple)):
        return batch  # of a Dataset with collated=True
    return torch.utils.data.default_collate(batch)


# ---- batches


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
    """Copy one batch into a new CPU tensor.

    In a DataLoader's worker process it lies in shared memory, so that it isn't copied again on
    its way to the main process.

    Args:
        selection: Where to read.
        positions: Positions in the selection, `(n,)`.
        in_background: Copy so that the main thread's Python can run in the meantime.
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
            if selection.reader.config.dtype == "int8":
                hidden_size = (selection.reader.embedding_shape or ())[-1] or 1
                rows = len(offsets) * length // value_bytes((hidden_size,), "int8")
                memory = _memory(4 * rows * hidden_size, shared=is_worker, pinned=pin_memory)
                out = memory.view(torch.float32).view(rows, hidden_size).numpy()
                file.dequantize(offsets, length, out)
                return memory
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
            f"{readable_size(num_bytes)} of shared memory can't be allocated ({error}). Make "
            "/dev/shm larger (of a container: its shared memory size, or the host's IPC "
            "namespace), or read the store without `preload` and with `num_workers=0`"
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
    """Return every position of the file as the start of a row; for this module only."""
    views = _views.setdefault(file, {})
    if length not in views:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not writable: it is only read
            data = torch.from_numpy(file.data)
        views[length] = data.as_strided((len(data) - length + 1, length), (1, 1))
    return views[length]

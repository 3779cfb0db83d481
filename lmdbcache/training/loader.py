"""A loader for training: batches copied ahead by a thread, resumable, split by rank."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache.errors import ConfigError
from lmdbcache.machine import available_cores
from lmdbcache.storage import EmbeddingReader
from lmdbcache.training.dataset import CopyThreads, EmbeddingDataset, EmbeddingSource
from lmdbcache.training.targets import Targets

_LARGE_BATCH_BYTES: Final = 1 << 20
_MAX_THREADS: Final = 4
_STEP_BYTES: Final = 4 << 20  # small batches are fetched several at a time


class EmbeddingLoader:
    """The fastest loader for cached embeddings on this machine.

    Embeddings come from mapped memory, so a thread of this process copies the next batches while
    the model works; worker processes would only add their transport.

    Make it after the process group, whose rank it asks for. It isn't a torch DataLoader: Lightning
    and accelerate iterate over it, but don't divide it or move its batches to a device.

    Each `iter` begins the next epoch. `state_dict` says how far the current one is; after
    `load_state_dict` the next `iter` goes on there.

    Args:
        source: A reader, preloaded embeddings, or an `EmbeddingDataset`.
        batch_size: Samples per batch and rank.
        sample_ids: The samples; not with an `EmbeddingDataset`.
        labels: See `EmbeddingDataset`; not with one.
        shuffle: A new order in every epoch, from `seed` and the epoch's number.
        seed: For `shuffle`.
        drop_last: Leave out the last, smaller batch (and samples that don't divide by ranks).
        rank: This process's part, with `world_size`; None asks torch.distributed, if it is
            initialised.
        world_size: Number of parts.
        prefetch: Fetches that may wait; 0 copies in the calling thread; None takes 2 for batches
            of 1 MiB and more: a smaller one is copied faster than it is handed over.
        pin_memory: Page-locked memory; None does if there is a CUDA device.
        num_threads: Threads that copy a batch of large embeddings; None takes one for each core
            that this process may use, up to 4. One alone reaches half of the memory's speed.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        source: EmbeddingDataset | EmbeddingReader | EmbeddingSource,
        batch_size: int,
        *,
        sample_ids: Sequence[str] | None = None,
        labels: Targets | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        prefetch: int | None = None,
        pin_memory: bool | None = None,
        num_threads: int | None = None,
    ) -> None:
        if not isinstance(source, EmbeddingDataset):
            source = EmbeddingDataset(source, sample_ids, labels)
        elif sample_ids is not None or labels is not None:
            raise ConfigError("sample_ids, labels: give them to the EmbeddingDataset")
        if num_threads is None:
            num_threads = min(_MAX_THREADS, available_cores())
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("prefetch", prefetch or 0, 0),
            ("num_threads", num_threads, 1),
        ):
            if value < least:
                raise ConfigError(f"{name}: {value}; it must be {least} or more")
        self.dataset: Final = source
        self.batch_size: Final = batch_size
        self.shuffle: Final = shuffle
        self.seed: Final = seed
        self.drop_last: Final = drop_last
        self.rank, self.world_size = _rank_and_world_size(rank, world_size)
        self.prefetch: Final = prefetch
        self.pin_memory: Final = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.num_threads: Final = num_threads
        self._known_batch_bytes: int | None = None
        self.epoch = -1
        self._num_done = 0
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Return the number of batches of one epoch."""
        return len(self._bounds(self._num_samples()))

    def __iter__(self) -> Iterator[Any]:
        self.epoch, self._num_done = self._resume or (self.epoch + 1, 0)
        self._resume = None
        order = self._order(self.epoch)
        steps = self._steps(order, self._bounds(len(order))[self._num_done :])
        threads = CopyThreads(self.num_threads) if self._shares_copies() else None
        fetched = (self._fetch(step, threads) for step in steps)
        batches = _ahead(fetched, self._waiting()) if self._waiting() else fetched
        try:
            for several in batches:
                for batch in several:
                    # Counted before it is handed out: a state taken in the loop's body holds it.
                    self._num_done += 1
                    yield batch
        finally:
            batches.close()
            if threads is not None:
                threads.close()

    def set_epoch(self, epoch: int) -> None:
        """Make the next `iter` this epoch."""
        self._resume = (epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """Return epoch and batches handed out in it, with what they depend on."""
        epoch, done = self._resume or (max(self.epoch, 0), self._num_done)
        return {"epoch": epoch, "batches": done, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after the batches that `state_dict` counted.

        Raises:
            ConfigError: The state is of a loader with another order of samples.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ConfigError(
                    f"{name}: {value} here, {state.get(name)} in the state; its batches were others"
                )
        self._resume = (state["epoch"], state["batches"])

    def _identity(self) -> dict[str, int]:
        return {
            "shuffle": int(self.shuffle),
            "seed": self.seed if self.shuffle else 0,
            "drop_last": int(self.drop_last),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "num_samples": len(self.dataset),
        }

    # ---- which samples

    def _num_samples(self) -> int:
        total = len(self.dataset)
        return total // self.world_size if self.drop_last else -(-total // self.world_size)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return this rank's positions; all ranks have as many, by dropping or repeating a few."""
        total = len(self.dataset)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(total, generator=generator).numpy()
        else:
            order = np.arange(total)
        even = self._num_samples() * self.world_size
        return np.resize(order, even)[self.rank :: self.world_size] if total else order

    def _bounds(self, num_samples: int) -> list[tuple[int, int]]:
        starts = range(0, num_samples, self.batch_size)
        bounds = [(start, min(start + self.batch_size, num_samples)) for start in starts]
        if self.drop_last and bounds and bounds[-1][1] - bounds[-1][0] < self.batch_size:
            bounds.pop()
        return bounds

    def _steps(
        self, order: npt.NDArray[np.int64], bounds: list[tuple[int, int]]
    ) -> Iterator[list[npt.NDArray[np.int64]]]:
        """Yield the positions of some batches at a time."""
        if not bounds:
            return
        together = max(1, min(_STEP_BYTES // self._batch_bytes(), 8)) if self._waiting() else 1
        for start in range(0, len(bounds), together):
            yield [order[a:b] for a, b in bounds[start : start + together]]

    # ---- their embeddings

    def _batch_bytes(self) -> int:
        if self._known_batch_bytes is None:
            row_bytes = self._stated_bytes()
            if row_bytes is None:
                first = self.dataset[0]
                embedding = first[0] if isinstance(first, tuple) else first
                row_bytes = embedding.numel() * embedding.element_size()
            self._known_batch_bytes = max(1, row_bytes * self.batch_size)
        return self._known_batch_bytes

    def _stated_bytes(self) -> int | None:
        """Return the size of one embedding if the source says it: a read counts as a hit."""
        shape = getattr(self.dataset.reader, "embedding_shape", None)
        dtype = getattr(self.dataset.reader, "dtype", None)
        if shape is None or None in shape or not isinstance(dtype, np.dtype):
            return None
        return int(math.prod(shape) * dtype.itemsize)

    def _waiting(self) -> int:
        """Return how many fetches may wait for the training loop."""
        if self.prefetch is not None:
            return self.prefetch
        return 2 if self._has_large_batches() else 0

    def _shares_copies(self) -> bool:
        return self.num_threads > 1 and self._has_large_batches()

    def _has_large_batches(self) -> bool:
        return bool(len(self.dataset)) and self._batch_bytes() >= _LARGE_BATCH_BYTES

    def _fetch(self, step: list[npt.NDArray[np.int64]], threads: CopyThreads | None) -> list[Any]:
        fetched = self.dataset.fetch(
            np.concatenate(step),
            in_background=self._waiting() > 0,
            pin_memory=self.pin_memory,
            threads=threads,
        )
        sizes = [len(positions) for positions in step]
        if isinstance(fetched, tuple):
            return list(zip(*(part.split(sizes) for part in fetched), strict=True))
        return list(fetched.split(sizes))


def _ahead(fetched: Iterator[list[Any]], waiting: int) -> Generator[list[Any], None, None]:
    """Yield the same, fetched by a thread; so many wait."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="lmdbcache-prefetch")
    try:
        ready = deque(pool.submit(next, fetched, None) for _ in range(waiting))
        while (batches := ready.popleft().result()) is not None:
            ready.append(pool.submit(next, fetched, None))
            yield batches
    finally:
        pool.shutdown(cancel_futures=True)


def _rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    distributed = torch.distributed
    asked = rank is not None or world_size is not None
    if not asked and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    if (rank is None) != (world_size is None):
        raise ConfigError(f"rank: {rank}, world_size: {world_size}; give both or neither")
    rank, world_size = rank or 0, 1 if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank: {rank} with world_size {world_size}; ranks go from 0")
    return rank, world_size


make_dataloader: Final = EmbeddingLoader  # the name that scripts call

"""lmdbcache as one system of a benchmark that compares ways to store embeddings.

Such a benchmark makes an `Adapter` on an empty folder, writes all samples, opens it in each process
that reads, and asks for single samples, batches, or a DataLoader.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmdbcache import (
    CacheConfig,
    EmbeddingCache,
    EmbeddingDataset,
    collate_embeddings,
    make_dataloader,
)
from lmdbcache.training import as_tensor


class Adapter:
    """float32 embeddings of one shape, by position in `keys`."""

    batched = True
    fork_safe = True  # a reader opens anew in a worker by itself
    sequential = False
    note = "lmdbcache: reader.select(keys).get_batch; DataLoader: EmbeddingDataset"

    def __init__(self, path: str | Path, keys: Sequence[str], shape: Sequence[int]) -> None:
        self.keys = list(keys)
        self.n, self.shape = len(self.keys), tuple(shape)
        self.cache = EmbeddingCache(path)
        output = "pooler_output" if len(self.shape) == 1 else "last_hidden_state"
        self.config = CacheConfig(output=output)

    @staticmethod
    def imports() -> None:
        """Nothing is left to import."""

    def write(self, items: Iterable[tuple[str, np.ndarray]]) -> None:
        pairs = iter(items)
        with self.cache.writer(self.config) as writer:
            is_small = len(self.shape) == 1
            while batch := list(itertools.islice(pairs, 1024 if is_small else 8)):
                keys, embeddings = zip(*batch, strict=True)
                writer.put_batch(keys, np.stack(embeddings) if is_small else embeddings)

    def open(self) -> None:
        self.reader = self.cache.reader(self.config)
        self.dataset = EmbeddingDataset(self.reader, self.keys, collated=True)
        self.selection = self.dataset.selection

    def get(self, index: int) -> torch.Tensor:
        return as_tensor(self.reader[self.keys[index]])

    def get_batch(self, indices: Sequence[int]) -> torch.Tensor:
        return as_tensor(self.selection.get_batch(indices))

    def loader(self, batch: int, workers: int, seed: int) -> Any:
        if not hasattr(self, "dataset"):
            self.open()
        return torch.utils.data.DataLoader(
            self.dataset,
            batch_size=batch,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=collate_embeddings,
        )


class PrefetchAdapter(Adapter):
    """The same with lmdbcache's own loader: a thread instead of worker processes."""

    note = "lmdbcache: make_dataloader"

    def loader(self, batch: int, workers: int, seed: int) -> Any:
        if not hasattr(self, "dataset"):
            self.open()
        loader = make_dataloader(self.dataset, batch, shuffle=True, seed=seed)
        loader.generator = None  # such a benchmark looks for one
        return loader

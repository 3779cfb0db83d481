"""Cached embeddings as a map-style Dataset, and its collate function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache.cache import ViewSelection
from lmdbcache.storage import EmbeddingReader, Selection
from lmdbcache.training.batches import CopyThreads, fetch_batch
from lmdbcache.training.targets import Targets, target_tensor
from lmdbcache.training.tensors import as_tensor

__all__ = ["CollatedBatch", "EmbeddingDataset", "EmbeddingSource", "collate_embeddings"]


class EmbeddingSource(Protocol):
    """Where a Dataset reads: an `EmbeddingReader`, a `HiddenStateView`, or RAM (`preload`)."""

    def select(self, sample_ids: Sequence[str] | None = None) -> Any:
        """The samples by position."""


class EmbeddingDataset(torch.utils.data.Dataset[Any]):
    """Cached embeddings as a map-style Dataset, for torch's DataLoader.

    An item is `embedding`, or `(embedding, label)` with labels. A batch is fetched with one call,
    whether the DataLoader collates with torch's default or with `collate_embeddings`, which saves
    a copy. Works with any `num_workers`, start method, and `persistent_workers`.

    Args:
        source: Where the embeddings are, such as `cache.reader(config)`.
        sample_ids: The samples, in order; None takes all that are stored.
        labels: One target for each sample: a sequence, array or tensor of numbers or of rows such
            as multi-hot ones, or a Mapping of class name or sample id to target. Integers become
            int64; floats and bools stay what they are.
        collated: Give DataLoader the batch itself instead of a list of samples. For
            `collate_fn=collate_embeddings` alone; small embeddings are read in half the time.

    Raises:
        ValueError: Not as many labels as samples.
        ConfigError: The labels aren't numbers, or differ in shape.
        MissingLabelError: A sample has no label; a `KeyError`, too.
    """

    def __init__(
        self,
        source: EmbeddingReader | EmbeddingSource,
        sample_ids: Sequence[str] | None = None,
        labels: Targets | None = None,
        *,
        collated: bool = False,
    ) -> None:
        self._source = source
        self.collated = collated
        self.selection = source.select(sample_ids)
        self.labels = None if labels is None else target_tensor(self.sample_ids, labels)
        self._is_ragged: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A tensor pickles with its address: never twice to the same bytes.
        state = {**self.__dict__, "_is_ragged": None}
        if self.labels is not None:
            raw = self.labels.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            state["labels"] = (self.labels.dtype, tuple(self.labels.shape), raw)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["labels"] is not None:
            dtype, shape, raw = state["labels"]
            flat = (
                torch.frombuffer(bytearray(raw), dtype=dtype)
                if raw
                else torch.empty(0, dtype=dtype)
            )
            self.labels = flat.reshape(shape)

    @property
    def reader(self) -> EmbeddingReader | EmbeddingSource:
        """Where the embeddings are."""
        return self._source

    @property
    def sample_ids(self) -> list[str]:
        """The samples, in order."""
        sample_ids: list[str] = self.selection.sample_ids
        return sample_ids

    @property
    def is_ragged(self) -> bool:
        """Whether embeddings differ in their first dimension."""
        if self._is_ragged is None:
            shape = getattr(self._source, "embedding_shape", None)
            self._is_ragged = None in (shape or ())
        return self._is_ragged

    def __len__(self) -> int:
        return len(self.selection)

    def __getitem__(self, index: int) -> Any:
        embedding = self._one(range(len(self))[index])
        return embedding if self.labels is None else (embedding, self.labels[index])

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
        """A collated batch: `embeddings`, or `(embeddings, labels)`. See `fetch_batch`."""
        if isinstance(self.selection, (Selection, ViewSelection)):
            embeddings = fetch_batch(
                self.selection,
                indices,
                in_background=in_background,
                pin_memory=pin_memory,
                threads=threads,
            )
        else:
            embeddings = self.selection.get_batch(indices)
            embeddings = embeddings.pin_memory() if pin_memory else embeddings
        if self.labels is None:
            return embeddings
        return embeddings, self.labels[torch.as_tensor(indices)]

    def will_need(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Ask the kernel to read these embeddings from disk, in the background."""
        self.selection.will_need(indices)

    def _one(self, index: int) -> torch.Tensor:
        if isinstance(self.selection, Selection):
            return as_tensor(self.selection.reader[self.selection.sample_ids[index]])
        if isinstance(self.selection, ViewSelection):
            return as_tensor(self.selection.get_batch([index])[0])
        one: torch.Tensor = self.selection.get_batch([index])[0]
        return one


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
    """The `collate_fn` of `EmbeddingDataset`: takes the collated batch as it is.

    Returns:
        `embeddings` of shape `(batch, *embedding_shape)`, or `(embeddings, labels)` with labels
        of shape `(batch, *label_shape)`: int64 `(batch,)` for labels by class.
    """
    if isinstance(batch, CollatedBatch):
        return batch.collated
    if isinstance(batch, (torch.Tensor, tuple)):
        return batch  # of a Dataset with collated=True
    return torch.utils.data.default_collate(batch)

"""Embeddings as torch tensors: a lazy Mapping, a Dataset and its collate function."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache.errors import InvalidSampleIdError
from lmdbcache.storage.layout import split_sample_id
from lmdbcache.storage.reader import EmbeddingReader
from lmdbcache.storage.values import NUMPY_DTYPES

__all__ = ["EmbeddingDataset", "TensorMapping", "as_tensor", "collate_embeddings"]

_BFLOAT16: Final = NUMPY_DTYPES["bfloat16"]


def as_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """A CPU tensor over the memory of an owned, writable array; bfloat16 included."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class TensorMapping(Mapping[str, torch.Tensor]):
    """A Mapping of arrays seen as one of CPU tensors; each is read when it is asked for.

    Picklable if the arrays' Mapping is; works in forked and spawned workers as that does.

    Args:
        arrays: Sample id → array, such as an `EmbeddingReader`.
        classes: Narrow it to sample ids of these classes.
    """

    def __init__(
        self, arrays: Mapping[str, npt.NDArray[Any]], classes: Collection[str] | None = None
    ) -> None:
        self._arrays = arrays
        self._classes = None if classes is None else frozenset(name.lower() for name in classes)
        self._counted: tuple[int, int] | None = None

    @property
    def arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """The Mapping underneath, not narrowed."""
        return self._arrays

    def __getitem__(self, sample_id: str) -> torch.Tensor:
        if not self._admits(sample_id):
            raise KeyError(sample_id)
        return as_tensor(self._arrays[sample_id])

    def __contains__(self, sample_id: object) -> bool:
        return self._admits(sample_id) and sample_id in self._arrays

    def __iter__(self) -> Iterator[str]:
        return (sample_id for sample_id in self._arrays if self._admits(sample_id))

    def __len__(self) -> int:
        total = len(self._arrays)
        if self._classes is None:
            return total
        # Counting walks over all keys; once is enough while nothing is added.
        if self._counted is None or self._counted[0] != total:
            self._counted = (total, sum(1 for _ in self))
        return self._counted[1]

    def __repr__(self) -> str:
        narrowed = "" if self._classes is None else f", classes={sorted(self._classes)}"
        return f"{type(self).__name__}({self._arrays!r}{narrowed})"

    def _admits(self, sample_id: object) -> bool:
        if self._classes is None:
            return True
        try:
            return split_sample_id(sample_id)[1] in self._classes  # type: ignore[arg-type]
        except InvalidSampleIdError:
            return False


class EmbeddingDataset(torch.utils.data.Dataset[Any]):
    """Cached embeddings as a map-style Dataset, for torch's DataLoader.

    An item is `embedding`, or `(embedding, label)` with labels. A batch is fetched with one call,
    whether the DataLoader collates with torch's default or with `collate_embeddings`, which saves
    a copy. Works with any `num_workers`, start method, and `persistent_workers`.

    Args:
        reader: Where the embeddings are, such as `cache.reader(config)`.
        sample_ids: The samples, in order; None takes all that are stored.
        labels: One label for each sample: a sequence of ints, or a Mapping of class name to label.

    Raises:
        ValueError: Not as many labels as samples.
        KeyError: A class has no label.
    """

    def __init__(
        self,
        reader: EmbeddingReader,
        sample_ids: Sequence[str] | None = None,
        labels: Sequence[int] | Mapping[str, int] | None = None,
    ) -> None:
        self.reader = reader
        self.sample_ids = list(reader if sample_ids is None else sample_ids)
        self.labels = None if labels is None else self._label_tensor(labels)

    def _label_tensor(self, labels: Sequence[int] | Mapping[str, int]) -> torch.Tensor:
        if isinstance(labels, Mapping):
            labels = [labels[split_sample_id(sample_id)[1]] for sample_id in self.sample_ids]
        if len(labels) != len(self.sample_ids):
            raise ValueError(f"{len(labels)} labels for {len(self.sample_ids)} samples")
        return torch.as_tensor(labels, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> Any:
        embedding = as_tensor(self.reader[self.sample_ids[index]])
        return embedding if self.labels is None else (embedding, self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> CollatedBatch:
        embeddings = as_tensor(self.reader.get_batch([self.sample_ids[i] for i in indices]))
        return CollatedBatch(
            embeddings if self.labels is None else (embeddings, self.labels[list(indices)])
        )


class CollatedBatch(Sequence[Any]):
    """A batch that is collated already and still reads as a list of samples."""

    def __init__(self, collated: Any) -> None:
        self.collated = collated

    def __len__(self) -> int:
        first = self.collated[0] if isinstance(self.collated, tuple) else self.collated
        return len(first)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(self.collated, tuple):
            return tuple(part[index] for part in self.collated)
        return self.collated[index]


def collate_embeddings(batch: Any) -> Any:
    """The `collate_fn` of `EmbeddingDataset`: takes the collated batch as it is.

    Returns:
        `embeddings` of shape `(batch, *embedding_shape)`, or `(embeddings, labels)` with labels
        of shape `(batch,)` int64.
    """
    if isinstance(batch, CollatedBatch):
        return batch.collated
    return torch.utils.data.default_collate(batch)

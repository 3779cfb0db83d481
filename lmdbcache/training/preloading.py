"""A store, or some of its samples, copied once into shared memory for all workers and splits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache.cache import HiddenStateView
from lmdbcache.errors import CacheFullError, InvalidEmbeddingError, SampleNotFoundError
from lmdbcache.files import readable_size
from lmdbcache.storage import EmbeddingReader, canonical_sample_id
from lmdbcache.training.dataset import DTYPES, shared_memory

_STEP_BYTES = 64 << 20


def preload(
    reader: EmbeddingReader | HiddenStateView,
    sample_ids: Sequence[str] | None = None,
    *,
    max_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PreloadedEmbeddings:
    """Copy embeddings into shared memory, once for all processes.

    Pays when the page cache won't keep the file, such as when it is on a slow or network disk or
    other jobs fill the memory; on a warm page cache reading the store is as fast.

    Args:
        reader: Where the embeddings are, or a view of them.
        sample_ids: Which ones; None takes all.
        max_bytes: Refuse to take more than this.
        progress: Called with how many embeddings are copied, and how many there are.

    Raises:
        CacheFullError: More than `max_bytes`, or than there is of shared memory.
        InvalidEmbeddingError: The embeddings have no common shape.
        SampleNotFoundError: Names what the store lacks.
    """
    selection = reader.select(sample_ids)
    shape = reader.embedding_shape or ()
    if None in shape:
        raise InvalidEmbeddingError(
            f"{reader.path}: embeddings of different lengths can't be preloaded as one tensor"
        )
    dtype = DTYPES[reader.config.dtype]
    row_bytes = math.prod(n for n in shape if n) * dtype.itemsize
    needed = row_bytes * len(selection)
    if max_bytes is not None and needed > max_bytes:
        raise CacheFullError(
            f"{len(selection)} embeddings need {readable_size(needed)}, `max_bytes` allows "
            f"{readable_size(max_bytes)}. Preload fewer samples, or read from the store"
        )
    raw = shared_memory(max(1, needed))[:needed]
    step = max(1, _STEP_BYTES // row_bytes)
    for start in range(0, len(selection), step):
        positions = np.arange(start, min(start + step, len(selection)))
        batch = selection.get_batch(positions).reshape(-1).view(np.uint8)
        raw[start * row_bytes : start * row_bytes + len(batch)] = torch.from_numpy(batch)
        if progress is not None:
            progress(start + len(positions), len(selection))
    embeddings = raw.view(dtype).view(len(selection), *(n or 0 for n in shape))
    return PreloadedEmbeddings(embeddings, selection.sample_ids)


class PreloadedEmbeddings:
    """Embeddings in shared memory. Pickles to worker processes without a copy.

    Args:
        embeddings: `(n, *embedding_shape)` in shared memory.
        sample_ids: Their sample ids.
    """

    def __init__(self, embeddings: torch.Tensor, sample_ids: Sequence[str]) -> None:
        self.embeddings = embeddings
        self.sample_ids = list(sample_ids)
        self._rows: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def select(self, sample_ids: Sequence[str] | None = None) -> PreloadedSelection:
        """Return these samples by position; None takes all.

        Raises:
            SampleNotFoundError: A sample wasn't preloaded.
        """
        if sample_ids is None:
            return PreloadedSelection(self.embeddings, self.sample_ids, None)
        if self._rows is None:
            self._rows = {
                canonical_sample_id(sample_id): row for row, sample_id in enumerate(self.sample_ids)
            }
        try:
            rows = [self._rows[canonical_sample_id(sample_id)] for sample_id in sample_ids]
        except KeyError as error:
            raise SampleNotFoundError(f"{error.args[0]!r} wasn't preloaded") from None
        return PreloadedSelection(
            self.embeddings, list(sample_ids), torch.tensor(rows, dtype=torch.long)
        )


class PreloadedSelection:
    """Some preloaded samples in a given order, read by position."""

    def __init__(
        self, embeddings: torch.Tensor, sample_ids: list[str], rows: torch.Tensor | None
    ) -> None:
        self._embeddings = embeddings
        self._rows = rows
        self.sample_ids = sample_ids

    def __len__(self) -> int:
        return len(self.sample_ids)

    def get_batch(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the embeddings at these positions, `(n, *embedding_shape)`, a copy."""
        wanted = torch.as_tensor(positions, dtype=torch.long)
        rows = wanted if self._rows is None else self._rows[wanted]
        return self._embeddings.index_select(0, rows)

    def will_need(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Do nothing: they are in memory."""

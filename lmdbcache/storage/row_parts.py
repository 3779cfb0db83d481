"""Some rows of each stored value: what a view reads instead of the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import InvalidEmbeddingError


@dataclass(frozen=True)
class RowPart:
    """Runs of rows of an embedding of shape `(rows, ...)`, one after the other.

    Args:
        first: First row of the first run.
        num_rows: Rows of each run; None takes all from `first` on, in one run.
        num_runs: How many runs.
        stride: Rows from the beginning of one run to that of the next.
    """

    first: int
    num_rows: int | None
    num_runs: int = 1
    stride: int = 0

    def starts(self, shape: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], int]:
        """First row of each run, and the rows of one run, for embeddings of this shape.

        Raises:
            InvalidEmbeddingError: The embedding doesn't have these rows.
        """
        total = shape[0] if shape else 0
        num_rows = total - self.first if self.num_rows is None else self.num_rows
        starts = self.first + self.stride * np.arange(self.num_runs, dtype=np.int64)
        if num_rows < 1 or self.first < 0 or starts[-1] + num_rows > total:
            raise InvalidEmbeddingError(
                f"rows {self.first} to {int(starts[-1]) + num_rows} are asked for, an embedding "
                f"has the shape {shape}; describe its tokens with layout="
            )
        return starts, num_rows

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part of an embedding of this shape."""
        starts, num_rows = self.starts(shape)
        return (len(starts) * num_rows, *shape[1:])

    def places(
        self, offsets: npt.NDArray[np.int64], shape: tuple[int, ...], itemsize: int
    ) -> tuple[npt.NDArray[np.int64], int]:
        """Where the runs lie in the file, and the bytes of one.

        Args:
            offsets: `(n,)` places of the values.
            shape: Of one embedding.
            itemsize: Bytes of one number.
        """
        row_bytes = math.prod(shape[1:]) * itemsize
        starts, num_rows = self.starts(shape)
        return (offsets[:, None] + starts * row_bytes).reshape(-1), num_rows * row_bytes

    def of(self, embedding: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """These rows of one embedding, copied."""
        starts, num_rows = self.starts(embedding.shape)
        rows = (starts[:, None] + np.arange(num_rows)).reshape(-1)
        part: npt.NDArray[Any] = embedding[rows]
        return part

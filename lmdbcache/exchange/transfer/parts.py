"""One file of an export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt

__all__ = ["Embeddings", "Part"]

# One array of them, or several of different lengths.
Embeddings = Sequence[npt.NDArray[Any]] | npt.NDArray[Any]


class Part(Protocol):
    """One file that embeddings are added to in order; whole once it is closed."""

    def add(self, sample_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Add some embeddings."""

    def close(self) -> None:
        """Finish the file."""

    def abandon(self) -> None:
        """Let go of the file, which is about to be removed."""

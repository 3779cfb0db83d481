"""A dict of embeddings for `torch.load`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmdbcache.exchange.transfer.optional import optional
from lmdbcache.exchange.transfer.parts import Embeddings

__all__ = ["TorchPart"]


class TorchPart:
    """Collects embeddings and saves `{"embeddings": {sample id: tensor}, "metadata": {…}}`.

    Args:
        path: The file.
        description: The metadata.
    """

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        self._torch = optional("torch", "writing a file of torch.save")
        self._path = path
        self._content: dict[str, Any] = {"embeddings": {}, "metadata": description}

    def add(self, sample_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Keep some embeddings."""
        from lmdbcache.training import as_tensor

        for sample_id, array in zip(sample_ids, embeddings, strict=True):
            # A view would take the memory of its whole batch into the file.
            self._content["embeddings"][sample_id] = as_tensor(array.copy())

    def close(self) -> None:
        """Save all of them."""
        with self._path.open("wb") as file:
            self._torch.save(self._content, file)

    def abandon(self) -> None:
        """Nothing is open."""

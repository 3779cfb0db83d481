"""A safetensors file of embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmdbcache.exchange.transfer.optional import optional
from lmdbcache.exchange.transfer.parts import Embeddings

__all__ = ["SafetensorsPart"]


class SafetensorsPart:
    """Collects embeddings and writes them when it is closed.

    One tensor `embeddings` of shape (n, *embedding_shape), with the names in the metadata as JSON
    under `sample_ids`; where the first dimension differs, a tensor for each sample id.

    Args:
        path: The file.
        description: For the metadata, as JSON under `lmdbcache`.
    """

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        self._library = optional("safetensors.numpy", "writing safetensors")
        self._path = path
        self._description = description
        self._ids: list[str] = []
        self._parts: list[Embeddings] = []

    def add(self, sample_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Keep some embeddings."""
        self._ids += sample_ids
        self._parts.append(embeddings)

    def close(self) -> None:
        """Write all of them."""
        metadata = {"lmdbcache": json.dumps(self._description)}
        if None in self._description["embedding_shape"]:
            arrays = [array for part in self._parts for array in part]
            tensors = dict(zip(self._ids, arrays, strict=True))
        else:
            tensors = {"embeddings": np.concatenate([np.asarray(part) for part in self._parts])}
            metadata["sample_ids"] = json.dumps(self._ids)
        self._parts = []
        with self._path.open("wb") as file:
            file.write(self._library.save(tensors, metadata))

    def abandon(self) -> None:
        """Nothing is open."""

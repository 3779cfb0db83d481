"""Caches as scripts have written them before lmdbcache."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from pathlib import Path

FACTS = {"sample_rate": 16000, "duration": 5.0, "model_name": "ast-finetuned"}


def values(number: int = 12, shape: tuple[int, ...] = (8,), seed: int = 0) -> dict[str, Any]:
    """Embeddings of dogs and drums by sample id."""
    generator = np.random.default_rng(seed)
    return {
        f"video_{n:05d}:{'dog' if n % 2 else 'drum'}": generator.normal(size=shape).astype("f4")
        for n in range(number)
    }


def save_torch(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def save_seed(path: Path, arrays: dict[str, Any] | None = None, **facts: Any) -> Path:
    """The form with metadata."""
    arrays = values() if arrays is None else arrays
    shape = np.shape(next(iter(arrays.values()), ()))
    metadata = {**FACTS, "num_embeddings": len(arrays), "embedding_shape": shape, **facts}
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    return save_torch(path, {"embeddings": tensors, "metadata": metadata})


def save_npz(path: Path, arrays: dict[str, Any] | None = None, **facts: Any) -> Path:
    """An array for each name, and the facts beside them."""
    np.savez(path, **{**FACTS, **facts}, **(values() if arrays is None else arrays))
    return path


def save_manifests(
    root: Path, arrays: dict[str, Any], rows: int = 4, variant: str = "pair"
) -> Path:
    """Write <class>/embeddings_NNN.npy and <class>/manifest.json.

    The variant `listed` also lists the chunks and what they hold.
    """
    by_class: dict[str, list[tuple[str, Any]]] = {}
    for sample_id, array in arrays.items():
        file_id, _, name = sample_id.rpartition(":")
        by_class.setdefault(name, []).append((file_id, array))
    for name, found in by_class.items():
        folder = root / name
        folder.mkdir(parents=True)
        manifest = {}
        chunks = []
        for first in range(0, len(found), rows):
            number = first // rows
            name_of_chunk = f"embeddings_{number:03d}.npy"
            chunk = np.stack([array for _, array in found[first : first + rows]])
            np.save(folder / name_of_chunk, chunk)
            stated = {"file": name_of_chunk, "num_samples": len(chunk), "shape": chunk.shape}
            chunks.append(stated)
            for offset, (file_id, _) in enumerate(found[first : first + rows]):
                manifest[file_id] = {
                    "named": {"chunk": number, "offset": offset},
                    "files": {"file": name_of_chunk, "index": offset},
                }.get(variant, [number, offset])
        content: Any = {
            "wrapped": {"entries": manifest, "version": 1},
            "listed": {
                "file_id_to_index": manifest,
                "chunks": chunks,
                "embedding_shape": found[0][1].shape,
                "total_samples": len(found),
                "class_name": name,
                "created": "2026-01-29T12:00:00",
                "last_updated": "2026-01-29T12:00:00",
            },
        }.get(variant, manifest)
        (folder / "manifest.json").write_text(json.dumps(content))
    return root


def save_folder(root: Path, arrays: dict[str, Any], form: str = "{cls}/{id}.npy") -> Path:
    """A file for each embedding."""
    for sample_id, array in arrays.items():
        file_id, _, name = sample_id.rpartition(":")
        path = root / form.format(cls=name, id=file_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    return root

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
    """Write <class>/embeddings_NNN.npy and <class>/manifest.json."""
    rows = 4
    by_class: dict[str, list[tuple[str, Any]]] = {}
    for sample_id, array in arrays.items():
        file_id, _, name = sample_id.rpartition(":")
        by_class.setdefault(name, []).append((file_id, array))
    for name, found in by_class.items():
        folder = root / name
        folder.mkdir(parents=True)
        manifest = {}
        for first in range(0, len(found), rows):
            chunk = found[first : first + rows]
            number = first // rows
            np.save(folder / f"embeddings_{number:03d}.npy", np.stack([a for _, a in chunk]))
            for offset, (file_id, _) in enumerate(chunk):
                manifest[file_id] = {
                    "pair": [number, offset],
                    "wrapped": [number, offset],
                    "named": {"chunk": number, "offset": offset},
                    "files": {"file": f"embeddings_{number:03d}.npy", "index": offset},
                }[variant]
        content: Any = {"entries": manifest, "version": 1} if variant == "wrapped" else manifest
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

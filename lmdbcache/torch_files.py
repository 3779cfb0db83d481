"""Dicts of tensors that scripts keep with `torch.save`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmdbcache.errors import DatasetError

__all__ = ["read_tensor_dict", "read_text_embeddings"]


def read_tensor_dict(path: str | Path, *, mmap: bool) -> dict[str, Any]:
    """Read a dict of names and tensors; no pickled code is run.

    Args:
        path: File written by `torch.save`.
        mmap: Leave the tensors on disk until they are read.

    Raises:
        DatasetError: The file can't be read, or holds something else.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise DatasetError(
            f"{path}: torch.load(weights_only=True) refuses it: {error}. Save it again with "
            "torch.save as a dict of names and tensors"
        ) from error
    if not isinstance(values, dict):
        raise DatasetError(f"{path}: holds a {type(values).__name__}; expected a dict")
    return values


def read_text_embeddings(path: str | Path) -> dict[str, Any]:
    """Read a dict of class name → text embedding; names come in lower case.

    Raises:
        DatasetError: The file is missing, can't be read, or holds something else.
    """
    if not Path(path).is_file():
        raise DatasetError(f"embedding_file: {str(path)!r} isn't a file")
    return {str(name).lower(): value for name, value in read_tensor_dict(path, mmap=False).items()}

"""safetensors files: a tensor for each name, or one with the names in the metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmdbcache.errors import TransferError
from lmdbcache.exchange.formats.base import (
    EMBEDDINGS,
    IDS,
    Description,
    Embeddings,
    Part,
    Rows,
    Samples,
    Source,
    describe,
    description_of_json,
    first_of,
    optional,
    read_files,
    text_list,
)
from lmdbcache.exchange.formats.keys import KeyChoice

_DTYPES: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read(path: Path, files: Sequence[Path], choice: KeyChoice) -> Source:
    """List the embeddings of one file or of several shards; they stay on disk.

    Raises:
        TransferError: A file isn't whole, or has one array without names.
    """
    library = optional("safetensors", "reading safetensors")

    def add_file(source: Source, file: Path) -> Description:
        try:
            opened = library.safe_open(file, "np")
        except (OSError, library.SafetensorError) as error:
            raise TransferError(f"{file}: not a whole safetensors file ({error})") from None
        metadata = opened.metadata() or {}
        is_ours = "lmdbcache" in metadata
        source.description = (
            description_of_json(metadata["lmdbcache"]) if is_ours else describe(metadata)
        )
        _add(source, file, opened, metadata, choice)
        return source.description

    return read_files(path, "safetensors", files, add_file)


def _add(
    source: Source, file: Path, opened: Any, metadata: dict[str, str], choice: KeyChoice
) -> None:
    names = sorted(opened.keys())
    held = first_of(dict.fromkeys(names), EMBEDDINGS)

    def shape_and_dtype(name: str) -> tuple[tuple[int, ...], str]:
        part = opened.get_slice(name)
        return tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype().lower())

    if held is None or len(names) > 1:
        source.add_named(names, choice, shape_and_dtype, opened.get_tensor)
        return
    shape, dtype = shape_and_dtype(held)
    if not shape:
        raise TransferError(f"{file}: {held!r} is a single number")
    rows = Rows(
        name=f"{file.name}[{held!r}]",
        num_rows=shape[0],
        ids=_ids(metadata),
        classes=None,
        shape=lambda _: shape[1:],
        dtype=dtype,
        load=lambda number: opened.get_slice(held)[number],
        is_exact=source.description.is_export,
    )
    source.add_rows(rows, choice)


def _ids(metadata: dict[str, str]) -> list[str] | None:
    name = first_of(metadata, IDS)
    try:
        return None if name is None else text_list(json.loads(metadata[name]))
    except (ValueError, RecursionError):
        return None


class SafetensorsPart(Part):
    """Collects embeddings and writes them when it is closed.

    One tensor `embeddings` of shape (n, *embedding_shape), with the names in the metadata as JSON
    under `sample_ids`; where the first dimension differs, a tensor for each sample id. The
    description is in the metadata, as JSON under `lmdbcache`.
    """

    def __init__(self, path: Path, samples: Samples) -> None:
        self._library = optional("safetensors.numpy", "writing safetensors")
        self._path = path
        self._description = samples.description
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
        """Nothing is open, and nothing is written."""

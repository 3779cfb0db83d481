"""Embeddings in safetensors files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from lmdbcache.errors import TransferError
from lmdbcache.exchange.transfer.descriptions import Description, describe, description_of_json
from lmdbcache.exchange.transfer.entries import Listing, Source
from lmdbcache.exchange.transfer.forms import (
    EMBEDDINGS,
    IDS,
    KeyChoice,
    Rows,
    add_rows,
    first_of,
    text_list,
)
from lmdbcache.exchange.transfer.optional import optional

__all__ = ["read_safetensors_source"]

_DTYPES: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_safetensors_source(path: Path, files: Sequence[Path], choice: KeyChoice) -> Source:
    """List the embeddings of one file or of several shards; they stay on disk.

    Raises:
        TransferError: A file isn't whole, or one array without names.
    """
    safetensors = optional("safetensors", "reading safetensors")
    source = Source(path, "safetensors", Description(), Listing(), files=files)
    told: list[Description] = []
    for file in files:
        try:
            opened = safetensors.safe_open(file, "np")
        except (OSError, safetensors.SafetensorError) as error:
            raise TransferError(f"{file}: not a whole safetensors file ({error})") from None
        metadata = opened.metadata() or {}
        told.append(
            description_of_json(metadata["lmdbcache"])
            if "lmdbcache" in metadata
            else describe(metadata)
        )
        source.notes += _add_file(source.listing, file, opened, metadata, choice, told[-1])
    if any(one.facts != told[0].facts for one in told):
        raise TransferError(f"{path}: its files name different configs; import them one by one")
    source.description = told[0]
    return source


def _add_file(
    listing: Listing,
    file: Path,
    opened: Any,
    metadata: dict[str, str],
    choice: KeyChoice,
    description: Description,
) -> list[str]:
    names = sorted(opened.keys())
    held = first_of(dict.fromkeys(names), EMBEDDINGS)
    if held is not None and len(names) == 1:
        part = opened.get_slice(held)
        shape = tuple(part.get_shape())
        if not shape:
            raise TransferError(f"{file}: {held!r} is a single number")
        rows = Rows(
            name=f"{file.name}[{held!r}]",
            num_rows=shape[0],
            ids=_ids(metadata),
            classes=None,
            shape=lambda _: shape[1:],
            dtype=_DTYPES.get(part.get_dtype(), part.get_dtype().lower()),
            load=partial(_row, opened, held),
            is_exact=description.is_export,
        )
        return add_rows(listing, rows, choice)
    reader = choice.reader(names, is_exact=description.is_export)
    for name in names:
        part = opened.get_slice(name)
        listing.add(
            name,
            partial(reader.sample_id, name),
            tuple(part.get_shape()),
            _DTYPES.get(part.get_dtype(), part.get_dtype().lower()),
            partial(opened.get_tensor, name),
        )
    return reader.notes


def _row(opened: Any, held: str, number: int) -> Any:
    return opened.get_slice(held)[number]


def _ids(metadata: dict[str, str]) -> list[str] | None:
    name = first_of(metadata, IDS)
    try:
        return None if name is None else text_list(json.loads(metadata[name]))
    except (ValueError, RecursionError):
        return None

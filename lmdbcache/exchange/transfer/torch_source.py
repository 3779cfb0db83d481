"""Embeddings kept with `torch.save`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from lmdbcache.errors import DatasetError, TransferError
from lmdbcache.exchange.transfer.descriptions import describe
from lmdbcache.exchange.transfer.entries import Listing, Source, dtype_name
from lmdbcache.exchange.transfer.forms import (
    CLASSES,
    EMBEDDINGS,
    IDS,
    METADATA,
    KeyChoice,
    Rows,
    add_rows,
    first_of,
    text_list,
)
from lmdbcache.exchange.transfer.keys import file_id_in_class, is_vegas_clip
from lmdbcache.training import read_tensor_dict, unwrapped

__all__ = ["read_torch_source"]

_SCALARS: Final = (str, bytes, bool, int, float, type(None))


def read_torch_source(path: Path, choice: KeyChoice) -> Source:
    """List the embeddings of a file that holds a dict; tensors stay on disk until they are read.

    Raises:
        TransferError: Not such a file.
    """
    try:
        content = read_tensor_dict(path, mmap=True)
    except DatasetError as error:
        raise TransferError(str(error)) from error
    held = first_of(content, EMBEDDINGS)
    values = content if held is None else content[held]
    told = {key: value for key, value in content.items() if isinstance(value, _SCALARS)}
    metadata = content.get(first_of(content, METADATA) or "")
    description = describe({**told, **metadata} if isinstance(metadata, Mapping) else told)
    listing = Listing()
    source = Source(path, "torch file", description, listing, files=[path])
    if not isinstance(values, Mapping):
        if held is not None:
            rows = _rows(path, held, values, content)
            labels = first_of(content, CLASSES)
            if labels is not None and rows.classes is None:
                source.notes.append(f"{labels!r} isn't a list of the classes' names; left out")
            source.notes += add_rows(listing, rows, choice)
        return source
    if held is None:
        values = {k: v for k, v in values.items() if k not in METADATA and k not in told}
    else:
        left = [str(k) for k in content if k not in (held, *METADATA) and k not in told]
        if left:
            source.notes.append(f"not looked at in {path.name}: {', '.join(sorted(left)[:5])}")
    source.notes += _add_all(listing, values, choice, is_exact=description.is_export)
    return source


def _rows(path: Path, held: str, values: Any, content: Mapping[Any, Any]) -> Rows:
    if not isinstance(values, (torch.Tensor, np.ndarray, list, tuple)) or not hasattr(
        values, "__len__"
    ):
        raise TransferError(
            f"{path}: {held!r} is of type {type(values).__name__}; expected a dict of names and "
            "embeddings, or a tensor with a list of names beside it"
        )
    if getattr(values, "ndim", 1) == 0:
        raise TransferError(f"{path}: {held!r} is a single number")
    return Rows(
        name=f"{path.name}[{held!r}]",
        num_rows=len(values),
        ids=text_list(content.get(first_of(content, IDS) or "")),
        classes=text_list(content.get(first_of(content, CLASSES) or "")),
        shape=lambda number: getattr(values[number], "shape", None),
        dtype=dtype_name(values),
        load=values.__getitem__,
    )


def _add_all(
    listing: Listing, values: Mapping[Any, Any], choice: KeyChoice, *, is_exact: bool
) -> list[str]:
    several = [key for key, value in values.items() if _is_clip(key) and _is_class(value)]
    for key in several:
        listing.refuse(
            key,
            f"{len(values[key])} embeddings ({', '.join(map(repr, list(values[key])[:3]))}) of one "
            "clip, which has one in a store: save a file for each of them, as a dict of "
            "file_id:class and tensor, and import each with its own --output",
        )
    flat, classes = _flattened({k: v for k, v in values.items() if k not in several})
    hints = {key: name for key, name in classes.items() if name}
    reader = choice.reader(list(flat), hints, is_exact=is_exact)
    for key, value in flat.items():
        shown = key if isinstance(key, str) else repr(key)
        embedding = unwrapped(value)
        if not isinstance(embedding, (torch.Tensor, np.ndarray)):
            listing.refuse(shown, f"a {type(value).__name__} without a tensor or array in it")
            continue
        listing.add(
            shown,
            partial(reader.sample_id, key),
            tuple(embedding.shape),
            dtype_name(embedding),
            partial(_same, embedding),
        )
    return reader.notes


def _flattened(values: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, str]]:
    """Key → value and key → class, with the dicts of single classes taken apart."""
    flat: dict[Any, Any] = {}
    classes: dict[Any, str] = {}
    for key, value in values.items():
        if _is_class(value):
            for name, one in value.items():
                is_text = isinstance(name, str) and isinstance(key, str)
                joined = f"{file_id_in_class(name, key)}:{key}" if is_text else name
                flat[joined], classes[joined] = one, str(key)
            continue
        flat[key] = value
        if isinstance(value, Mapping):
            hint = value.get("class_name", value.get("class"))
            classes[key] = hint if isinstance(hint, str) else ""
    return flat, classes


def _is_clip(key: Any) -> bool:
    """Whether a name is that of a clip and not that of a class, which has no colon."""
    return isinstance(key, str) and (":" in key or is_vegas_clip(key))


def _is_class(value: Any) -> bool:
    """Whether this is a dict of one class's embeddings and not that of one embedding."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(one, (torch.Tensor, np.ndarray)) for one in value.values())
        and first_of(value, EMBEDDINGS) is None
    )


def _same(value: Any) -> Any:
    return value

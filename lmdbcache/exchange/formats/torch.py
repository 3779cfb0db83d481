"""Files of `torch.save`: a dict of embeddings, by itself or among other things."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmdbcache.errors import DatasetError, TransferError
from lmdbcache.exchange.formats.base import (
    CLASSES,
    EMBEDDINGS,
    IDS,
    METADATA,
    Embeddings,
    Part,
    Rows,
    Samples,
    Source,
    describe,
    dtype_name,
    first_of,
    optional,
    text_list,
)
from lmdbcache.exchange.formats.keys import KeyChoice, KeyReader, file_id_in_class, is_numbered_clip

_SCALARS: Final = (str, bytes, bool, int, float, type(None))


def read(path: Path, files: Sequence[Path], choice: KeyChoice) -> Source:
    """List the embeddings of a file that holds a dict; tensors stay on disk until they are read.

    Raises:
        TransferError: Not such a file.
    """
    optional("torch", "reading a file of torch.save")
    from lmdbcache.training import read_tensor_dict

    try:
        content = read_tensor_dict(path, mmap=True)
    except DatasetError as error:
        raise TransferError(str(error)) from error
    held = first_of(content, EMBEDDINGS)
    values = content if held is None else content[held]
    facts = {key: value for key, value in content.items() if isinstance(value, _SCALARS)}
    metadata = content.get(first_of(content, METADATA) or "")
    if isinstance(metadata, Mapping):
        facts |= metadata
    source = Source(path, "torch file", files, describe(facts))
    if held is not None and not isinstance(values, Mapping):
        rows = _rows(path, held, values, content)
        labels = first_of(content, CLASSES)
        if labels is not None and rows.classes is None:
            source.notes.append(f"{labels!r} isn't a list of the classes' names; left out")
        source.add_rows(rows, choice)
        return source
    others = [
        key
        for key, value in content.items()
        if key != held and key not in METADATA and not isinstance(value, _SCALARS)
    ]
    if held is not None and others:
        names = ", ".join(sorted(map(str, others))[:5])
        source.notes.append(f"not looked at in {path.name}: {names}")
    _add_all(source, values if held is not None else {k: content[k] for k in others}, choice)
    return source


def _rows(path: Path, held: str, values: Any, content: Mapping[Any, Any]) -> Rows:
    if not (_is_array(values) or isinstance(values, (list, tuple))):
        raise TransferError(
            f"{path}: {held!r} is of type {type(values).__name__}; expected a dict of names and "
            "embeddings, or a tensor and a list of names"
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


def _add_all(source: Source, values: Mapping[Any, Any], choice: KeyChoice) -> None:
    from lmdbcache.training import unwrapped

    several = [key for key, value in values.items() if _is_clip(key) and _is_class(value)]
    for key in several:
        source.refuse(
            key,
            f"{len(values[key])} embeddings ({', '.join(map(repr, list(values[key])[:3]))}) of one "
            "clip, which has one in a store: save a file for each of them, as a dict of "
            "file_id:class and tensor, and import each with another `output`",
        )
    flat, hints = _flattened({k: v for k, v in values.items() if k not in several})
    reader = KeyReader(list(flat), choice, hints, is_exact=source.description.is_export)
    source.notes += reader.notes
    for key, value in flat.items():
        shown = key if isinstance(key, str) else repr(key)
        embedding = unwrapped(value)
        if not _is_array(embedding):
            source.refuse(shown, f"a {type(value).__name__} without a tensor or array in it")
            continue
        source.add(
            shown,
            partial(reader.sample_id, key),
            tuple(embedding.shape),
            dtype_name(embedding),
            lambda embedding=embedding: embedding,  # type: ignore[misc]
        )


def _flattened(values: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, str]]:
    """Key → value and key → class where one is stated, with dicts of single classes taken apart."""
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
        hint = value.get("class_name", value.get("class")) if isinstance(value, Mapping) else None
        if isinstance(hint, str) and hint:
            classes[key] = hint
    return flat, classes


def _is_clip(key: Any) -> bool:
    """Whether a name is that of a clip and not that of a class."""
    return isinstance(key, str) and (":" in key or is_numbered_clip(key))


def _is_class(value: Any) -> bool:
    """Whether this is a dict of one class's embeddings and not that of one embedding."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(map(_is_array, value.values()))
        and first_of(value, EMBEDDINGS) is None
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, (sys.modules["torch"].Tensor, np.ndarray))


class TorchPart(Part):
    """Collects embeddings and saves `{"embeddings": {sample id: tensor}, "metadata": {…}}`."""

    def __init__(self, path: Path, samples: Samples) -> None:
        self._torch = optional("torch", "writing a file of torch.save")
        self._path = path
        self._content: dict[str, Any] = {"embeddings": {}, "metadata": samples.description}

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
        """Nothing is open, and nothing is written."""

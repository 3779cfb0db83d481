"""Embeddings in Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import TransferError
from lmdbcache.transfer.descriptions import Description, description_of_json
from lmdbcache.transfer.entries import Listing, Source
from lmdbcache.transfer.forms import EMBEDDINGS, KeyChoice, Rows, add_rows, first_of
from lmdbcache.transfer.forward import ForwardRows
from lmdbcache.transfer.optional import optional

__all__ = ["read_parquet_source"]

_EMBEDDINGS: Final = ("embedding", *EMBEDDINGS)
_IDS: Final = ("sample_id", "file_id", "filename", "file_name", "id")
_CLASSES: Final = ("class", "class_name", "label", "category")
_ROWS_AT_ONCE: Final = 1024
_BYTES_AT_ONCE: Final = 8 << 20


def read_parquet_source(path: Path, files: Sequence[Path], choice: KeyChoice) -> Source:
    """List the embeddings of one file or of several; they are read in order.

    Raises:
        TransferError: A file isn't whole, or lacks a column.
    """
    parquet = optional("pyarrow.parquet", "reading Parquet")
    source = Source(path, "Parquet", Description(), Listing(), files=files)
    told: list[Description] = []
    for file in files:
        try:
            opened = parquet.ParquetFile(file, memory_map=True, page_checksum_verification=True)
        except (OSError, ValueError) as error:
            raise TransferError(f"{file}: not a whole Parquet file ({error})") from None
        metadata = opened.schema_arrow.metadata or {}
        told.append(description_of_json(metadata.get(b"lmdbcache")))
        rows = _rows(file, opened, told[-1])
        source.notes += add_rows(source.listing, rows, choice)
    if any(one.facts != told[0].facts for one in told):
        raise TransferError(f"{path}: its files name different configs; import them one by one")
    source.description = told[0]
    return source


def _rows(file: Path, opened: Any, description: Description) -> Rows:
    columns = dict.fromkeys(opened.schema_arrow.names)
    held, ids = first_of(columns, _EMBEDDINGS), first_of(columns, _IDS)
    if held is None or ids is None:
        raise TransferError(
            f"{file}: columns {', '.join(columns)}; expected 'embedding', and 'sample_id' or "
            "'file_id' with 'class'"
        )
    class_column = first_of(columns, _CLASSES) if ids != "sample_id" else None
    shape = description.embedding_shape
    fixed, dtype = _type_of(opened.schema_arrow.field(held).type)
    rest: tuple[int, ...] | None = None
    if shape is not None:
        rest = tuple(size for size in shape if size is not None)
        fixed = rest if None not in shape else None
    return Rows(
        name=f"{file.name}[{held!r}]",
        num_rows=opened.metadata.num_rows,
        ids=_texts(file, opened, ids),
        classes=_texts(file, opened, class_column) if class_column else None,
        shape=lambda _: fixed,
        dtype=dtype,
        load=ForwardRows(
            partial(_blocks, file, opened, held, fixed, rest), opened.metadata.num_rows
        ),
        is_exact=description.is_export,
    )


def _texts(file: Path, opened: Any, column: str) -> list[str]:
    names: list[str] = opened.read(columns=[column])[column].to_pylist()
    if not all(isinstance(name, str) for name in names):
        raise TransferError(f"{file}: column {column!r} isn't text in every row")
    return names


def _type_of(kind: Any) -> tuple[tuple[int, ...] | None, str | None]:
    """(shape, numpy's dtype) of a column of lists; None for what only its rows tell."""
    types = optional("pyarrow.types", "reading Parquet")
    shape: list[int] | None = []
    while types.is_nested(kind):
        if not hasattr(kind, "value_type"):
            return None, None
        is_fixed = types.is_fixed_size_list(kind)
        shape = [*shape, kind.list_size] if is_fixed and shape is not None else None
        kind = kind.value_type
    try:
        return None if shape is None else tuple(shape), np.dtype(kind.to_pandas_dtype()).name
    except (NotImplementedError, TypeError):
        return None, None


def _blocks(
    file: Path,
    opened: Any,
    column: str,
    shape: tuple[int, ...] | None,
    rest: tuple[int, ...] | None,
) -> Iterator[Sequence[npt.NDArray[Any] | None]]:
    group = opened.metadata.row_group(0) if opened.metadata.num_row_groups else None
    row_bytes = group.total_byte_size // max(1, group.num_rows) if group else 0
    step = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(1, row_bytes)))
    try:
        for batch in opened.iter_batches(batch_size=step, columns=[column]):
            lists = batch.column(0)
            yield [_array(lists[row], shape, rest) for row in range(len(lists))]
    except (OSError, ValueError) as error:
        raise TransferError(f"{file.name}: column {column!r} can't be read ({error})") from None


def _array(
    value: Any, shape: tuple[int, ...] | None, rest: tuple[int, ...] | None
) -> npt.NDArray[Any] | None:
    if not value.is_valid:
        return None
    items = value.values
    if hasattr(items.type, "value_type"):  # lists of lists
        return np.array(value.as_py())
    array: npt.NDArray[Any] = items.to_numpy(zero_copy_only=False)
    if shape is None and rest is not None:
        return array.reshape(-1, *rest)
    return array if shape is None else array.reshape(shape)

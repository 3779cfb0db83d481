"""Embeddings as the rows of an Arrow table, for Parquet and Lance alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import TransferError
from lmdbcache.exchange.formats.base import (
    CHECKSUM,
    EMBEDDINGS,
    Description,
    Embeddings,
    ForwardRows,
    Rows,
    Source,
    check,
    description_of_json,
    first_of,
    optional,
    without_bfloat16,
)
from lmdbcache.exchange.formats.keys import KeyChoice
from lmdbcache.storage import split_sample_id

TEXT_COLUMNS: Final = "sample_id", "file_id", "class"
_METADATA: Final = "lmdbcache"
_EMBEDDINGS: Final = ("embedding", *EMBEDDINGS)
_IDS: Final = ("sample_id", "file_id", "filename", "file_name", "id")
_CLASSES: Final = ("class", "class_name", "label", "category")
_ROWS_AT_ONCE: Final = 1024
_BYTES_AT_ONCE: Final = 8 << 20

_Shape = tuple[int, ...]


# ---- reading


class ArrowFile(Protocol):
    """A file, or a folder that is one table."""

    schema: Any
    num_rows: int

    def texts(self, column: str) -> list[Any]:
        """Return all of a column."""

    def batches(self, columns: Sequence[str]) -> Iterable[Any]:
        """Yield record batches of some columns, in order, each of a few MiB.

        Raises:
            OSError, ValueError: The file is damaged.
        """


def rows_at_once(row_bytes: int) -> int:
    """Return the rows of a batch, of so many bytes each."""
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(1, row_bytes)))


def add_table(source: Source, path: Path, table: ArrowFile, choice: KeyChoice) -> Description:
    """Add the embeddings of a table; its texts are read now, its values later.

    Raises:
        TransferError: It lacks a column, or holds names that aren't text.
    """
    description = description_of_json((table.schema.metadata or {}).get(_METADATA.encode()))
    columns = dict.fromkeys(table.schema.names)
    held, ids = first_of(columns, _EMBEDDINGS), first_of(columns, _IDS)
    if held is None or ids is None:
        raise TransferError(
            f"{path}: columns {', '.join(columns)}; expected 'embedding', and 'sample_id' or "
            "'file_id' with 'class'"
        )
    class_column = first_of(columns, _CLASSES) if ids != "sample_id" else None
    shape = description.embedding_shape
    fixed, dtype = _type_of(table.schema.field(held).type)
    rest: _Shape | None = None
    if shape is not None:
        rest = tuple(size for size in shape if size is not None)
        fixed = rest if None not in shape else None
    has_checksums = description.is_export and CHECKSUM in columns
    read = [held, CHECKSUM, ids] if has_checksums else [held]

    def blocks() -> Iterator[Sequence[npt.NDArray[Any] | None]]:
        try:
            for batch in table.batches(read):
                yield _Block(batch, read, fixed, rest)
        except (OSError, ValueError) as error:
            raise TransferError(f"{path.name}: column {held!r} can't be read ({error})") from None

    rows = Rows(
        name=f"{path.name}[{held!r}]",
        num_rows=table.num_rows,
        ids=_texts(path, table, ids),
        classes=_texts(path, table, class_column) if class_column else None,
        shape=lambda _: fixed,
        dtype=dtype,
        load=ForwardRows(blocks, table.num_rows),
        is_exact=description.is_export,
    )
    source.add_rows(rows, choice)
    return description


class _Block(Sequence[Any]):
    """The rows of a record batch, made into arrays when they are asked for."""

    def __init__(
        self, batch: Any, columns: Sequence[str], shape: _Shape | None, rest: _Shape | None
    ) -> None:
        self._lists, *self._checked = (batch.column(name) for name in columns)
        self._shape, self._rest = shape, rest

    def __len__(self) -> int:
        return len(self._lists)

    def __getitem__(self, row: Any) -> Any:
        array = _array(self._lists[row], self._shape, self._rest)
        if array is None or not self._checked:
            return array
        expected, sample_id = (column[row].as_py() for column in self._checked)
        return check(sample_id, array, expected)


def _array(value: Any, shape: _Shape | None, rest: _Shape | None) -> npt.NDArray[Any] | None:
    if not value.is_valid:
        return None
    items = value.values
    if hasattr(items.type, "value_type"):  # lists of lists
        return np.array(value.as_py())
    array: npt.NDArray[Any] = items.to_numpy(zero_copy_only=False)
    if shape is None and rest is not None:
        return array.reshape(-1, *rest)
    return array if shape is None else array.reshape(shape)


def _texts(path: Path, table: ArrowFile, column: str) -> list[str]:
    names: list[str] = table.texts(column)
    if not all(isinstance(name, str) for name in names):
        raise TransferError(f"{path}: column {column!r} isn't text in every row")
    return names


def _type_of(kind: Any) -> tuple[_Shape | None, str | None]:
    """(shape, numpy's dtype) of a column of lists; None for what only its rows show."""
    types = optional("pyarrow.types", "reading Arrow tables")
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


# ---- writing


def embedding_schema(description: dict[str, Any]) -> Any:
    """Return the Arrow schema of a store's embeddings, with their config in its metadata.

    An embedding is a `fixed_size_list` of its values in C order; where the first dimension
    differs, a `large_list`.
    """
    arrow = optional("pyarrow", "writing Arrow tables")
    shape = description["embedding_shape"]
    value = arrow.float16() if description["dtype"] == "float16" else arrow.float32()
    # Nothing is ever null; saying so makes writing faster.
    element = arrow.field("element", value, nullable=False)
    kind = arrow.large_list(element) if None in shape else arrow.list_(element, math.prod(shape))
    columns = [*((name, arrow.string()) for name in TEXT_COLUMNS), ("embedding", kind)]
    return arrow.schema(
        [arrow.field(name, type_, nullable=False) for name, type_ in columns],
        metadata={_METADATA: json.dumps(description)},
    )


def embedding_columns(schema: Any, sample_ids: Sequence[str], embeddings: Embeddings) -> list[Any]:
    """Return the columns of some embeddings, in the order of `embedding_schema`."""
    arrow = optional("pyarrow", "writing Arrow tables")
    kind = schema.field("embedding").type
    arrays = [without_bfloat16(array) for array in embeddings]
    values = arrow.array(np.concatenate([array.reshape(-1) for array in arrays]))
    if arrow.types.is_fixed_size_list(kind):
        column = arrow.FixedSizeListArray.from_arrays(values, type=kind)
    else:
        ends = np.cumsum([0, *(array.size for array in arrays)])
        column = arrow.LargeListArray.from_arrays(ends, values, type=kind)
    file_ids, classes = zip(*map(split_sample_id, sample_ids), strict=True)
    texts = [list(sample_ids), list(file_ids), list(classes)]
    return [*(arrow.array(text, arrow.string()) for text in texts), column]

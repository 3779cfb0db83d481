"""A Parquet file of embeddings, for pandas, pyarrow and Hugging Face datasets alike."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmdbcache.storage.format.layout import split_sample_id
from lmdbcache.transfer.optional import optional
from lmdbcache.transfer.parts import Embeddings

__all__ = ["ParquetPart", "embedding_schema"]

_ROWS: Final = "sample_id", "file_id", "class"


class ParquetPart:
    """Writes one row group for each `add`, with the columns sample_id, file_id, class, embedding.

    An embedding is a `fixed_size_list` of its values in C order; where the first dimension
    differs, a `list`. The shape is in the schema's metadata. bfloat16 is written as float32.

    Args:
        path: The file.
        description: For the schema's metadata.
    """

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        self._arrow = optional("pyarrow", "writing Parquet")
        self._schema = embedding_schema(description)
        parquet = optional("pyarrow.parquet", "writing Parquet")
        self._file = path.open("wb")
        # Embeddings are noise to a compressor and to a dictionary.
        self._writer = parquet.ParquetWriter(
            self._file,
            self._schema,
            compression=dict.fromkeys(_ROWS, "zstd") | _of_embedding(self._schema, "NONE"),
            use_dictionary=["class"],
            write_statistics=list(_ROWS),
            write_page_checksum=True,
        )

    def add(self, sample_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Write some embeddings as one row group."""
        arrow = self._arrow
        parts = [split_sample_id(sample_id) for sample_id in sample_ids]
        kind = self._schema.field("embedding").type
        flat = np.concatenate([np.asarray(array).reshape(-1) for array in embeddings])
        if flat.dtype.name == "bfloat16":
            flat = flat.astype(np.float32)
        values = arrow.array(flat)
        if arrow.types.is_fixed_size_list(kind):
            column = arrow.FixedSizeListArray.from_arrays(values, type=kind)
        else:
            ends = np.cumsum([0, *(array.size for array in embeddings)])
            column = arrow.LargeListArray.from_arrays(ends, values, type=kind)
        file_ids, classes = zip(*parts, strict=True)
        columns = [list(sample_ids), list(file_ids), list(classes), column]
        table = arrow.table(
            [
                arrow.array(values, arrow.string()) if isinstance(values, list) else values
                for values in columns
            ],
            schema=self._schema,
        )
        self._writer.write_table(table, row_group_size=len(sample_ids))

    def close(self) -> None:
        """Write the footer."""
        try:
            self._writer.close()
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close the file; what goes wrong with that doesn't matter any more."""
        with contextlib.suppress(Exception):
            self.close()


def embedding_schema(description: dict[str, Any]) -> Any:
    """The Arrow schema of a store's embeddings, with their config in its metadata."""
    arrow = optional("pyarrow", "writing Parquet")
    shape = description["embedding_shape"]
    value = arrow.float16() if description["dtype"] == "float16" else arrow.float32()
    # Nothing is ever null; saying so makes writing faster.
    element = arrow.field("element", value, nullable=False)
    kind = arrow.large_list(element) if None in shape else arrow.list_(element, math.prod(shape))
    columns = [*((name, arrow.string()) for name in _ROWS), ("embedding", kind)]
    return arrow.schema(
        [arrow.field(name, type_, nullable=False) for name, type_ in columns],
        metadata={"lmdbcache": json.dumps(description)},
    )


def _of_embedding(schema: Any, value: Any) -> dict[str, Any]:
    """A setting for the column of values, by the path that Parquet gives it."""
    name = schema.field("embedding").type.value_field.name
    return {f"embedding.list.{name}": value}

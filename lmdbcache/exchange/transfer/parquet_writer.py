"""A Parquet file of embeddings, for pandas, pyarrow and Hugging Face datasets alike."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmdbcache.exchange.transfer.arrow_table import (
    TEXT_COLUMNS,
    embedding_columns,
    embedding_schema,
)
from lmdbcache.exchange.transfer.optional import optional
from lmdbcache.exchange.transfer.parts import Embeddings

__all__ = ["ParquetPart"]


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
            compression=dict.fromkeys(TEXT_COLUMNS, "zstd") | _of_embedding(self._schema, "NONE"),
            use_dictionary=["class"],
            write_statistics=list(TEXT_COLUMNS),
            write_page_checksum=True,
        )

    def add(self, sample_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Write some embeddings as one row group."""
        columns = embedding_columns(self._schema, sample_ids, embeddings)
        table = self._arrow.table(columns, schema=self._schema)
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


def _of_embedding(schema: Any, value: Any) -> dict[str, Any]:
    """A setting for the column of values, by the path that Parquet gives it."""
    name = schema.field("embedding").type.value_field.name
    return {f"embedding.list.{name}": value}

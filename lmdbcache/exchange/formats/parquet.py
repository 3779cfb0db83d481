"""Parquet files, for pandas, pyarrow and Hugging Face datasets alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmdbcache.errors import TransferError
from lmdbcache.exchange.formats.arrow import (
    TEXT_COLUMNS,
    add_table,
    embedding_columns,
    embedding_schema,
    rows_at_once,
)
from lmdbcache.exchange.formats.base import (
    Description,
    Embeddings,
    Part,
    Samples,
    Source,
    optional,
    read_files,
)
from lmdbcache.exchange.formats.keys import KeyChoice


def read(path: Path, files: Sequence[Path], choice: KeyChoice) -> Source:
    """List the embeddings of one file or of several; they are read in order.

    Raises:
        TransferError: A file isn't whole, or lacks a column.
    """
    parquet = optional("pyarrow.parquet", "reading Parquet")

    def add_file(source: Source, file: Path) -> Description:
        try:
            opened = parquet.ParquetFile(file, memory_map=True, page_checksum_verification=True)
        except (OSError, ValueError) as error:
            raise TransferError(f"{file}: not a whole Parquet file ({error})") from None
        return add_table(source, file, _ParquetFile(opened), choice)

    return read_files(path, "Parquet", files, add_file)


class _ParquetFile:
    def __init__(self, opened: Any) -> None:
        self.schema = opened.schema_arrow
        self.num_rows = opened.metadata.num_rows
        self._opened = opened

    def texts(self, column: str) -> list[Any]:
        found: list[Any] = self._opened.read(columns=[column])[column].to_pylist()
        return found

    def batches(self, columns: Sequence[str]) -> Iterable[Any]:
        metadata = self._opened.metadata
        group = metadata.row_group(0) if metadata.num_row_groups else None
        row_bytes = group.total_byte_size // max(1, group.num_rows) if group else 0
        batches: Iterable[Any] = self._opened.iter_batches(
            batch_size=rows_at_once(row_bytes), columns=list(columns)
        )
        return batches


class ParquetPart(Part):
    """Writes one row group for each `add`, with the columns sample_id, file_id, class, embedding.

    The shape is in the schema's metadata. bfloat16 is written as float32. Memory stays small.
    """

    def __init__(self, path: Path, samples: Samples) -> None:
        self._arrow = optional("pyarrow", "writing Parquet")
        self._schema = embedding_schema(samples.description)
        parquet = optional("pyarrow.parquet", "writing Parquet")
        self._file = path.open("wb")
        # The column of values, by the path that Parquet gives it.
        element = self._schema.field("embedding").type.value_field.name
        # Embeddings are noise to a compressor and to a dictionary.
        compression = {**dict.fromkeys(TEXT_COLUMNS, "zstd"), f"embedding.list.{element}": "NONE"}
        self._writer = parquet.ParquetWriter(
            self._file,
            self._schema,
            compression=compression,
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
        with self._file:
            self._writer.close()

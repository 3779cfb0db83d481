"""Embeddings in Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmdbcache.errors import TransferError
from lmdbcache.exchange.transfer.arrow_rows import rows_at_once, rows_of_table
from lmdbcache.exchange.transfer.descriptions import Description, description_of_json
from lmdbcache.exchange.transfer.entries import Listing, Source
from lmdbcache.exchange.transfer.forms import KeyChoice, add_rows
from lmdbcache.exchange.transfer.optional import optional

__all__ = ["read_parquet_source"]


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
        rows = rows_of_table(file, _ParquetFile(opened), told[-1])
        source.notes += add_rows(source.listing, rows, choice)
    if any(one.facts != told[0].facts for one in told):
        raise TransferError(f"{path}: its files name different configs; import them one by one")
    source.description = told[0]
    return source


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

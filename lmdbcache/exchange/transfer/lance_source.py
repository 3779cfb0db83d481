"""Embeddings in a Lance dataset."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from lmdbcache.errors import TransferError
from lmdbcache.exchange.transfer.arrow_rows import rows_at_once, rows_of_table
from lmdbcache.exchange.transfer.descriptions import description_of_json
from lmdbcache.exchange.transfer.entries import Listing, Source
from lmdbcache.exchange.transfer.forms import KeyChoice, add_rows
from lmdbcache.exchange.transfer.optional import optional

__all__ = ["is_lance_dataset", "read_lance_source"]

# What Lance itself would take are 16 batches and 2 GiB ahead.
_BATCHES_AHEAD: Final = 2
_BYTES_AHEAD: Final = 32 << 20
_DAMAGED: Final = (OSError, ValueError, RuntimeError)


def is_lance_dataset(path: Path) -> bool:
    """Whether a folder is a Lance dataset."""
    return (path / "_versions").is_dir()


def read_lance_source(path: Path, choice: KeyChoice) -> Source:
    """List the embeddings of a dataset's newest version; they are read in order.

    Raises:
        TransferError: It isn't whole, or lacks a column.
    """
    lance = optional("lance", "reading Lance", extra="lance")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    with _whole(path):
        num_bytes = sum(file.stat().st_size for file in files)
        table = _LanceDataset(path, lance.dataset(str(path)), num_bytes)
        description = description_of_json((table.schema.metadata or {}).get(b"lmdbcache"))
        rows = rows_of_table(path, table, description)
    source = Source(path, "Lance", description, Listing(), files=files)
    source.notes += add_rows(source.listing, rows, choice)
    return source


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """What Lance says of a damaged dataset, as ours; a panic of its Rust code, too."""
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # it can't be imported
        if isinstance(error, TransferError) or not (is_panic or isinstance(error, _DAMAGED)):
            raise
        text = " ".join(str(error).split())
        raise TransferError(f"{path}: not a whole Lance dataset ({text})") from None


class _LanceDataset:
    def __init__(self, path: Path, dataset: Any, num_bytes: int) -> None:
        self._path = path
        self.schema = dataset.schema
        self.num_rows = dataset.count_rows()
        self._dataset = dataset
        self._row_bytes = num_bytes // max(1, self.num_rows)

    def texts(self, column: str) -> list[Any]:
        found: list[Any] = self._dataset.to_table(columns=[column])[column].to_pylist()
        return found

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        with _whole(self._path):
            yield from self._dataset.to_batches(
                columns=list(columns),
                batch_size=rows_at_once(self._row_bytes),
                batch_readahead=_BATCHES_AHEAD,
                io_buffer_size=_BYTES_AHEAD,
                scan_in_order=True,
            )

"""Lance datasets: columns with random access by row and by sample id."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmdbcache.errors import TransferError
from lmdbcache.exchange.formats.arrow import (
    add_table,
    embedding_columns,
    embedding_schema,
    rows_at_once,
)
from lmdbcache.exchange.formats.base import (
    CHECKSUM,
    Embeddings,
    Source,
    checksum_in_file,
    optional,
    without_bfloat16,
)
from lmdbcache.exchange.formats.keys import KeyChoice

# What Lance makes in its folder; its manifests, which say which of the others count.
VERSIONS: Final = "_versions"
FOLDERS: Final = {"data", VERSIONS, "_transactions", "_indices", "_deletions"}
# Lance itself would read 16 batches and 2 GiB ahead.
_BATCHES_AHEAD: Final = 2
_BYTES_AHEAD: Final = 32 << 20
_DAMAGED: Final = (OSError, ValueError, RuntimeError)


# ---- reading


def read(path: Path, files: Sequence[Path], choice: KeyChoice) -> Source:
    """List the embeddings of a dataset's newest version; they are read in order.

    Raises:
        TransferError: It isn't whole, or lacks a column.
    """
    lance = optional("lance", "reading Lance", extra="lance")
    source = Source(path, "Lance", files)
    with _whole(path):
        num_bytes = sum(file.stat().st_size for file in files)
        table = _LanceDataset(path, lance.dataset(str(path)), num_bytes)
        source.description = add_table(source, path, table, choice)
    return source


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Raise what Lance says of a damaged dataset as ours; a panic of its Rust code included."""
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


# ---- writing


def write_dataset(
    path: Path,
    description: dict[str, Any],
    batches: Iterable[tuple[Sequence[str], Embeddings]],
    rows_per_file: int,
) -> int:
    """Write a dataset with the columns sample_id, file_id, class, checksum and embedding.

    `sample_id` gets an index, so that a reader finds a sample without reading the column. The
    checksum is there because Lance has none: it returns a flipped bit as it is.

    Args:
        path: The dataset's folder; it may be renamed afterwards.
        description: For the schema's metadata.
        batches: Sample ids and embeddings; taken one by one, from another thread.
        rows_per_file: Most rows of one of its files.

    Returns:
        The number of files with embeddings.

    Raises:
        TransferError: Lance gave up.
        OSError: The disk is full.
    """
    arrow = optional("pyarrow", "writing Lance", extra="lance")
    lance = optional("lance", "writing Lance", extra="lance")
    schema = embedding_schema(description)
    schema = schema.insert(3, arrow.field(CHECKSUM, arrow.uint64(), nullable=False))
    feed = _Feed(batches)

    def record_batches() -> Iterator[Any]:
        for ids, embeddings in feed:
            columns = embedding_columns(schema, ids, embeddings)
            checksums = [
                checksum_in_file(sample_id, without_bfloat16(array))
                for sample_id, array in zip(ids, embeddings, strict=True)
            ]
            columns.insert(3, arrow.array(np.array(checksums, np.uint64)))
            yield arrow.record_batch(columns, schema=schema)

    try:
        reader = arrow.RecordBatchReader.from_batches(schema, record_batches())
        dataset = lance.write_dataset(reader, str(path), max_rows_per_file=rows_per_file)
        dataset.create_scalar_index("sample_id", "BTREE")
    except Exception as error:
        if feed.failure is not None:
            raise feed.failure from None
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise TransferError(f"{path}: Lance couldn't write it ({error})") from error
    finally:
        feed.stop()
    return len(dataset.get_fragments())


class _Feed:
    """Batches for a thread of Lance's, which may ask for more when we have given up."""

    def __init__(self, batches: Iterable[tuple[Sequence[str], Embeddings]]) -> None:
        self.failure: BaseException | None = None  # Lance would only quote it
        self._batches = iter(batches)
        self._reading = threading.Lock()
        self._is_over = False

    def __iter__(self) -> Iterator[tuple[Sequence[str], Embeddings]]:
        while True:
            with self._reading:
                if self._is_over:
                    return
                try:
                    batch = next(self._batches)
                except StopIteration:
                    return
                except BaseException as error:
                    self.failure = error
                    raise
            yield batch

    def stop(self) -> None:
        """Wait for the batch that is being read; from now on the store may be closed."""
        with self._reading:
            self._is_over = True

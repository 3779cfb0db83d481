"""A Lance dataset of embeddings: columns with random access by row and by sample id."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmdbcache.errors import TransferError
from lmdbcache.exchange.transfer.arrow_table import (
    embedding_columns,
    embedding_schema,
    written_form,
)
from lmdbcache.exchange.transfer.checksums import CHECKSUM, checksum
from lmdbcache.exchange.transfer.optional import optional
from lmdbcache.exchange.transfer.parts import Embeddings

__all__ = ["write_lance"]


def write_lance(
    path: Path,
    description: dict[str, Any],
    batches: Iterable[tuple[Sequence[str], Embeddings]],
    rows_per_file: int,
) -> int:
    """Write a dataset with the columns sample_id, file_id, class, checksum and embedding.

    `sample_id` gets an index, so that a reader finds a sample without reading the column. The
    checksum is there because Lance has none: it gives a flipped bit as it stands.

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
                checksum(sample_id, written_form(array))
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
        self.failure: BaseException | None = None  # Lance would tell of it in words only
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

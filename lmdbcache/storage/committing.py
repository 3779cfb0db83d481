"""The puts of one write transaction: embeddings, their checksums, the metadata record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt

from lmdbcache.storage.environment import Environment
from lmdbcache.storage.layout import METADATA_KEY
from lmdbcache.storage.metadata import StoreMetadata, checksum

__all__ = ["put_embeddings", "put_metadata", "with_room"]


def with_room(environment: Environment, write: Callable[[Environment], int]) -> int:
    """Call `write`, again with a larger map each time that this one is full.

    Raises:
        StorageError: There is no address space for a larger one.
    """
    while True:
        try:
            return write(environment)
        except lmdb.MapFullError:
            environment.grow()


def put_embeddings(
    environment: Environment,
    transaction: lmdb.Transaction,
    values: Mapping[bytes, npt.NDArray[Any]],
    *,
    overwrite: bool,
) -> tuple[int, list[bytes]]:
    """Put embeddings of the stored dtype in key order, each with its checksum.

    Returns:
        How many were put, and the keys that were there already and were left alone.
    """
    num_put, left_alone = 0, []
    checksums, put = environment.checksums, transaction.put
    last = max(_last_key(transaction, None), _last_key(transaction, checksums))
    for key in sorted(values):
        value = values[key].reshape(-1).view(np.uint8).data
        # Appended keys fill their pages; inserted ones leave them half empty.
        append = key > last
        if put(key, value, overwrite=overwrite, append=append):
            put(key, checksum(key, value), db=checksums, append=append)
            num_put += 1
        else:
            left_alone.append(key)
    return num_put, left_alone


def put_metadata(
    environment: Environment, transaction: lmdb.Transaction, metadata: StoreMetadata
) -> None:
    """Put the metadata record with its checksum."""
    record = metadata.pack()
    transaction.put(METADATA_KEY, record)
    transaction.put(METADATA_KEY, checksum(METADATA_KEY, record), db=environment.checksums)


def _last_key(transaction: lmdb.Transaction, database: Any) -> bytes:
    with transaction.cursor(db=database) as cursor:
        return bytes(cursor.key()) if cursor.last() else b""

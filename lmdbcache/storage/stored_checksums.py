"""The stored checksums by key: they find equal embeddings without reading them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import lmdb

from lmdbcache.storage.environment import Snapshot
from lmdbcache.storage.reader import EmbeddingReader

__all__ = ["checksums_of", "stored_checksums"]

_KEYS_PER_STEP = 4096


def stored_checksums(reader: EmbeddingReader) -> Iterator[tuple[bytes, bytes]]:
    """(key, checksum) of every embedding, by key.

    A checksum is seeded with its key: under one key, equal values have equal ones, in every store.
    """
    after = b""
    while items := reader.read_pinned(
        lambda snapshot, transaction, start=after: _following(snapshot, transaction, start)  # type: ignore[misc]
    ):
        yield from ((key, expected) for key, expected in items if b":" in key)
        after = items[-1][0]


def checksums_of(reader: EmbeddingReader, keys: Collection[bytes]) -> dict[bytes, bytes]:
    """The checksums of those of these keys that are stored."""

    def read(snapshot: Snapshot, transaction: lmdb.Transaction) -> dict[bytes, bytes]:
        database = snapshot.environment.checksums
        found = {key: transaction.get(key, db=database) for key in keys}
        return {key: bytes(value) for key, value in found.items() if value is not None}

    return reader.read_pinned(read)


def _following(
    snapshot: Snapshot, transaction: lmdb.Transaction, after: bytes
) -> list[tuple[bytes, bytes]]:
    with transaction.cursor(db=snapshot.environment.checksums) as cursor:
        found = cursor.set_range(after) if after else cursor.first()
        if found and after and bytes(cursor.key()) == after:
            found = cursor.next()
        if not found:
            return []
        items = cursor.iternext(keys=True, values=True)
        pairs = zip(items, range(_KEYS_PER_STEP), strict=False)
        return [(bytes(key), bytes(expected)) for (key, expected), _ in pairs]

"""The pages that list what is stored, asked for ahead: a few bytes a sample, and no value.

Where the values are small, LMDB's pages of keys lie scattered among them, and each fault in its map
reads megabytes around.
"""

from __future__ import annotations

import contextlib

import lmdb

from lmdbcache.storage.environment import Snapshot
from lmdbcache.storage.gather import MappedFile
from lmdbcache.storage.layout import CHECKSUMS_NAME
from lmdbcache.storage.pages.page_file import PageFile
from lmdbcache.storage.pages.pages import UnreadablePagesError, leaf_pages

__all__ = ["ask_for_keys", "keys_after"]


def ask_for_keys(snapshot: Snapshot) -> None:
    """Have the kernel read the checksums' pages, whose keys are those of all samples."""
    path = snapshot.environment.generation / "data.mdb"
    # Damaged, or moved on meanwhile: LMDB says so, or reads without.
    with contextlib.suppress(UnreadablePagesError, OSError, ValueError), PageFile(path) as file:
        file.meta = file.metas[snapshot.id & 1]
        tree, mapped = file.find_named(CHECKSUMS_NAME), MappedFile(path)
        if tree is not None and mapped.file_id == snapshot.environment.file:
            mapped.read_single_pages()
            pages = leaf_pages(mapped.data, snapshot.id, tree)
            mapped.will_need(pages * file.page_size, file.page_size)


def keys_after(
    snapshot: Snapshot, transaction: lmdb.Transaction, after: bytes, limit: int
) -> list[bytes]:
    """Return the keys of the embeddings that follow a key, in order, at most so many."""
    # The checksums have the same keys; those of small values lie among the values.
    with transaction.cursor(db=snapshot.environment.checksums) as cursor:
        found = cursor.set_range(after) if after else cursor.first()
        if found and after and cursor.key() == after:
            found = cursor.next()
        if not found:
            return []
        keys = cursor.iternext(keys=True, values=False)
        return [bytes(key) for key, _ in zip(keys, range(limit), strict=False)]

"""The two meta pages of data.mdb, each of which names the root of one commit's trees.

LMDB 0.9 writes commit N to page `N & 1` and takes the newer of the two. The layout is frozen
(`mdb.c`: MDB_page, MDB_meta, MDB_db).
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

_HEADER: Final = struct.Struct("=QHHHHIIQQ")  # page, pad, flags, bounds, magic, version, map
_TREE: Final = struct.Struct("=IHHQQQQQ")  # pad, flags, depth, 3 counts of pages, entries, root
_END: Final = struct.Struct("=QQ")  # last page, transaction
_FREE: Final = slice(_HEADER.size, _HEADER.size + _TREE.size)
_MAIN: Final = slice(_FREE.stop, _FREE.stop + _TREE.size)
META_BYTES: Final = _MAIN.stop + _END.size

_MAGIC, _VERSION, _IS_META = 0xBEEFC0DE, 1, 0x08
_PAGE_SIZES: Final = tuple(1 << n for n in range(9, 17))
_NO_PAGE: Final = 2**64 - 1
_MAX_DEPTH: Final = 32


class Tree(NamedTuple):
    """One database: depth 0 has no root."""

    depth: int
    num_entries: int
    root: int


class MetaPage(NamedTuple):
    """One sound meta page.

    Args:
        page_size: Bytes of each page of the file.
        free: Pages that may be used again.
        main: The main database.
        last_page: Number of the last page in use.
        transaction: Number of the commit.
        raw: The page's first `META_BYTES` bytes.
    """

    page_size: int
    free: Tree
    main: Tree
    last_page: int
    transaction: int
    raw: bytes

    @property
    def needed_bytes(self) -> int:
        """The least size of the file."""
        return (self.last_page + 1) * self.page_size


def read_meta_pages(descriptor: int) -> tuple[MetaPage | None, MetaPage | None]:
    """Both meta pages; None for one that isn't sound."""
    raw = os.pread(descriptor, META_BYTES, 0)
    first = parse_meta(raw, 0)
    for page_size in (first.page_size,) if first else _PAGE_SIZES:
        second = parse_meta(os.pread(descriptor, META_BYTES, page_size), 1)
        if second is not None and second.page_size == page_size:
            return first, second
    return first, None


def newest(metas: tuple[MetaPage | None, MetaPage | None]) -> MetaPage | None:
    """The sound one of the newer commit."""
    first, second = metas
    if first is None or second is None:
        return first or second
    return first if first.transaction > second.transaction else second


def parse_tree(record: bytes) -> Tree | None:
    """A database's record, as it lies in a meta page or as a named database's value."""
    if len(record) != _TREE.size:
        return None
    _, _, depth, _, _, _, num_entries, root = _TREE.unpack(record)
    if depth > _MAX_DEPTH or (depth == 0) != (root == _NO_PAGE):
        return None
    return Tree(depth, num_entries, root)


def parse_meta(raw: bytes, number: int) -> MetaPage | None:
    """A meta page of this number; None if it isn't sound."""
    if len(raw) != META_BYTES:
        return None
    page, _, flags, _, _, magic, version, _, _ = _HEADER.unpack_from(raw)
    if (page, magic, version) != (number, _MAGIC, _VERSION) or not flags & _IS_META:
        return None
    free, main = parse_tree(raw[_FREE]), parse_tree(raw[_MAIN])
    page_size = int(_TREE.unpack_from(raw, _HEADER.size)[0])
    last_page, transaction = _END.unpack_from(raw, META_BYTES - _END.size)
    if free is None or main is None or page_size not in _PAGE_SIZES:
        return None
    for tree in (free, main):
        if tree.depth and not 1 < tree.root <= last_page:
            return None
    if last_page < 1 or (transaction and transaction & 1 != number):
        return None
    return MetaPage(page_size, free, main, last_page, transaction, raw)

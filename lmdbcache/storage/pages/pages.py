"""Where each value of a snapshot lies in data.mdb, read from LMDB's own pages.

A reader that knows a value's place copies it straight from the mapped file, a whole batch in one
call. py-lmdb can't give the place without touching every page of the value, so the index is read
from the B+tree itself: branch and leaf pages only, never a value. The layout is that of LMDB 0.9
(`mdb.c`: MDB_page, MDB_node, MDB_meta), which is frozen. Whatever doesn't look as expected gives
`UnreadablePagesError`, and the caller reads through LMDB instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.storage.layout import METADATA_KEY
from lmdbcache.storage.pages.meta_pages import META_BYTES, Tree, parse_meta

_PAGE_HEADER_BYTES: Final = 16
_NODE_HEADER_BYTES: Final = 8
_BRANCH, _LEAF = 0x01, 0x02
_BIG_VALUE, _SUB_DATABASE, _DUPLICATES = 0x01, 0x02, 0x04
_PAGES_PER_STEP: Final = 64


class UnreadablePagesError(Exception):
    """The pages aren't as expected, or the snapshot's root is no longer known."""


@dataclass(frozen=True)
class EntryTable:
    """Keys in order, with the place and length of each value in data.mdb.

    Args:
        keys: (n,) fixed-width bytes, sorted; no key of ours ends in NUL, so padding is harmless.
        offsets: (n,) int64, bytes from the start of the file.
        lengths: (n,) int64, bytes.
    """

    keys: npt.NDArray[np.bytes_]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def find(self, keys: list[bytes]) -> npt.NDArray[np.int64]:
        """Row of each key, -1 where there is none."""
        asked = np.array(keys, dtype=np.bytes_)
        if not len(self.keys) or not len(asked):
            return np.full(len(asked), -1, np.int64)
        rows = np.searchsorted(self.keys, asked)
        rows[rows == len(self.keys)] = 0
        rows[self.keys[rows] != asked] = -1
        return rows.astype(np.int64, copy=False)


def read_table(
    data: npt.NDArray[np.uint8], transaction_id: int, tree: Tree | None = None
) -> EntryTable:
    """Read the entries of a database of a pinned snapshot.

    Args:
        data: data.mdb, mapped, (file size,) uint8.
        transaction_id: The snapshot's. It must be pinned, or its pages may change.
        tree: A named database, as the snapshot's main database has it; None means the main one.

    Raises:
        UnreadablePagesError: Two newer commits have taken the snapshot's meta page, or a page
            isn't as expected.
    """
    page_size, num_pages, _, (depth, root) = _find_roots(data, transaction_id)
    if tree is not None:
        depth, root = tree.depth, tree.root
    pages = data[: num_pages * page_size].reshape(num_pages, page_size)
    return _read_tree(pages, depth, root)


def leaf_pages(
    data: npt.NDArray[np.uint8], transaction_id: int, tree: Tree
) -> npt.NDArray[np.int64]:
    """Return the numbers of a named database's leaf pages, (n,), from its branch pages alone.

    Args:
        data: See `read_table`.
        transaction_id: The snapshot's.
        tree: See `read_table`.

    Raises:
        UnreadablePagesError: See `read_table`.
    """
    page_size, num_pages, _, _ = _find_roots(data, transaction_id)
    pages = data[: num_pages * page_size].reshape(num_pages, page_size)
    numbers = _leaves(pages, tree.depth, tree.root)
    if not 0 <= numbers.min() <= numbers.max() < num_pages:
        raise UnreadablePagesError("a page number beyond the file")
    return numbers


def find_hidden_keys(
    data: npt.NDArray[np.uint8], transaction_id: int, tree: Tree | None = None
) -> list[bytes]:
    """Keys that a walk meets and no look-up finds: a branch page leads elsewhere for them.

    Args:
        data: See `read_table`.
        transaction_id: The snapshot's.
        tree: A named database; None means the main one.

    Raises:
        UnreadablePagesError: See `read_table`.
    """
    page_size, num_pages, _, (depth, root) = _find_roots(data, transaction_id)
    if tree is not None:
        depth, root = tree.depth, tree.root
    if depth == 0:
        return []
    pages = data[: num_pages * page_size].reshape(num_pages, page_size)
    # Of each page of a level: the separator to its left, which every key of it has to reach.
    level, lower = np.array([root], np.int64), np.array([b""], np.bytes_)
    for _ in range(depth - 1):
        starts = np.cumsum([0] + [len(part) for part in _steps(pages, level)])
        parts = [
            (_children(part), _separators(part, lower[start : start + len(part)]))
            for part, start in zip(_steps(pages, level), starts, strict=False)
        ]
        level, lower = (np.concatenate(column) for column in zip(*parts, strict=True))
    hidden, start = [], 0
    for part in _steps(pages, level):
        index, keys = _node_keys(part, _LEAF)
        at = start + index
        is_last = at == len(level) - 1
        is_found = (keys >= lower[at]) & (
            is_last | (keys < lower[np.minimum(at + 1, len(level) - 1)])
        )
        hidden += keys[~is_found].tolist()
        start += len(part)
    return hidden


def _separators(
    pages: npt.NDArray[np.uint8], inherited: npt.NDArray[np.bytes_]
) -> npt.NDArray[np.bytes_]:
    """The separator to the left of each child; the first child of a page has its parent's."""
    index, keys = _node_keys(pages, _BRANCH)
    is_first = np.append([True], index[1:] != index[:-1])
    return np.where(is_first, inherited[index], keys)


def _node_keys(
    pages: npt.NDArray[np.uint8], kind: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bytes_]]:
    """(index of the page, key) of every node, in order."""
    index, at = _nodes(pages, kind)
    words = _fields(pages, index, at, _NODE_HEADER_BYTES).view("<u2").astype(np.int64)
    lengths = words[:, 3]
    width = max(1, int(lengths.max()))
    return index, _keys(pages, index, at + _NODE_HEADER_BYTES, lengths, width)


def _read_tree(pages: npt.NDArray[np.uint8], depth: int, root: int) -> EntryTable:
    if depth == 0:
        empty = np.empty(0, np.int64)
        return EntryTable(np.empty(0, "S1"), empty, empty)
    try:
        level = _leaves(pages, depth, root)
        parts = [_values(part, numbers) for part, numbers in _numbered_steps(pages, level)]
    except (IndexError, ValueError) as error:
        raise UnreadablePagesError(str(error)) from error
    width = max(part[0].dtype.itemsize for part in parts)
    table = EntryTable(
        np.concatenate([part[0].astype(f"S{width}", copy=False) for part in parts]),
        np.concatenate([part[1] for part in parts]),
        np.concatenate([part[2] for part in parts]),
    )
    _check(table, pages.size)
    return table


def read_free_pages(
    data: npt.NDArray[np.uint8], transaction_id: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pages that each transaction has freed and that weren't used again.

    Args:
        data: See `read_table`.
        transaction_id: See `read_table`.

    Returns:
        Transaction ids, and how many pages each has freed; both (n,) int64.

    Raises:
        UnreadablePagesError: See `read_table`.
    """
    page_size, num_pages, (depth, root), _ = _find_roots(data, transaction_id)
    if depth == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    pages = data[: num_pages * page_size].reshape(num_pages, page_size)
    try:
        parts = [_free_counts(part) for part in _steps(pages, _leaves(pages, depth, root))]
        transactions, starts = (np.concatenate(column) for column in zip(*parts, strict=True))
        # A list on pages of its own is given by their first page, one within its leaf is counted.
        lists = starts < 0
        counts = starts.copy()
        at = -starts[lists]
        if at.size and at.max() >= num_pages:
            raise UnreadablePagesError("a page number beyond the file")
        header = slice(_PAGE_HEADER_BYTES, _PAGE_HEADER_BYTES + 8)
        counts[lists] = np.ascontiguousarray(pages[at, header]).view("<i8")[:, 0]
    except (IndexError, ValueError) as error:
        raise UnreadablePagesError(str(error)) from error
    if counts.size and (counts.min() < 0 or int(counts.sum()) > num_pages):
        raise UnreadablePagesError("more free pages than pages")
    return transactions, counts


def _free_counts(
    pages: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(transaction, number of pages or minus the page that has it) of the lists on some leaves."""
    index, at = _nodes(pages, _LEAF)
    # Its header, a key of 8 bytes, and the list: its length and then the pages.
    words = _fields(pages, index, at, _NODE_HEADER_BYTES + 16)
    flags = words[:, 4:6].view("<u2")[:, 0]
    numbers = np.ascontiguousarray(words[:, _NODE_HEADER_BYTES:]).view("<i8")
    if (numbers < 0).any():
        raise UnreadablePagesError("a negative number of pages")
    return numbers[:, 0], np.where(flags & _BIG_VALUE, -numbers[:, 1], numbers[:, 1])


def _leaves(pages: npt.NDArray[np.uint8], depth: int, root: int) -> npt.NDArray[np.int64]:
    level = np.array([root], np.int64)
    for _ in range(depth - 1):
        level = np.concatenate([_children(part) for part in _steps(pages, level)])
        if len(level) > len(pages):  # a loop; each step would multiply them
            raise UnreadablePagesError("more children than pages")
    return level


def _find_roots(
    data: npt.NDArray[np.uint8], transaction_id: int
) -> tuple[int, int, tuple[int, int], tuple[int, int]]:
    """Page size, pages in use, and (depth, root page) of the free and of the main database.

    From the snapshot's own meta page.
    """
    first = parse_meta(data[:META_BYTES].tobytes(), 0)
    if first is None:
        raise UnreadablePagesError("the first meta page can't be read")
    page_size, number = first.page_size, transaction_id & 1
    start = number * page_size
    meta = parse_meta(data[start : start + META_BYTES].tobytes(), number)
    if meta is None or meta.transaction != transaction_id:
        written = meta.transaction if meta else "unknown"
        raise UnreadablePagesError(f"meta page of transaction {written}, not {transaction_id}")
    if meta.needed_bytes > len(data):
        raise UnreadablePagesError("the file is shorter than its last page")
    free, main = ((tree.depth, tree.root) for tree in (meta.free, meta.main))
    return page_size, meta.last_page + 1, free, main


def _steps(pages: npt.NDArray[np.uint8], numbers: npt.NDArray[np.int64]) -> Any:
    return (part for part, _ in _numbered_steps(pages, numbers))


def _numbered_steps(pages: npt.NDArray[np.uint8], numbers: npt.NDArray[np.int64]) -> Any:
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(pages):
        raise UnreadablePagesError("a page number beyond the file")
    for start in range(0, len(numbers), _PAGES_PER_STEP):
        some = numbers[start : start + _PAGES_PER_STEP]
        yield pages[some], some


def _nodes(
    pages: npt.NDArray[np.uint8], kind: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(index of the page, position in the page) of every node, in order."""
    header = pages[:, :_PAGE_HEADER_BYTES].view("<u2")
    if not (header[:, 5] == kind).all():
        raise UnreadablePagesError("a page of another kind")
    counts = (header[:, 6].astype(np.int64) - _PAGE_HEADER_BYTES) // 2
    page_size = pages.shape[1]
    if counts.min() < 1 or counts.max() > page_size // 2 - _PAGE_HEADER_BYTES // 2:
        raise UnreadablePagesError("a page with an impossible number of nodes")
    index = np.repeat(np.arange(len(pages)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    pointers = pages.view("<u2")[index, _PAGE_HEADER_BYTES // 2 + within].astype(np.int64)
    if pointers.max() > page_size - _NODE_HEADER_BYTES:
        raise UnreadablePagesError("a node beyond its page")
    return index, pointers


def _fields(
    pages: npt.NDArray[np.uint8], index: npt.NDArray[np.int64], at: npt.NDArray[np.int64], n: int
) -> npt.NDArray[np.uint8]:
    """(nodes, n) bytes at a position of each node's page."""
    return _runs(pages, index * pages.shape[1] + at, n)


def _runs(
    pages: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], n: int
) -> npt.NDArray[np.uint8]:
    """(starts, n) bytes at positions of all pages: without a table of all bytes' positions."""
    anywhere: npt.NDArray[np.void] = np.ndarray((pages.size - n + 1,), f"V{n}", pages.data, 0, (1,))
    return anywhere[starts].view(np.uint8).reshape(-1, n)


def _children(pages: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    index, at = _nodes(pages, _BRANCH)
    words = _fields(pages, index, at, _NODE_HEADER_BYTES).view("<u2").astype(np.int64)
    if (at + _NODE_HEADER_BYTES + words[:, 3]).max() > pages.shape[1]:
        raise UnreadablePagesError("a key beyond its page")
    if len(index) < 2 * len(pages) and np.bincount(index).min() < 2:
        raise UnreadablePagesError("a branch page with one child")
    numbers: npt.NDArray[np.int64] = words[:, 0] | words[:, 1] << 16 | words[:, 2] << 32
    return numbers


def _values(
    pages: npt.NDArray[np.uint8], numbers: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bytes_], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Keys, offsets and lengths of the embeddings on some leaf pages."""
    page_size = pages.shape[1]
    index, at = _nodes(pages, _LEAF)
    words = _fields(pages, index, at, _NODE_HEADER_BYTES).view("<u2").astype(np.int64)
    lengths, flags, key_lengths = words[:, 0] | words[:, 1] << 16, words[:, 2], words[:, 3]
    if (flags & _DUPLICATES).any():
        raise UnreadablePagesError("a database with duplicates")
    width = int(key_lengths.max())
    after = at + _NODE_HEADER_BYTES + key_lengths
    if after.max() > page_size:
        raise UnreadablePagesError("a key beyond its page")
    keys = _keys(pages, index, at + _NODE_HEADER_BYTES, key_lengths, width)
    offsets = numbers[index] * page_size + after
    big = (flags & _BIG_VALUE) != 0
    if big.any():
        # Such a value lies on pages of its own, behind their header.
        first = _fields(pages, index[big], after[big], 8).view("<u8")[:, 0].astype(np.int64)
        offsets[big] = first * page_size + _PAGE_HEADER_BYTES
    ours = (flags & _SUB_DATABASE) == 0
    ours &= keys != METADATA_KEY
    return keys[ours], offsets[ours], lengths[ours]


def _keys(
    pages: npt.NDArray[np.uint8],
    index: npt.NDArray[np.int64],
    at: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    width: int,
) -> npt.NDArray[np.bytes_]:
    starts, last = index * pages.shape[1] + at, pages.size - width
    characters = _runs(pages, np.minimum(starts, last), width)
    for row in np.flatnonzero(starts > last).tolist():  # short keys at the very end
        characters[row] = np.roll(characters[row], last - starts[row])
    if (lengths != width).any():
        # Of each length, which characters stay: a row is copied as one item.
        stay: npt.NDArray[np.uint8] = np.tri(width + 1, width, -1, np.uint8)
        characters *= stay.view(f"V{width}")[:, 0][lengths].view(np.uint8).reshape(-1, width)
    keys: npt.NDArray[np.bytes_] = characters.view(f"S{width}")[:, 0]
    return keys


def _check(table: EntryTable, size: int) -> None:
    if not len(table.keys):
        return
    if table.offsets.min() < 0 or (table.lengths > size - table.offsets).any():
        raise UnreadablePagesError("a value beyond the file")
    if not (table.keys[:-1] < table.keys[1:]).all():
        raise UnreadablePagesError("keys out of order")

"""data.mdb read page by page with plain reads: no damage, cut or bad sector ends the process.

Slower than `pages` and tolerant: what can be read is read, the rest is reported. Nothing found here
is believed before its checksum is.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from lmdbcache.files import check_folder, open_file
from lmdbcache.storage.pages.commit_record import (
    read_commit_record,
    trusted_meta,
)
from lmdbcache.storage.pages.meta_pages import MetaPage, Tree, parse_tree, read_meta_pages

_HEADER_BYTES: Final = 16
_NODE: Final = struct.Struct("<HHHH")  # two halves of length or child, flags, length of the key
_BRANCH, _LEAF = 0x01, 0x02
_BIG_VALUE, _SUB_DATABASE = 0x01, 0x02
_MAX_PROBLEMS: Final = 20


class Entry(NamedTuple):
    """One key of a leaf page with the place of its value in the file."""

    key: bytes
    offset: int
    length: int
    is_database: bool


class PageFile:
    """A generation's data.mdb, opened for reading.

    Args:
        path: The file.

    Raises:
        NotRegularFileError, OSError: It can't be opened.
    """

    def __init__(self, path: Path) -> None:
        check_folder(path.parent)
        self.descriptor = open_file(path)
        self.path = path
        try:
            record = read_commit_record(path.parent)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.metas = read_meta_pages(self.descriptor)
        self.size = os.fstat(self.descriptor).st_size
        self.meta: MetaPage | None = trusted_meta(record, self.metas)
        self.page_size = self.meta.page_size if self.meta else mmap.PAGESIZE
        self.num_pages = self.size // self.page_size
        self.visited: set[int] = set()
        self.problems: list[str] = []

    def __enter__(self) -> PageFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, length: int) -> bytes | None:
        """These bytes, or None if the file doesn't have them."""
        if length < 0 or offset < 0 or offset + length > self.size:
            return None
        try:
            content = os.pread(self.descriptor, length, offset)
        except OSError as error:
            self._complain(f"bytes {offset} to {offset + length} can't be read ({error.strerror})")
            return None
        return content if len(content) == length else None

    def walk(self, tree: Tree) -> Iterator[Entry]:
        """The entries that can be reached from a tree's root, in order; notes what can't."""
        stack = [(tree.root, tree.depth)] if tree.depth else []
        while stack:
            number, height = stack.pop()
            page = self._tree_page(number)
            if page is None:
                continue
            if height > 1:
                children = self._children(page, number)
                stack.extend((child, height - 1) for child in reversed(children))
            else:
                yield from self._entries(page, number)

    def find(self, tree: Tree, key: bytes) -> Entry | None:
        """A key's entry, by the way that LMDB would take."""
        number = tree.root
        for height in range(tree.depth, 0, -1):
            page = self.read(number * self.page_size, self.page_size)
            if page is None:
                return None
            if height == 1:
                entries = self._entries(page, number)
                return next((entry for entry in entries if entry.key == key), None)
            for index, (after, low, flags, length) in enumerate(self._nodes(page, number, _BRANCH)):
                # The first child has no key of its own: it stands for all that is smaller.
                if index == 0 or page[after - length : after] <= key:
                    number = low | flags << 32
        return None

    def find_named(self, name: bytes) -> Tree | None:
        """A named database of the newest commit."""
        return self.named(self.find(self.meta.main, name)) if self.meta else None

    def named(self, entry: Entry | None) -> Tree | None:
        """The database behind an entry of the main database."""
        record = self.read(entry.offset, entry.length) if entry and entry.is_database else None
        return parse_tree(record) if record else None

    def scan(self, key: bytes) -> Iterator[Entry]:
        """The entries of a key on all leaf pages of the file, whatever leads there."""
        for number in range(2, self.num_pages):
            page = self.read(number * self.page_size, self.page_size)
            if page is not None and key in page and page[:8] == number.to_bytes(8, "little"):
                yield from (entry for entry in self._entries(page, number) if entry.key == key)

    def _tree_page(self, number: int) -> bytes | None:
        if not 1 < number < self.num_pages or number in self.visited:
            self._complain(f"page {number} is beyond the file or belongs to two places")
            return None
        self.visited.add(number)
        page = self.read(number * self.page_size, self.page_size)
        if page is not None and int.from_bytes(page[:8], "little") != number:
            self._complain(f"page {number} says that it is another")
        return page

    def _nodes(self, page: bytes, number: int, kind: int) -> Iterator[tuple[int, int, int, int]]:
        """(position of what follows the key, first four bytes as a number, flags, key length)."""
        flags, lower = struct.unpack_from("<HH", page, 10)
        if flags != kind or not _HEADER_BYTES <= lower <= len(page):
            self._complain(f"page {number} is of another kind than expected")
            return
        pointers = struct.unpack_from(f"<{(lower - _HEADER_BYTES) // 2}H", page, _HEADER_BYTES)
        for at in pointers:
            after = at + _NODE.size
            if after > len(page) or at < lower:
                self._complain(f"page {number} has an entry beyond its end")
                continue
            low, high, node_flags, key_length = _NODE.unpack_from(page, at)
            if after + key_length > len(page):
                self._complain(f"page {number} has a key beyond its end")
                continue
            yield after + key_length, low | high << 16, node_flags, key_length

    def _children(self, page: bytes, number: int) -> list[int]:
        return [low | flags << 32 for _, low, flags, _ in self._nodes(page, number, _BRANCH)]

    def _entries(self, page: bytes, number: int) -> Iterator[Entry]:
        for after, length, flags, key_length in self._nodes(page, number, _LEAF):
            key, offset = page[after - key_length : after], number * self.page_size + after
            if flags & _BIG_VALUE:
                # It lies on pages of its own, behind their header.
                first = int.from_bytes(page[after : after + 8], "little")
                offset = first * self.page_size + _HEADER_BYTES if first < self.num_pages else -1
            elif after + length > len(page):
                self._complain(f"page {number} has a value beyond its end")
            yield Entry(key, offset, length, bool(flags & _SUB_DATABASE))

    def _complain(self, problem: str) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(problem)

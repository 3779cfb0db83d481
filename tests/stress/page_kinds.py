"""Which bytes of a data.mdb are what: the targets of the damage, by kind of page (LMDB 0.9)."""

from __future__ import annotations

import struct

_DATABASE = struct.Struct("<IHHQQQQQ")  # …, root last
_FREE_AT, _MAIN_AT, _TXNID_AT = 40, 88, 144
_META_BYTES = 152
_NO_PAGE = (1 << 64) - 1
_BRANCH, _LEAF = 1, 2
_BIG_VALUE, _SUB_DATABASE = 1, 2


def byte_ranges(content: bytes) -> dict[str, list[tuple[int, int]]]:
    """(start, end) of every piece of each kind: "meta", "branch", "leaf", "overflow header", …"""
    size = struct.unpack_from("<I", content, _FREE_AT)[0]
    newest = max((0, size), key=lambda at: struct.unpack_from("<Q", content, at + _TXNID_AT))
    found = {"meta": [(0, _META_BYTES), (size, size + _META_BYTES)]}
    _walk(content, size, _root(content, newest + _MAIN_AT), "", found)
    _walk(content, size, _root(content, newest + _FREE_AT), "free list ", found)
    used = {start // size for ranges in found.values() for start, _ in ranges}
    used |= {page for start, end in found["overflow data"] for page in _pages(start, end, size)}
    unused = [page for page in range(len(content) // size) if page not in used]
    found["unused"] = [(page * size, (page + 1) * size) for page in unused]
    return {kind: ranges for kind, ranges in found.items() if ranges}


def _pages(start: int, end: int, size: int) -> range:
    return range(start // size, (end - 1) // size + 1)


def _root(content: bytes, at: int) -> int:
    return int(_DATABASE.unpack_from(content, at)[-1])


def _walk(
    content: bytes, size: int, page: int, database: str, found: dict[str, list[tuple[int, int]]]
) -> None:
    found.setdefault("overflow data", [])
    if page == _NO_PAGE:
        return
    at = page * size
    flags, lower, upper = struct.unpack_from("<HHH", content, at + 10)
    kind = database + ("branch" if flags & _BRANCH else "leaf")
    # A page's header and pointers, its nodes; what lies between is unused.
    found.setdefault(kind, []).extend([(at, at + lower), (at + upper, at + size)])
    for index in range((lower - 16) // 2):
        node = at + struct.unpack_from("<H", content, at + 16 + 2 * index)[0]
        low, high, node_flags, key_bytes = struct.unpack_from("<HHHH", content, node)
        value = node + 8 + key_bytes
        if flags & _BRANCH:
            _walk(content, size, low | high << 16 | node_flags << 32, database, found)
        elif node_flags & _SUB_DATABASE:
            _walk(content, size, _root(content, value), "checksums ", found)
        elif node_flags & _BIG_VALUE:
            first = struct.unpack_from("<Q", content, value)[0] * size
            end = first + 16 + (low | high << 16)
            found.setdefault(database + "overflow header", []).append((first, first + 16))
            found["overflow data"].append((first + 16, end))

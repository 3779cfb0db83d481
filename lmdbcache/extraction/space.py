"""How many bytes an extraction will store, and whether the disk has them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from lmdbcache.errors import CacheFullError
from lmdbcache.files import free_bytes, readable_size
from lmdbcache.storage import RESERVE_BYTES, value_bytes

# LMDB 0.9: a value goes to pages of its own if its node would take more than half a page.
_PAGE_HEADER, _NODE_HEADER, _POINTER = 16, 8, 2
_PAGE_NUMBER: Final = 8
_CHECKSUM_BYTES: Final = 8
# Pages that each commit replaces, and leaf pages that aren't full. In key order, as a run stores
# its clips, this is enough; many small values in random order can take twice as much. Keys leave
# their pages half empty where they sort before that of the metadata.
_LEAF_SLACK: Final = 1.5
_KEY_SLACK: Final = 2.1
_LARGEST_COMMIT: Final = 64 << 20
_SOURCE_RECORD: Final = 256  # in the database of source files; rather too much


def estimated_bytes(sample_ids: Collection[str], shape: tuple[int, ...], dtype: str) -> int:
    """Return what embeddings of this shape take in data.mdb; rather too much than too little."""
    if not sample_ids:
        return 0
    page = mmap.PAGESIZE
    size = value_bytes(shape, dtype)
    utf8 = (sample_id.encode("utf-8", "surrogatepass") for sample_id in sample_ids)
    key = sum(map(len, utf8)) / len(sample_ids)
    node = _NODE_HEADER + key + _POINTER
    keys = 2 * node + _CHECKSUM_BYTES
    own = leaf = 0.0
    if _NODE_HEADER + key + size > (page - _PAGE_HEADER) // 2 - _POINTER:
        own = math.ceil((_PAGE_HEADER + size) / page) * page
        keys += _PAGE_NUMBER
    else:
        keys -= node
        per_page = (page - _PAGE_HEADER) // math.ceil(node + size)
        leaf = page / per_page
    return 8 * page + math.ceil(len(sample_ids) * (own + _KEY_SLACK * keys + _LEAF_SLACK * leaf))


def needed_bytes(sample_ids: Collection[str], shape: tuple[int, ...], dtype: str) -> int:
    """Return what has to be free so that every commit finds its reserve."""
    values = len(sample_ids) * value_bytes(shape, dtype)
    beside = len(sample_ids) * _SOURCE_RECORD
    reserve = min(values, _LARGEST_COMMIT) + RESERVE_BYTES
    return estimated_bytes(sample_ids, shape, dtype) + beside + reserve


class Wanted(NamedTuple):
    """What is to be stored in one store.

    Args:
        store: The store's folder.
        sample_ids: Those to be stored.
        shape: Of one embedding.
        dtype: As it is stored.
    """

    store: Path
    sample_ids: Collection[str]
    shape: tuple[int, ...]
    dtype: str


def check_space(wanted: Sequence[Wanted], num_stores: int = 1) -> None:
    """Refuse an extraction that the disk can't hold.

    Args:
        wanted: For each store; all of them lie on one disk.
        num_stores: How many processes fill such stores on the same disk, this one included.

    Raises:
        CacheFullError: Names the bytes needed, those free, and ways to need fewer.
    """
    if not wanted:
        return
    needed = num_stores * sum(needed_bytes(one.sample_ids, *one[2:]) for one in wanted)
    free = free_bytes(wanted[0].store)
    if needed <= free:
        return
    less = [way for one in wanted for way in ways_to_need_less(one.shape, one.dtype)]
    remedies = ["free space", "choose another cache `root`", *dict.fromkeys(less)]
    number = " and ".join(
        f"{len(one.sample_ids)} embeddings of shape {one.shape}" for one in wanted
    )
    if num_stores > 1:
        number += f" in each of {num_stores} stores"
    raise CacheFullError(
        f"{wanted[0].store}: {number} need {readable_size(needed)}, "
        f"{readable_size(free)} are free. Nothing was computed: {', or '.join(remedies)}"
    )


def ways_to_need_less(shape: tuple[int, ...], dtype: str) -> list[str]:
    """Return what a user can store instead, as parts of a sentence."""
    ways = []
    if len(shape) > 1:
        ways.append("store less with `output='pooler_output'`")
    if dtype == "float32":
        ways.append("store half with `dtype='float16'`, a quarter with `dtype='int8'`")
    return ways

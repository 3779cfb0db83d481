"""How many bytes an extraction will store, and whether the disk has them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.errors import CacheFullError
from lmdbcache.files import free_bytes, readable_size
from lmdbcache.storage import NUMPY_DTYPES, RESERVE_BYTES

if TYPE_CHECKING:
    from lmdbcache.extraction.scaling import ScalingWarning

__all__ = [
    "ExtractionPlan",
    "check_space",
    "estimated_bytes",
    "needed_bytes",
]

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
_SOURCE_RECORD: Final = 256  # in sources.sqlite3; rather too much


@dataclass(frozen=True)
class ExtractionPlan:
    """What an extraction would do; sizes in bytes.

    Args:
        store: The store's folder.
        num_samples: Distinct samples asked for.
        num_cached: Of these, stored already.
        num_missing: Clips that would be decoded and embedded.
        num_refused: Sample ids that can't be stored.
        embedding_shape: Shape of one embedding; None while the model isn't on this machine.
        bytes_needed: What has to be free, a reserve included; None if the shape isn't known.
        bytes_free: What this user may still write there.
        bytes_for_all: What the embeddings of all samples take, those of other ranks included; None
            if the shape isn't known.
        warnings: What of it this machine won't bear; what breaks first comes first.
        left_out: See `ExtractionSummary`.
    """

    store: Path
    num_samples: int
    num_cached: int
    num_missing: int
    num_refused: int
    embedding_shape: tuple[int, ...] | None
    bytes_needed: int | None
    bytes_free: int
    bytes_for_all: int | None = None
    warnings: tuple[ScalingWarning, ...] = ()
    left_out: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the disk has room, as far as that is known."""
        return self.bytes_needed is None or self.bytes_needed <= self.bytes_free

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **asdict(self),
            "store": str(self.store),
            "fits": self.fits,
            "warnings": [warning.to_dict() for warning in self.warnings],
        }

    def __str__(self) -> str:
        needed = "bytes not known before the model is on this machine"
        if self.bytes_needed is not None:
            needed = f"{readable_size(self.bytes_needed)} needed"
        counts = f"{self.num_cached} are cached, {self.num_missing} to extract"
        if self.num_refused:
            counts += f", {self.num_refused} have sample ids that can't be stored"
        return (
            f"{self.num_samples} samples: {counts}\n{needed}, {readable_size(self.bytes_free)} free"
        )


def estimated_bytes(sample_ids: Collection[str], shape: tuple[int, ...], dtype: str) -> int:
    """What embeddings of this shape will take in data.mdb; rather too much than too little."""
    if not sample_ids:
        return 0
    page = mmap.PAGESIZE
    size = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
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
    """What has to be free so that every commit finds its reserve."""
    values = len(sample_ids) * math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    beside = len(sample_ids) * _SOURCE_RECORD
    reserve = min(values, _LARGEST_COMMIT) + RESERVE_BYTES
    return estimated_bytes(sample_ids, shape, dtype) + beside + reserve


def check_space(
    store: Path,
    sample_ids: Collection[str],
    shape: tuple[int, ...],
    dtype: str,
    num_stores: int = 1,
) -> None:
    """Refuse an extraction that the disk can't hold.

    Args:
        store: The store's folder.
        sample_ids: Those to be stored.
        shape: Of one embedding.
        dtype: As it is stored.
        num_stores: How many such stores other processes fill on the same disk, this one included.

    Raises:
        CacheFullError: Names the bytes needed, those free, and ways to need fewer.
    """
    needed = needed_bytes(sample_ids, shape, dtype) * num_stores
    free = free_bytes(store)
    if needed <= free:
        return
    remedies = ["free space", "choose another cache root (--root)"]
    if len(shape) > 1:
        remedies.append("store less with output 'pooler_output' (--output)")
    if dtype == "float32":
        remedies.append("store half with dtype 'float16' (--dtype)")
    number = f"{len(sample_ids)} embeddings of shape {shape}"
    if num_stores > 1:
        number += f" for each of {num_stores} ranks"
    raise CacheFullError(
        f"{store}: {number} need {readable_size(needed)}, "
        f"{readable_size(free)} are free. Nothing was computed: {', or '.join(remedies)}"
    )

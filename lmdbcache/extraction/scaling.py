"""What grows with the number of samples, and what of it a machine no longer bears.

docs/scaling.md has the formulas, how the constants were measured, and a table by these functions.
They are good to a factor of two on another machine; what is warned of is beside the point by more.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from lmdbcache.config import CacheConfig
from lmdbcache.extraction.space import ExtractionPlan
from lmdbcache.files import readable_size
from lmdbcache.machine import memory_limit
from lmdbcache.storage import LARGE_VALUE_BYTES, NUMPY_DTYPES

__all__ = [
    "DOCUMENT",
    "Growth",
    "Machine",
    "ScalingWarning",
    "growth_of",
    "speed_warnings",
    "warnings_for",
    "warnings_of",
]

DOCUMENT: Final = "docs/scaling.md"

# One writer that stores in the order of the sample ids.
_WRITE_SECONDS_EACH: Final = 8e-6
_WRITE_BYTES_PER_SECOND: Final = 220e6
# Eight bytes for each page that is mapped: by us, and by LMDB, which comes by all pages of a store
# of small values as it looks up their keys.
_TABLE_BYTES_PER_PAGE: Final = 8
# Ids of 18 characters and their places, in a process that reads by a list of samples.
_LIST_BYTES_EACH: Final = 100
# A dataset's samples, what is missing of them, and the units, in a process that extracts.
_CLIP_BYTES_EACH: Final = 900
_CHECK_SECONDS_EACH: Final = 10e-6
_CHECK_BYTES_PER_SECOND: Final = 1e9
_NETWORK_BYTES_PER_SECOND: Final = 125e6  # 1 Gbit/s

# From here on it is warned of.
_SHARE_OF_A_READER: Final = 1 / 32  # of the memory
_SHARE_OF_A_RUN: Final = 1 / 8
_WRITE_SECONDS: Final = 3600.0
_CHECK_SECONDS: Final = 600.0
_TRANSFER_SECONDS: Final = 3600.0


class Machine(NamedTuple):
    """What a store meets.

    Args:
        memory: Bytes for processes and the page cache together.
        room: Bytes of the disk that the store may take, those that it has included.
    """

    memory: int
    room: int


@dataclass(frozen=True)
class Growth:
    """What a number of embeddings takes; bytes and seconds.

    Args:
        store_bytes: data.mdb. With as much memory random reads never wait for the disk.
        write_seconds: Of one writer.
        table_bytes: Page tables of each process that has read everything, at most.
        list_bytes: The list of samples, in each process that reads by one.
        clip_bytes: The list of clips, in each process of an extraction.
        check_seconds: `verify`, or the first opening of a copy; a slow disk takes longer.
        transfer_seconds: `push` or `pull` at 1 Gbit/s.
    """

    store_bytes: int
    write_seconds: float
    table_bytes: int
    list_bytes: int
    clip_bytes: int
    check_seconds: float
    transfer_seconds: float


@dataclass(frozen=True)
class ScalingWarning:
    """One thing that this machine won't bear, or not well.

    Args:
        name: Which: `page_cache`, `page_tables`, `sample_list`, `clip_list`, `writer`, `speed`,
            `second_copy`, `check` or `transfer`.
        figure: How much it is; `unit` says of what.
        limit: From where on it is warned of.
        unit: `bytes`, `seconds` or `bytes/s`.
        message: The figure in words, and the way out.
    """

    name: str
    figure: float
    limit: float
    unit: str
    message: str

    @property
    def times(self) -> float:
        """How far beyond the limit it is."""
        return self.figure / self.limit if self.limit > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "see": DOCUMENT}

    def __str__(self) -> str:
        return f"warning: {self.message} ({DOCUMENT})"


def growth_of(
    num_samples: int, store_bytes: int, value_bytes: int, *, num_written: int | None = None
) -> Growth:
    """What so many embeddings take.

    Args:
        num_samples: Embeddings in all.
        store_bytes: What they take on disk; `estimated_bytes` tells.
        value_bytes: One embedding, without LMDB's pages.
        num_written: Embeddings that are to be written; None means all.
    """
    written = num_samples if num_written is None else num_written
    num_maps = 1 if value_bytes >= LARGE_VALUE_BYTES else 2
    return Growth(
        store_bytes=store_bytes,
        write_seconds=written * (_WRITE_SECONDS_EACH + value_bytes / _WRITE_BYTES_PER_SECOND),
        table_bytes=num_maps * _TABLE_BYTES_PER_PAGE * math.ceil(store_bytes / mmap.PAGESIZE),
        list_bytes=num_samples * _LIST_BYTES_EACH,
        clip_bytes=num_samples * _CLIP_BYTES_EACH,
        check_seconds=num_samples * _CHECK_SECONDS_EACH + store_bytes / _CHECK_BYTES_PER_SECOND,
        transfer_seconds=num_samples * value_bytes / _NETWORK_BYTES_PER_SECOND,
    )


def warnings_of(
    plan: ExtractionPlan, config: CacheConfig, num_samples: int, num_written: int
) -> tuple[ScalingWarning, ...]:
    """What of this plan this machine won't bear; nothing if the shape isn't known.

    Args:
        plan: Of one process.
        config: The identity of the store.
        num_samples: Of all processes.
        num_written: Of these, those to be written to the store of the plan.
    """
    if plan.embedding_shape is None or plan.bytes_for_all is None:
        return ()
    store_bytes = plan.bytes_for_all
    growth = growth_of(
        num_samples,
        store_bytes,
        _value_bytes(plan.embedding_shape, config.dtype),
        num_written=num_written,
    )
    stored = store_bytes * (1 - num_written / max(1, num_samples))
    machine = Machine(memory_limit(), plan.bytes_free + int(stored))
    return warnings_for(growth, machine, smaller=_smaller(plan.embedding_shape, config.dtype))


def warnings_for(
    growth: Growth, machine: Machine, *, smaller: str = ""
) -> tuple[ScalingWarning, ...]:
    """What of it a machine won't bear; what breaks first comes first.

    Args:
        growth: Of the store when it is full; `write_seconds` of what is missing.
        machine: Where it is to be.
        smaller: Ways to need less, to begin a sentence with.
    """
    found = (*_when_reading(growth, machine, smaller), *_when_kept(growth, machine, smaller))
    exceeded = [warning for warning in found if warning.figure > warning.limit]
    return tuple(sorted(exceeded, key=lambda warning: -warning.times))


def speed_warnings(
    shape: tuple[int, ...], dtype: str, clips_per_second: float
) -> tuple[ScalingWarning, ...]:
    """Whether one extraction computes faster than one writer stores.

    Args:
        shape: Of one embedding.
        dtype: As stored.
        clips_per_second: What a trial has measured.
    """
    value_bytes = _value_bytes(shape, dtype)
    stored = 1 / (_WRITE_SECONDS_EACH + value_bytes / _WRITE_BYTES_PER_SECOND)
    if clips_per_second <= stored:
        return ()
    message = (
        f"this extraction computes {readable_size(clips_per_second * value_bytes)} of embeddings a "
        f"second and one writer stores about {readable_size(stored * value_bytes)}: the model will "
        f"wait for the disk. {_smaller(shape, dtype)}or use --staging, a store for each process on "
        "a disk of its own, and `lmdbcache merge`"
    )
    rates = clips_per_second * value_bytes, stored * value_bytes
    return (ScalingWarning("speed", *rates, "bytes/s", message),)


def _when_reading(growth: Growth, machine: Machine, smaller: str) -> Iterator[ScalingWarning]:
    memory = machine.memory
    share = max(0.0, 1 - memory / max(1, growth.store_bytes))
    yield ScalingWarning(
        "page_cache",
        growth.store_bytes,
        memory,
        "bytes",
        f"the store will take {readable_size(growth.store_bytes)} and there are "
        f"{readable_size(memory)} of memory: {100 * share:.0f} % of random reads will wait for the "
        f"disk. {smaller}or read on a machine with more memory",
    )
    yield ScalingWarning(
        "page_tables",
        growth.table_bytes,
        memory * _SHARE_OF_A_READER,
        "bytes",
        f"each process that reads all of it takes up to {readable_size(growth.table_bytes)} for "
        f"page tables. {smaller}or read in few processes: make_dataloader has none beside its own",
    )
    yield ScalingWarning(
        "sample_list",
        growth.list_bytes,
        memory * _SHARE_OF_A_READER,
        "bytes",
        f"each process that reads by the list of samples takes {readable_size(growth.list_bytes)} "
        "for it. Read in few processes, or a part of the dataset in each",
    )


def _when_kept(growth: Growth, machine: Machine, smaller: str) -> Iterator[ScalingWarning]:
    yield ScalingWarning(
        "clip_list",
        growth.clip_bytes,
        machine.memory * _SHARE_OF_A_RUN,
        "bytes",
        f"each process of an extraction takes {readable_size(growth.clip_bytes)} for the list of "
        "clips. Extract in parts: --class, or --num-nodes with --node-split-id",
    )
    yield ScalingWarning(
        "writer",
        growth.write_seconds,
        _WRITE_SECONDS,
        "seconds",
        f"one writer takes {_time(growth.write_seconds)} for what is missing, however many GPUs "
        f"compute it. {smaller}or use --staging, a store for each GPU, and `lmdbcache merge`",
    )
    if growth.store_bytes <= machine.room:  # otherwise it doesn't fit at all
        yield ScalingWarning(
            "second_copy",
            growth.store_bytes,
            machine.room - growth.store_bytes,
            "bytes",
            f"the disk has no room for a second copy of {readable_size(growth.store_bytes)}, as "
            "`compact`, `repair` and the merging of staging stores need it. Free space, or choose "
            "another root (--root)",
        )
    yield ScalingWarning(
        "check",
        growth.check_seconds,
        _CHECK_SECONDS,
        "seconds",
        f"`verify`, and the first opening of a copy on another machine, take "
        f"{_time(growth.check_seconds)} or more. LMDBCACHE_SKIP_FIRST_CHECK=values opens a copy "
        "without reading its values",
    )
    yield ScalingWarning(
        "transfer",
        growth.transfer_seconds,
        _TRANSFER_SECONDS,
        "seconds",
        f"`push` and `pull` take {_time(growth.transfer_seconds)} at 1 Gbit/s. {smaller}or share a "
        "part of it",
    )


def _value_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * NUMPY_DTYPES[dtype].itemsize


def _smaller(shape: tuple[int, ...], dtype: str) -> str:
    ways = []
    if len(shape) > 1:
        ways.append("store a pooled output (--output)")
    if dtype == "float32":
        ways.append("store half the bytes (--dtype float16)")
    text = ", ".join(ways)
    return f"{text[0].upper()}{text[1:]}, " if text else "Divide the dataset, "


def _time(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"

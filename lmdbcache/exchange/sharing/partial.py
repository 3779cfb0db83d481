"""A few embeddings of a shard, without the rest of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy.typing as npt

from lmdbcache.errors import ConfigError, IntegrityError
from lmdbcache.exchange.sharing.remote import Remote
from lmdbcache.exchange.sharing.shards import row_bounds
from lmdbcache.exchange.sharing.wanted import Wanted
from lmdbcache.storage import checksum, from_stored, sample_key

__all__ = ["Span", "fetch_rows", "spans_of"]

Span = tuple[int, int]  # first byte, and the one after the last
# So many bytes come in the time that one more request takes.
_GAP_BYTES: Final = 1 << 20
_LONGEST_BYTES: Final = 16 << 20


def spans_of(wanted: Wanted) -> list[Span]:
    """What to read of a shard's file; nothing if it may as well be fetched as a whole."""
    commit, entry, _ = wanted.offer
    if 2 * len(wanted.rows) > len(entry.sample_ids):
        return []
    try:
        bounds = row_bounds(entry, commit.config, commit.embedding_shape)
    except ConfigError:
        return []  # the shard isn't what its commit says; that shows when it is decoded
    spans: list[Span] = []
    for first, last in (bounds[row] for row in wanted.rows):
        joined = bool(spans) and first - spans[-1][1] < _GAP_BYTES
        if joined and last - spans[-1][0] <= _LONGEST_BYTES:
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    num_bytes = sum(last - first for first, last in spans)
    return spans if 2 * num_bytes <= entry.num_bytes else []


def fetch_rows(
    remote: Remote,
    wanted: Wanted,
    spans: Sequence[Span],
    progress: Callable[[int], None],
) -> dict[int, npt.NDArray[Any]]:
    """The embeddings that are wanted, by their row; each has the checksum that its commit lists.

    Args:
        remote: Where the shard is.
        wanted: The shard, and which of its rows.
        spans: From `spans_of`.
        progress: Called with the bytes of each span.

    Raises:
        IntegrityError: One isn't what was pushed.
        RemoteError: They can't be read.
    """
    commit, entry, _ = wanted.offer
    config, shape = commit.config, commit.embedding_shape
    bounds = row_bounds(entry, config, shape)
    found: dict[int, npt.NDArray[Any]] = {}
    for start, end in spans:
        data = memoryview(remote.read_span(f"{config.fingerprint}/{entry.path}", start, end))
        progress(len(data))
        for row in wanted.rows:
            first, last = bounds[row]
            if not (start <= first and last <= end):
                continue
            sample_id, raw = entry.sample_ids[row], data[first - start : last - start]
            if checksum(sample_key(sample_id), raw) != entry.checksums[row]:
                raise IntegrityError(
                    f"{entry.path} is damaged: {sample_id} doesn't match its checksum"
                )
            found[row] = from_stored(sample_id, raw, config.dtype, shape)
    return found

"""The store that a merge writes to: what it has of some samples, and one transaction more."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import lmdb
import numpy as np
import numpy.typing as npt

from lmdbcache.cache import EmbeddingCache, Origin, Source, SourceRecords, write_sources
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheNotFoundError
from lmdbcache.storage import (
    EmbeddingReader,
    EmbeddingWriter,
    Snapshot,
    StoreMetadata,
    check_pages,
    checksum,
    checksums_of,
    from_stored,
    sample_id_of_key,
)

__all__ = ["Change", "Incoming", "ConcurrentWriteError", "Ours", "StoredNow", "Target"]

_NO_LIMIT: Final = 1 << 62
_STACKED_BELOW_BYTES: Final = 64 << 10


class Incoming(NamedTuple):
    """One embedding that may be merged: in its stored form, with its checksum."""

    key: bytes
    value: npt.NDArray[Any]
    checksum: bytes
    origin: Origin
    source: Source | None

    @property
    def sample_id(self) -> str:
        """The sample id."""
        return sample_id_of_key(self.key)


class Ours(NamedTuple):
    """What the store has of one sample; `value` is None if it is damaged."""

    checksum: bytes
    value: npt.NDArray[Any] | None


class Change(NamedTuple):
    """One embedding to write, and the checksum of the one that it replaces."""

    incoming: Incoming
    replaced: bytes | None


class ConcurrentWriteError(Exception):
    """Somebody else has written one of the samples since it was looked at; nothing was written."""


class StoredNow:
    """One look at a store that may not be there yet."""

    def __init__(self, reader: EmbeddingReader | None) -> None:
        self._reader = reader

    @property
    def metadata(self) -> StoreMetadata | None:
        """Its metadata; None while there is no store."""
        return self._reader.metadata if self._reader is not None else None

    def checksums(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The checksums of those that are stored."""
        return {} if self._reader is None else checksums_of(self._reader, keys)

    def value(self, key: bytes) -> Ours | None:
        """Checksum and value of one; None if it isn't stored."""

        def read(snapshot: Snapshot, transaction: lmdb.Transaction) -> Ours | None:
            expected = transaction.get(key, db=snapshot.environment.checksums)
            if expected is None:
                return None
            value, expected = transaction.get(key), bytes(expected)
            if value is None or checksum(key, value) != expected:
                return Ours(expected, None)
            metadata = snapshot.metadata
            dtype, shape = metadata.config.dtype, metadata.embedding_shape
            return Ours(expected, from_stored(sample_id_of_key(key), value, dtype, shape))

        return None if self._reader is None else self._reader.read_pinned(read)


class Target:
    """The store of one config, whether it is there yet or not.

    Args:
        cache: Its cache.
        config: Its identity.
        ragged: Let the first dimension differ, if it is new.
        dataset_root: Kept in the metadata, if it is new.

    Raises:
        IntegrityError: It is damaged.
    """

    def __init__(
        self, cache: EmbeddingCache, config: CacheConfig, *, ragged: bool, dataset_root: str
    ) -> None:
        self.config = config
        self.path: Final[Path] = cache.path(config)
        self._cache = cache
        self._ragged = ragged
        self._dataset_root = dataset_root
        if config in cache:
            # LMDB follows damaged pages into nowhere: look before it does.
            check_pages(self.path)

    @contextlib.contextmanager
    def now(self) -> Iterator[StoredNow]:
        """What is stored now. Ends before anything is written, or old pages would be kept."""
        with contextlib.ExitStack() as stack:
            reader = None
            with contextlib.suppress(CacheNotFoundError):
                reader = stack.enter_context(self._cache.reader(self.config, track_usage=False))
                reader.pinned()
            yield StoredNow(reader)

    def shape_of_new(self, value: npt.NDArray[Any]) -> tuple[int | None, ...]:
        """The shape that a new store gets with this as its first embedding."""
        return (None, *value.shape[1:]) if self._ragged and value.shape else value.shape

    def origins(self, checksums: Mapping[str, bytes]) -> dict[str, Origin]:
        """Who computed these, of those that weren't computed here."""
        with SourceRecords(self.path) as records:
            return records.origins(checksums)

    def write(self, changes: Sequence[Change], provenance: Mapping[str, str]) -> None:
        """Write them in one transaction; durable when this returns.

        Raises:
            ConcurrentWriteError: One of the samples isn't as it was.
            ProvenanceMismatchError: The store was filled with other weights.
            CacheFullError: The disk is full.
        """
        by_name = {change.incoming.sample_id: change for change in changes}
        expected = {name: change.replaced for name, change in by_name.items()}
        has_written = False

        def before_commit(committed: Mapping[str, tuple[bytes | None, bytes]]) -> None:
            nonlocal has_written
            if {name: replaced for name, (replaced, _) in committed.items()} != expected:
                raise ConcurrentWriteError
            rows = [(name, *pair, by_name[name].incoming) for name, pair in committed.items()]
            write_sources(
                self.path,
                [(n, old, new, i.source) for n, old, new, i in rows if i.source is not None],
                origins=[(n, old, new, i.origin) for n, old, new, i in rows],
            )
            has_written = True

        with EmbeddingWriter(
            self.path,
            self.config,
            ragged=self._ragged,
            provenance=provenance,
            dataset_root=self._dataset_root,
            commit_bytes=_NO_LIMIT,
            commit_records=_NO_LIMIT,
            commit_seconds=math.inf,
            replace=[name for name, replaced in expected.items() if replaced is not None],
            before_commit=before_commit,
        ) as writer:
            writer.put_batch(by_name, _batch([change.incoming.value for change in changes]))
        if not has_written:
            raise ConcurrentWriteError


def _batch(values: list[npt.NDArray[Any]]) -> Any:
    """One array of small values of one shape, which is several times faster to write."""
    if values[0].nbytes < _STACKED_BELOW_BYTES and len({value.shape for value in values}) == 1:
        return np.stack(values)
    return values

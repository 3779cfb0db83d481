"""The stores that a merge reads: sound ones through LMDB, of damaged ones what is sound."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lmdb
import numpy.typing as npt

from lmdbcache.cache import Origin, Source, SourceRecords
from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    FormatVersionError,
    IntegrityError,
    InvalidSampleIdError,
    ReadOnlyCacheError,
)
from lmdbcache.storage import (
    EmbeddingReader,
    PageFile,
    Snapshot,
    StoreMetadata,
    as_stored,
    check_pages,
    checksum,
    from_stored,
    generation_to_repair,
    salvage,
    sample_id_of_key,
    sample_key,
    stored_checksums,
    write_lock,
)

__all__ = ["SourceStore", "open_source_store"]


class SourceStore(ABC):
    """One store to read from, as of when it was opened; nothing of it is changed.

    Args:
        path: Its folder.
        metadata: Its metadata record.
        num_embeddings: How many can be read, as far as is known.
        origin: Who computed what has no origin of its own.
        damage: What is wrong with it as a whole, or None.
        lost: Sample ids of damaged values.
    """

    def __init__(
        self,
        path: Path,
        metadata: StoreMetadata,
        num_embeddings: int,
        damage: str | None = None,
        lost: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.num_embeddings = num_embeddings
        self.damage = damage
        self.lost = lost
        self.records: SourceRecords | None = None
        self.records_problem: str | None = None
        self.origin = Origin(os.fspath(path), {}, metadata.provenance)

    @property
    def config(self) -> CacheConfig:
        """Its identity."""
        return self.metadata.config

    @abstractmethod
    def checksums(self) -> Iterator[tuple[bytes, bytes]]:
        """(key, checksum) by key."""

    @abstractmethod
    def _bytes(self, key: bytes) -> Any:
        """The stored buffer of a key, whether it is sound or not; None if it can't be read."""

    def value(self, key: bytes, expected: bytes) -> npt.NDArray[Any]:
        """The embedding of a key, in its stored form.

        Raises:
            CacheError: It isn't what was written; it can't be stored.
        """
        name = sample_id_of_key(key)
        content = self._bytes(key)
        if content is None or checksum(key, content) != expected:
            raise IntegrityError("the value doesn't match its checksum")
        if sample_key(name) != key:
            raise InvalidSampleIdError(f"{name!r} isn't how a sample id is stored")
        dtype, shape = self.config.dtype, self.metadata.embedding_shape
        value = from_stored(name, content, dtype, shape, copy=False)
        return as_stored(name, value, dtype, copy=False)

    def read_records(self, stack: contextlib.ExitStack) -> None:
        """Open what is recorded beside the embeddings; damaged records concern nothing else."""
        try:
            self.records = stack.enter_context(SourceRecords(self.path))
        except CacheError as error:
            self.records_problem = str(error)

    def origins(self, checksums: Mapping[str, bytes]) -> dict[str, Origin]:
        """Who computed these, where the store knows of somebody else."""
        return self._recorded("origins", checksums)

    def sources(self, checksums: Mapping[str, bytes]) -> dict[str, Source]:
        """Which files these were computed from, where the store knows."""
        return self._recorded("of", checksums)

    def _recorded(self, name: str, checksums: Mapping[str, bytes]) -> dict[str, Any]:
        if self.records is None or self.records_problem is not None:
            return {}
        try:
            found: dict[str, Any] = getattr(self.records, name)(checksums)
        except CacheError as error:
            self.records_problem = str(error)
            return {}
        return found


class _SoundStore(SourceStore):
    """Read through LMDB, from one snapshot."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        # LMDB follows damaged pages into nowhere: look before it does.
        check_pages(path)
        self._reader = stack.enter_context(EmbeddingReader(path, track_usage=False))
        super().__init__(path, self._reader.metadata, len(self._reader))
        self._check_keys()

    def _check_keys(self) -> None:
        """Both databases have the same keys, in order; else a sample could be lost unnamed."""
        # A reader that verifies lists the embeddings themselves; others list their checksums.
        with EmbeddingReader(self.path, verify="first_read", track_usage=False) as reader:
            for name, pair in zip_longest(reader, stored_checksums(reader)):
                if name is None or pair is None or sample_id_of_key(pair[0]) != name:
                    raise IntegrityError(
                        f"{self.path} is damaged (embeddings and checksums have different keys)"
                    )

    def checksums(self) -> Iterator[tuple[bytes, bytes]]:
        return stored_checksums(self._reader)

    def _bytes(self, key: bytes) -> Any:
        def read(_: Snapshot, transaction: lmdb.Transaction) -> bytes | None:
            value = transaction.get(key)
            return None if value is None else bytes(value)

        return self._reader.read_pinned(read)


class _DamagedStore(SourceStore):
    """What is sound in a damaged data.mdb, read without LMDB."""

    def __init__(
        self, path: Path, damage: str, stack: contextlib.ExitStack, *, takes_lock: bool
    ) -> None:
        if takes_lock:
            with contextlib.suppress(ReadOnlyCacheError):  # then it can't be had
                stack.enter_context(write_lock(path))
        try:
            self._file = stack.enter_context(PageFile(generation_to_repair(path) / "data.mdb"))
            self._saved = salvage(self._file, path)
        except OSError as error:
            raise IntegrityError(f"data.mdb can't be read ({error.strerror})") from None
        names = tuple(map(sample_id_of_key, self._saved.dropped))
        metadata = StoreMetadata.unpack(self._saved.metadata, path)
        super().__init__(path, metadata, len(self._saved.values), damage, names)

    def checksums(self) -> Iterator[tuple[bytes, bytes]]:
        yield from sorted(self._saved.checksums.items())

    def _bytes(self, key: bytes) -> Any:
        entry = self._saved.values[key]
        return self._file.read(entry.offset, entry.length)


def open_source_store(
    path: Path, stack: contextlib.ExitStack, *, takes_lock: bool = True
) -> SourceStore:
    """Open a store to read from; `stack` closes it.

    Args:
        path: Its folder.
        stack: What closes it.
        takes_lock: Whether nobody may write to it meanwhile, if it is damaged.

    Raises:
        CacheError: It can't be read at all.
    """
    try:
        with contextlib.ExitStack() as own:
            opened: SourceStore = _SoundStore(path, own)
            opened.read_records(own)
            stack.push(own.pop_all())
            return opened
    except FormatVersionError:
        raise
    except IntegrityError as error:
        damage = str(error)
    with contextlib.ExitStack() as own:
        opened = _DamagedStore(path, damage, own, takes_lock=takes_lock)
        opened.read_records(own)
        stack.push(own.pop_all())
        return opened

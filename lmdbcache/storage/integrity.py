"""Checking a store: LMDB's structure first, then every value against its checksum."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lmdb
from lmdb.verify import VerifyError
from lmdb.verify import verify as verify_structure

from lmdbcache.errors import CacheNotFoundError, ReadOnlyCacheError
from lmdbcache.storage.engine_errors import translated_errors
from lmdbcache.storage.environment import Environment, acquire, release
from lmdbcache.storage.forking import no_fork
from lmdbcache.storage.generations import current_generation, write_lock
from lmdbcache.storage.layout import (
    CHECKSUMS_NAME,
    METADATA_KEY,
    NUM_RESERVED_KEYS,
    sample_id_of_key,
)
from lmdbcache.storage.metadata import checksum
from lmdbcache.storage.opening import check_file_size

__all__ = ["IntegrityReport", "verify"]

_MAX_FINDINGS: Final = 20


@dataclass(frozen=True)
class IntegrityReport:
    """What `verify` found.

    Args:
        path: The store's folder.
        num_embeddings: Embeddings that were looked at.
        structure: LMDB's own complaints about the file; if there are any, no value was read.
        damaged: Sample ids whose value doesn't match its checksum, or has none.
        lost: How many checksums have no value.
    """

    path: Path
    num_embeddings: int
    structure: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    lost: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.structure or self.damaged or self.lost)


def verify(store: str | Path) -> IntegrityReport:
    """Check a store without trusting it: a damaged file can't take the process down.

    Raises:
        CacheNotFoundError: Nothing is stored here.
        IntegrityError: The file is truncated or the metadata record damaged.
    """
    store = Path(store).absolute()
    if current_generation(store) is None:
        raise CacheNotFoundError(f"nothing is stored in {store}")
    # A commit or a compaction in the middle of the walk would look like damage.
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ReadOnlyCacheError):
            stack.enter_context(write_lock(store))
        generation = current_generation(store)
        if generation is None:
            raise CacheNotFoundError(f"nothing is stored in {store}")
        if findings := _structure_findings(generation):
            return IntegrityReport(store, 0, structure=findings)
        environment = acquire(generation)
    try:
        with no_fork, translated_errors(store):
            return _check_values(environment, store)
    finally:
        release(environment)


def _structure_findings(generation: Path) -> tuple[str, ...]:
    check_file_size(generation)
    try:
        findings = verify_structure(str(generation))  # type: ignore[no-untyped-call]
    except (VerifyError, OSError) as error:
        return (str(error),)
    return tuple(str(finding) for finding in findings[:_MAX_FINDINGS])


def _check_values(environment: Environment, store: Path) -> IntegrityReport:
    transaction = environment.begin_read()
    environment.read_metadata(transaction)
    damaged = list(_damaged_keys(environment, transaction))
    entries = int(transaction.stat()["entries"]) - NUM_RESERVED_KEYS
    checksums = int(transaction.stat(environment.checksums)["entries"]) - 1
    missing_checksums = sum(1 for _, lacks in damaged if lacks)
    return IntegrityReport(
        store,
        entries,
        damaged=tuple(sample_id_of_key(key) for key, _ in damaged),
        lost=checksums - (entries - missing_checksums),
    )


def _damaged_keys(
    environment: Environment, transaction: lmdb.Transaction
) -> Iterator[tuple[bytes, bool]]:
    """(key, whether it lacks a checksum) of every embedding that fails."""
    with transaction.cursor() as cursor:
        for key, value in cursor.iternext():
            key_bytes = bytes(key)
            if key_bytes in (METADATA_KEY, CHECKSUMS_NAME):
                continue
            expected = transaction.get(key_bytes, db=environment.checksums)
            if expected is None:
                yield key_bytes, True
            elif (
                bytes(expected) != checksum(key_bytes, value)
                # A wrong separator in a branch page: the walk sees the value, no lookup finds it.
                or transaction.get(key_bytes) is None
            ):
                yield key_bytes, False

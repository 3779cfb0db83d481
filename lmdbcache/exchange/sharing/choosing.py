"""Which embeddings of a store are pushed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from lmdbcache.cache import SourceRecords
from lmdbcache.errors import ConfigError, SampleNotFoundError
from lmdbcache.files import few
from lmdbcache.storage import (
    EmbeddingReader,
    canonical_class,
    canonical_sample_id,
    class_of,
    sample_id_of_key,
    sample_key,
    stored_checksums,
)

__all__ = ["Choice", "choose"]

_STEP: Final = 10_000


@dataclass(frozen=True)
class Choice:
    """Some samples of a store.

    Args:
        checksums: Sample id → its checksum, in the order of the keys.
        unusable: Keys that no sample id has, as text → why: the store is damaged.
    """

    checksums: dict[str, bytes]
    unusable: dict[str, str]


def choose(
    reader: EmbeddingReader,
    *,
    own: bool = False,
    classes: Iterable[str] | None = None,
    sample_ids: Iterable[str] | None = None,
) -> Choice:
    """Some samples of a store, or all.

    Args:
        reader: Of the store.
        own: Only those computed or imported here.
        classes: Only of these classes.
        sample_ids: Only these.

    Raises:
        SampleNotFoundError: One of `sample_ids` isn't stored.
        ConfigError: A class that has no sample.
        InvalidSampleIdError: See `sample_key`.
    """
    found: dict[str, bytes] = {}
    unusable: dict[str, str] = {}
    for key, expected in stored_checksums(reader):
        sample_id = sample_id_of_key(key)
        if _is_key_of(key, sample_id):
            found[sample_id] = expected
        else:
            unusable[sample_id] = "not a sample id in its canonical form: the store is damaged"
    if sample_ids is not None:
        asked = {canonical_sample_id(one) for one in sample_ids}
        if absent := sorted(asked - found.keys()):
            raise SampleNotFoundError(
                f"{len(absent)} of {len(asked)} samples aren't stored in {reader.path}: "
                f"{few(absent, 3)}"
            )
        found = {one: expected for one, expected in found.items() if one in asked}
    if classes is not None:
        found = _of_classes(found, classes, reader)
    return Choice(_own(found, reader) if own else found, unusable)


def _is_key_of(key: bytes, sample_id: str) -> bool:
    try:
        return sample_key(sample_id) == key
    except ValueError:
        return False


def _of_classes(
    found: dict[str, bytes], classes: Iterable[str], reader: EmbeddingReader
) -> dict[str, bytes]:
    wanted = {canonical_class(name) for name in classes}
    there = {class_of(one) for one in found}
    if unknown := sorted(wanted - there):
        raise ConfigError(
            f"class {', '.join(unknown)}: no sample of it in {reader.path}; there are "
            f"{', '.join(sorted(there)) or 'none'}"
        )
    return {one: expected for one, expected in found.items() if class_of(one) in wanted}


def _own(found: dict[str, bytes], reader: EmbeddingReader) -> dict[str, bytes]:
    own: dict[str, bytes] = {}
    items = iter(found.items())
    with SourceRecords(reader.path) as records:
        while some := dict(islice(items, _STEP)):
            elsewhere = records.origins(some)
            own |= {one: expected for one, expected in some.items() if one not in elsewhere}
    return own

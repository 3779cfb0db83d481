"""What is sound in a damaged data.mdb.

What can be reached from the newest commit comes first. If pages are broken, the others are searched
for entries that no longer hang on anything. A sound pair of value and checksum can be an old
one: of a sample that was overwritten since. So pages that the newest commit has given up are left
out. Where its list of those can't be read, a pair is only taken if the newest commit reaches its
value or its checksum, or if nothing was ever overwritten in this generation, by its record. A
value is only taken that matches the checksum which the newest commit has for it; and of several
that match other checksums none is taken.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lmdbcache.errors import CacheError, IntegrityError, InvalidSampleIdError
from lmdbcache.storage.checks.value_checks import CHECKSUM_BYTES
from lmdbcache.storage.engine_errors import LOSS_REMEDY
from lmdbcache.storage.layout import CHECKSUMS_NAME, METADATA_KEY, sample_key
from lmdbcache.storage.metadata import StoreMetadata, checksum, new_checksum
from lmdbcache.storage.pages.commit_record import has_old_values
from lmdbcache.storage.pages.page_file import Entry, PageFile

__all__ = ["Salvage", "salvage"]

_STEP_BYTES: Final = 4 << 20
_Entries = dict[bytes, Entry]


@dataclass(frozen=True)
class Salvage:
    """What was found.

    Args:
        metadata: The metadata record.
        values: Where the sound values lie.
        checksums: Their checksums.
        dropped: Keys without a sound value.
        num_outside: How many values or checksums lay on pages that can't be reached any more.
    """

    metadata: bytes
    values: dict[bytes, Entry]
    checksums: dict[bytes, bytes]
    dropped: tuple[bytes, ...]
    num_outside: int


@dataclass
class _Found:
    """Values and checksums by key: those that the newest commit reaches, and candidates."""

    values: _Entries = field(default_factory=dict)
    checksums: dict[bytes, bytes] = field(default_factory=dict)
    other_values: dict[bytes, list[Entry]] = field(default_factory=dict)
    other_checksums: dict[bytes, list[bytes]] = field(default_factory=dict)


def salvage(file: PageFile, store: Path) -> Salvage:
    """Find what is sound.

    Args:
        file: data.mdb.
        store: The store's folder; its name ends with the fingerprint of its config.

    Raises:
        IntegrityError: There is no sound metadata record.
    """
    found = _Found()
    _collect_reachable(file, found)
    sound = {
        key: (entry, expected)
        for key, entry in found.values.items()
        if (expected := found.checksums.get(key)) == _digest(file, key, entry)
    }
    wanted = (found.values.keys() | found.checksums.keys()) - sound.keys()
    num_reached = len(sound)
    if wanted or file.problems or not file.is_newest:
        given_up = file.free_pages()
        _collect_others(file, found, given_up or set())
        generation, meta = file.path.parent, file.meta
        # A pair of which neither half is reached may be of a value that was replaced since.
        all_are_new = meta is not None and not has_old_values(generation, meta.transaction)
        trusts_pairs = given_up is not None or all_are_new
        if not file.is_newest:
            # A commit that can't be read may have replaced any of these.
            for key in (found.other_checksums.keys() & sound.keys()) - {METADATA_KEY}:
                wanted.add(key)
                del sound[key], found.values[key], found.checksums[key]
        reached_keys = found.values.keys() | found.checksums.keys()
        for key in (found.other_values.keys() | found.other_checksums.keys()) - sound.keys():
            if not trusts_pairs and key not in reached_keys:
                continue
            if (match := _matched_outside(file, found, key)) is not None:
                sound[key] = match
    reached = sound.pop(METADATA_KEY, None)
    metadata = _read(file, reached[0]) if reached else _other_metadata(file, found, store)
    dropped = wanted | {key for key in found.other_checksums if _is_sample_key(key)}
    return Salvage(
        metadata or b"",
        {key: entry for key, (entry, _) in sound.items()},
        {key: expected for key, (_, expected) in sound.items()},
        tuple(sorted(dropped - sound.keys() - {METADATA_KEY})),
        max(0, len(sound) + (reached is not None) - num_reached),
    )


def _collect_reachable(file: PageFile, found: _Found) -> None:
    if file.meta is None:
        return
    main = {entry.key: entry for entry in file.walk(file.meta.main)}
    found.values = {key: entry for key, entry in main.items() if not entry.is_database}
    tree = file.named(main.get(CHECKSUMS_NAME))
    for entry in file.walk(tree) if tree else ():
        expected = file.read(entry.offset, entry.length)
        if expected is not None and len(expected) == CHECKSUM_BYTES:
            found.checksums[entry.key] = expected


def _collect_others(file: PageFile, found: _Found, given_up: set[int]) -> None:
    for entry in file.scan(given_up):
        if entry.is_database or not (entry.key == METADATA_KEY or b":" in entry.key):
            continue
        if entry.length == CHECKSUM_BYTES and (expected := _read(file, entry)):
            found.other_checksums.setdefault(entry.key, []).append(expected)
        # An embedding may be 8 bytes long, too.
        found.other_values.setdefault(entry.key, []).append(entry)


def _matched_outside(file: PageFile, found: _Found, key: bytes) -> tuple[Entry, bytes] | None:
    """The one value that matches its checksum where either lies outside; None if several do."""
    reached = [found.values[key]] if key in found.values else []
    others = found.other_values.get(key, [])
    if key in found.checksums:
        allowed, entries = {found.checksums[key]}, reached + others
    else:
        allowed, entries = set(found.other_checksums.get(key, ())), reached or others
    by_digest = {_digest(file, key, entry): entry for entry in entries}
    matches = [(entry, digest) for digest, entry in by_digest.items() if digest in allowed]
    return matches[0] if len(matches) == 1 else None


def _other_metadata(file: PageFile, found: _Found, store: Path) -> bytes:
    """An older copy of the metadata record, or one whose checksum is lost."""
    entries, sums = [found.values.get(METADATA_KEY)], [found.checksums.get(METADATA_KEY)]
    for entry in file.scan(set()):
        if entry.key == METADATA_KEY:
            entries.append(entry)
            sums.append(_read(file, entry) if entry.length == CHECKSUM_BYTES else None)
    records = {record for entry in entries if entry and (record := _read(file, entry))}
    known = {expected for expected in sums if expected}
    if known:
        records = {record for record in records if checksum(METADATA_KEY, record) in known}
    fitting = [record for record in records if _fits(record, store)]
    if not fitting:
        raise IntegrityError(
            f"{store}: the metadata record is lost, and there is no other copy of it in data.mdb. "
            f"Nothing can be kept without it. {LOSS_REMEDY}"
        )
    # It grows: later writers add to the provenance.
    return max(fitting, key=len)


def _fits(record: bytes, store: Path) -> bool:
    """Whether a record is that of this store, and not of the time before its first embedding."""
    with contextlib.suppress(CacheError):
        metadata = StoreMetadata.unpack(record, store)
        has_name = store.name.endswith(f"-{metadata.config.fingerprint}")
        return has_name and metadata.embedding_shape is not None
    return False


def _read(file: PageFile, entry: Entry) -> bytes | None:
    return file.read(entry.offset, entry.length)


def _digest(file: PageFile, key: bytes, entry: Entry) -> bytes:
    """The checksum of what lies there; empty if it can't be read."""
    if entry.length <= _STEP_BYTES:
        value = file.read(entry.offset, entry.length)
        return b"" if value is None else checksum(key, value)
    digest = new_checksum(key)
    for at in range(0, entry.length, _STEP_BYTES):
        part = file.read(entry.offset + at, min(_STEP_BYTES, entry.length - at))
        if part is None:
            return b""
        digest.update(part)
    return bytes(digest.digest())


def _is_sample_key(key: bytes) -> bool:
    try:
        return sample_key(key.decode()) == key
    except (UnicodeDecodeError, InvalidSampleIdError):
        return False

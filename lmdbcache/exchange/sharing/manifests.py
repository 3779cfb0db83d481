"""Manifests: one file for each push, which lists the shards that it adds.

A manifest never changes and its name ends in the digest of its bytes. It stands by itself: what is
shared is what all manifests list together, without those that a later one of the same writer
takes the place of. Nothing here trusts a clock.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError, ConfigError, FormatVersionError, IntegrityError
from lmdbcache.exchange.sharing.shards import (
    FORMAT,
    MAX_HEADER_BYTES,
    MAX_SHARD_FILE_BYTES,
    MAX_SHARD_SAMPLES,
    Shape,
    ShardEntry,
    check_format,
    checked_shape,
)
from lmdbcache.storage import sample_key

__all__ = [
    "MANIFESTS_NAME",
    "MANIFEST_NAME",
    "MAX_MANIFEST_BYTES",
    "Manifest",
    "checked_writer",
    "decode_manifest",
    "encode_manifest",
    "entry_bytes",
    "in_manifests",
    "manifest_path",
    "writer_of",
]

MANIFESTS_NAME: Final = "manifests"
MAX_MANIFEST_BYTES: Final = 8 << 20
MANIFEST_NAME: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}-[0-9a-f]{64})\.json")
_WRITER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID: Final = re.compile(MANIFEST_NAME.pattern.removesuffix(r"\.json"))
_HEX_64: Final = re.compile(r"[0-9a-f]{64}")
_MAX_TEXT: Final = 4096
_MAX_ENTRIES_BYTES: Final = MAX_MANIFEST_BYTES - (2 << 20)


@dataclass(frozen=True)
class Manifest:
    """One manifest.

    Args:
        id: `<writer>-<sha256>`, the file's name without its ending.
        config: The store that it adds to.
        embedding_shape: Shape of one embedding; None in front if the first dimension differs.
        writer: Whose push this was: a random id, or a name that was given.
        created: ISO 8601, UTC, by the writer's clock; for people only.
        provenance: The writer's store's.
        shards: What it lists.
        withdraws: Ids of the same writer's manifests that this one replaces.
        alongside: Ids of the other manifests that counted when this one was written: with them,
            its id means everything that was shared then.
    """

    id: str
    config: CacheConfig
    embedding_shape: Shape
    writer: str
    created: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    shards: tuple[ShardEntry, ...] = ()
    withdraws: tuple[str, ...] = ()
    alongside: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The file, below the fingerprint's folder."""
        return manifest_path(self.id)


def checked_writer(writer: str) -> str:
    """Return a writer's name, if a file's name can carry it.

    Raises:
        ConfigError: It can't.
    """
    if not _WRITER.fullmatch(writer):
        raise ConfigError(
            f"writer: {writer!r:.80}; give 1 to 64 letters, digits, dots, dashes or underscores, "
            "the first a letter or digit"
        )
    return writer


def writer_of(manifest_id: str) -> str:
    """Return whose manifest has this id."""
    return manifest_id[:-65]


def manifest_path(manifest_id: str) -> str:
    """Return the file of a manifest, below the fingerprint's folder."""
    return f"{MANIFESTS_NAME}/{manifest_id}.json"


def encode_manifest(
    config: CacheConfig,
    embedding_shape: Shape,
    writer: str,
    created: str,
    *,
    provenance: Mapping[str, str] | None = None,
    shards: Iterable[ShardEntry] = (),
    withdraws: Iterable[str] = (),
    alongside: Iterable[str] = (),
) -> tuple[Manifest, bytes]:
    """Return a manifest and the bytes of its file.

    Raises:
        ConfigError: The writer's name can't be written down.
    """
    record = {
        "format": FORMAT,
        "fingerprint": config.fingerprint,
        "config": config.to_dict(),
        "embedding_shape": list(embedding_shape),
        "writer": checked_writer(writer),
        "created": created,
        "provenance": dict(provenance or {}),
        "shards": [_record(entry) for entry in shards],
        "withdraws": sorted(set(withdraws)),
        "alongside": sorted(set(alongside)),
    }
    data = _dumps(record)
    manifest_id = f"{writer}-{hashlib.sha256(data).hexdigest()}"
    return decode_manifest(manifest_id, data, config.fingerprint), data


def decode_manifest(manifest_id: str, data: bytes, fingerprint: str) -> Manifest:
    """Read a manifest, which may be damaged or hostile.

    Raises:
        FormatVersionError: Of a newer lmdbcache.
        IntegrityError: It isn't what its name says, or not a manifest of this fingerprint.
    """
    path = manifest_path(manifest_id)
    if hashlib.sha256(data).hexdigest() != manifest_id[-64:]:
        raise IntegrityError(f"{path} is damaged: its bytes don't have the digest in its name")
    try:
        record = json.loads(data, parse_constant=_refuse)
        check_format(record["format"], path)
        config = CacheConfig.from_dict(record["config"])
        writer = _text(record["writer"])
        withdraws = _texts(record["withdraws"], _ID)
        _check(record["fingerprint"] == config.fingerprint == fingerprint, "fingerprint")
        _check(writer == writer_of(manifest_id), "writer")
        _check(all(writer_of(one) == writer for one in withdraws), "withdraws")
        return Manifest(
            id=manifest_id,
            config=config,
            embedding_shape=checked_shape(tuple(record["embedding_shape"])),
            writer=writer,
            created=_text(record["created"]),
            provenance={_text(k): _text(v) for k, v in record["provenance"].items()},
            shards=tuple([_entry(one) for one in _list(record["shards"])]),
            withdraws=withdraws,
            alongside=_texts(record["alongside"], _ID),
        )
    except FormatVersionError:
        raise
    except (CacheError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} isn't a manifest of {fingerprint} ({error!r:.300})") from None


def entry_bytes(entries: Iterable[ShardEntry]) -> int:
    """Return how many bytes these take in a manifest."""
    return sum(len(_dumps(_record(entry))) + 1 for entry in entries)


def in_manifests(entries: Sequence[ShardEntry]) -> Iterator[list[ShardEntry]]:
    """Yield the entries in as few parts as fit into a manifest each; none make one empty part."""
    part: list[ShardEntry] = []
    held = 0
    for entry in entries:
        size = entry_bytes([entry])
        if part and held + size > _MAX_ENTRIES_BYTES:
            yield part
            part, held = [], 0
        part.append(entry)
        held += size
    yield part


def _dumps(record: Any) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii")


def _record(entry: ShardEntry) -> dict[str, Any]:
    record = asdict(entry)
    return record if entry.without else {k: v for k, v in record.items() if k != "without"}


def _entry(record: Any) -> ShardEntry:
    entry = ShardEntry(**{**record, "without": tuple(_list(record.get("without", [])))})
    _texts([entry.sha256, entry.header_sha256], _HEX_64)
    for value, largest in (
        (entry.num_samples, MAX_SHARD_SAMPLES),
        (entry.header_bytes, MAX_HEADER_BYTES),
        (entry.num_bytes, MAX_SHARD_FILE_BYTES),
    ):
        _check(type(value) is int and 0 < value <= largest, f"a number: {value!r:.40}")
    _check(entry.header_bytes < entry.num_bytes, "header_bytes")
    for sample_id in (entry.first, entry.last, *entry.without):
        _check(sample_key(sample_id) == sample_id.encode(), f"sample id {sample_id!r:.80}")
    _check(entry.first.encode() <= entry.last.encode(), "first and last")
    _check(len(entry.without) <= entry.num_samples, "without")
    return entry


def _text(value: Any) -> str:
    _check(isinstance(value, str) and len(value) <= _MAX_TEXT, "a text")
    value.encode()  # half a character can't be kept
    return str(value)


def _texts(values: Any, form: re.Pattern[str]) -> tuple[str, ...]:
    _check(all(form.fullmatch(one) for one in _list(values)), form.pattern)
    return tuple(values)


def _list(values: Any) -> list[Any]:
    _check(isinstance(values, list), "a list")
    return list(values)


def _check(condition: bool, what: str) -> None:  # noqa: FBT001
    if not condition:
        raise ConfigError(f"wrong: {what}")


def _refuse(name: str) -> None:
    raise ConfigError(f"{name} isn't JSON")

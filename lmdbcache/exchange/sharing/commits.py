"""Commit files: which shards a writer has added.

A commit's name ends in the digest of its bytes and it names its parents, so one commit id pins a
whole state, whoever may write to the place. Nothing here trusts a clock.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError, ConfigError, FormatVersionError, IntegrityError
from lmdbcache.exchange.sharing.shards import (
    FORMAT,
    MAX_SHARD_SAMPLES,
    Shape,
    ShardEntry,
    checked_shape,
)
from lmdbcache.storage import sample_key

__all__ = [
    "COMMITS_NAME",
    "COMMIT_NAME",
    "Commit",
    "checked_writer",
    "commit_bytes",
    "commit_path",
    "decode_commit",
    "new_commit",
    "writer_slug",
]

COMMITS_NAME: Final = "commits"  # of the remote folder, and of the copies in a store's
COMMIT_NAME: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}-[0-9a-f]{64})\.json")
_NOT_IN_SLUG: Final = re.compile(r"[^A-Za-z0-9._]+")
_HEX_64: Final = re.compile(r"[0-9a-f]{64}")
_HEX_16: Final = re.compile(r"[0-9a-f]{16}")
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}-[0-9a-f]{64}")
_MAX_SHARD_FILE_BYTES: Final = 1 << 40
_MAX_TEXT: Final = 4096


@dataclass(frozen=True)
class Commit:
    """One commit.

    Args:
        id: `<writer>-<sha256>`, the file's name without its ending.
        config: The store that it adds to.
        embedding_shape: Shape of one embedding; None in front if the first dimension differs.
        writer: Who pushed it: a host's name, or what `--writer` said.
        created: ISO 8601, UTC, by the writer's clock; for people only.
        parents: Ids of the commits that it was made after.
        provenance: The writer's store's.
        shards: What it adds.
        withdrawn: Digests of shards that its ancestors listed and that count no more, and of
            commits that are lost.
        replaced: Sample id → the checksums that its ancestors gave it and that count no more.
    """

    id: str
    config: CacheConfig
    embedding_shape: Shape
    writer: str
    created: str
    parents: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    shards: tuple[ShardEntry, ...] = ()
    withdrawn: tuple[str, ...] = ()
    replaced: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The file, below the fingerprint's folder."""
        return commit_path(self.id)


def checked_writer(writer: str) -> str:
    """A writer's name, if a commit can carry it.

    Raises:
        ConfigError: It can't.
    """
    if not writer.strip() or len(writer) > 255 or not writer.isprintable():
        raise ConfigError(f"writer: {writer!r}; give 1 to 255 printable characters")
    return writer


def writer_slug(writer: str) -> str:
    """The part of a writer's name that goes into a file's name."""
    plain = unicodedata.normalize("NFKD", writer).encode("ascii", "ignore").decode()
    return _NOT_IN_SLUG.sub("-", plain).strip("-._")[:64].rstrip("-._") or "writer"


def new_commit(
    config: CacheConfig,
    embedding_shape: Shape,
    writer: str,
    created: str,
    *,
    parents: Iterable[str] = (),
    provenance: Mapping[str, str] | None = None,
    shards: Iterable[ShardEntry] = (),
    withdrawn: Iterable[str] = (),
    replaced: Mapping[str, Iterable[bytes]] | None = None,
) -> tuple[Commit, bytes]:
    """A commit and the bytes of its file.

    Raises:
        ConfigError: The writer's name can't be written down.
    """
    commit = Commit(
        "",
        config,
        embedding_shape,
        checked_writer(writer),
        created,
        tuple(sorted(set(parents))),
        dict(provenance or {}),
        tuple(shards),
        tuple(sorted(set(withdrawn))),
        {one: tuple(sorted(old)) for one, old in sorted((replaced or {}).items())},
    )
    data = commit_bytes(commit)
    digest = hashlib.sha256(data).hexdigest()
    name = f"{writer_slug(writer)}-{digest}"
    return decode_commit(name, data, config.fingerprint), data


def commit_bytes(commit: Commit) -> bytes:
    """The file of a commit."""
    record: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": commit.config.fingerprint,
        "config": commit.config.to_dict(),
        "embedding_shape": list(commit.embedding_shape),
        "writer": commit.writer,
        "created": commit.created,
        "parents": list(commit.parents),
        "provenance": dict(commit.provenance),
        "shards": [_entry_record(entry) for entry in commit.shards],
        "withdrawn": list(commit.withdrawn),
        "replaced": [
            [sample_id, [one.hex() for one in old]] for sample_id, old in commit.replaced.items()
        ],
    }
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii")


def decode_commit(commit_id: str, data: bytes, fingerprint: str) -> Commit:
    """Read a commit file, which may be damaged or made by a stranger.

    Raises:
        FormatVersionError: Of a newer lmdbcache.
        IntegrityError: It isn't what its name says, or not a commit of this fingerprint.
    """
    path = commit_path(commit_id)
    if hashlib.sha256(data).hexdigest() != commit_id[-64:]:
        raise IntegrityError(f"{path} is damaged: its bytes don't have the digest in its name")
    try:
        record = json.loads(data, parse_constant=_refuse)
        if _is_size(record["format"]) and record["format"] > FORMAT:
            raise FormatVersionError(
                f"{path} is in format {record['format']}; this lmdbcache reads up to {FORMAT}. "
                "Upgrade lmdbcache"
            )
        config = CacheConfig.from_dict(record["config"])
        _check(_is_size(record["format"]), "format")
        _check(record["fingerprint"] == config.fingerprint == fingerprint, "fingerprint")
        shape = checked_shape(tuple(record["embedding_shape"]))
        return Commit(
            id=commit_id,
            config=config,
            embedding_shape=shape,
            writer=_text(record["writer"]),
            created=_text(record["created"]),
            parents=_texts(record["parents"], _ID),
            provenance={_text(k): _text(v) for k, v in record["provenance"].items()},
            shards=tuple([_entry(one, is_ragged=None in shape) for one in _list(record["shards"])]),
            withdrawn=_texts(record.get("withdrawn", []), _HEX_64),
            replaced={_sample_id(one): _checksums(old) for one, old in record.get("replaced", [])},
        )
    except FormatVersionError:
        raise
    except (CacheError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} isn't a commit of {fingerprint} ({error!r})") from None


def commit_path(commit_id: str) -> str:
    """The file of a commit, below the fingerprint's folder."""
    return f"{COMMITS_NAME}/{commit_id}.json"


def _entry_record(entry: ShardEntry) -> dict[str, Any]:
    pairs = zip(entry.sample_ids, entry.checksums, strict=True)
    record: dict[str, Any] = {
        "sha256": entry.sha256,
        "num_bytes": entry.num_bytes,
        "samples": [[sample_id, one.hex()] for sample_id, one in pairs],
    }
    if entry.lengths is not None:
        record["lengths"] = list(entry.lengths)
    return record


def _entry(record: Any, *, is_ragged: bool) -> ShardEntry:
    samples, lengths = record["samples"], record.get("lengths")
    _check(0 < len(samples) <= MAX_SHARD_SAMPLES, "number of samples")
    ids = tuple([_sample_id(sample_id) for sample_id, _ in samples])
    _check(
        all(one < two for one, two in pairwise([one.encode() for one in ids])), "order of samples"
    )
    _check(_HEX_64.fullmatch(record["sha256"]) is not None, "sha256")
    _check(_is_size(record["num_bytes"]), "num_bytes")
    _check((lengths is not None) == is_ragged, "lengths")
    if lengths is not None:
        _check(len(lengths) == len(ids) and all(map(_is_size, lengths)), "lengths")
    return ShardEntry(
        record["sha256"],
        record["num_bytes"],
        ids,
        _checksums([one for _, one in samples]),
        None if lengths is None else tuple(lengths),
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < _MAX_SHARD_FILE_BYTES


def _sample_id(value: Any) -> str:
    _check(isinstance(value, str) and sample_key(value) == value.encode(), f"sample id {value!r}")
    return str(value)


def _checksums(values: Any) -> tuple[bytes, ...]:
    return tuple([bytes.fromhex(one) for one in _texts(values, _HEX_16)])


def _text(value: Any) -> str:
    _check(isinstance(value, str) and len(value) <= _MAX_TEXT, "a text")
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

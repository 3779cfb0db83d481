"""Manifests: one file for each push, which lists the shards that it adds, and what all of them say.

A manifest never changes and its name ends in the digest of its bytes. It stands by itself: what is
shared is what all manifests list together, without those that a later one of the same writer
takes the place of. Nothing here trusts a clock.

All that is read here may be hostile: numbers and sizes are bounded before anything is fetched,
and no path is taken from a file's content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Final, NamedTuple

from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    CacheNotFoundError,
    ConfigError,
    FormatVersionError,
    IntegrityError,
    RemoteError,
)
from lmdbcache.exchange.sharing.local_folder import LocalFolder
from lmdbcache.exchange.sharing.remote import Remote, in_parallel
from lmdbcache.exchange.sharing.shards import (
    FORMAT,
    MAX_HEADER_BYTES,
    MAX_SHARD_FILE_BYTES,
    MAX_SHARD_SAMPLES,
    Shape,
    ShardEntry,
    ShardHeader,
    check_digest,
    check_format,
    checked_shape,
    decode_header,
    encode_json,
)
from lmdbcache.files import few
from lmdbcache.storage import sample_key

MANIFESTS_NAME: Final = "manifests"
FINGERPRINT: Final = re.compile(r"[0-9a-f]{16}")
_FORMER_NAME: Final = "commits"  # where the first form of sharing kept its history
_WRITER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID: Final = re.compile(rf"{_WRITER.pattern}-[0-9a-f]{{64}}")
_FILE_NAME: Final = re.compile(rf"({_ID.pattern})\.json")
_HEX_64: Final = re.compile(r"[0-9a-f]{64}")
_FEW: Final = 10
# No honest place comes near these; a hostile one costs no more than them.
_MAX_TEXT: Final = 4096
_MAX_MANIFEST_BYTES: Final = 8 << 20
_MAX_ENTRIES_BYTES: Final = _MAX_MANIFEST_BYTES - (2 << 20)
_MAX_MANIFESTS: Final = 100_000
_MAX_READ_BYTES: Final = 64 << 20  # of all manifests that count
_MAX_SAMPLES: Final = 10_000_000
_MAX_HEADERS_BYTES: Final = 1 << 30


# ---- one manifest


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
    data = encode_json(record)
    manifest_id = f"{writer}-{hashlib.sha256(data).hexdigest()}"
    return decode_manifest(manifest_id, data, config.fingerprint), data


def decode_manifest(manifest_id: str, data: bytes, fingerprint: str) -> Manifest:
    """Read a manifest, which may be damaged or hostile.

    Raises:
        FormatVersionError: Of a newer lmdbcache.
        IntegrityError: It isn't what its name says, or not a manifest of this fingerprint.
    """
    path = manifest_path(manifest_id)
    check_digest(data, manifest_id[-64:], path)
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
    return sum(len(encode_json(_record(entry))) + 1 for entry in entries)


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


# ---- all that count


class Offer(NamedTuple):
    """A shard that counts.

    Args:
        manifest: One that lists it.
        entry: The shard; `without` has the samples that no manifest counts.
    """

    manifest: Manifest
    entry: ShardEntry

    def rows(self, header: ShardHeader) -> list[int]:
        """Return the positions in the shard of the samples that count."""
        without = frozenset(self.entry.without)
        return [row for row, one in enumerate(header.sample_ids) if one not in without]


class SharedState:
    """What is shared of one store.

    Args:
        remote: The place.
        fingerprint: Of the store's config.
        local: Has copies of what was read before.
        sizes: Id → bytes of each manifest file that is there; without any only copies are read.

    Attributes:
        manifests: Those that count, by id.
        problems: Manifests that are damaged, missing or foreign: path → what is wrong.
        damaged: Ids of those of them that no release can read.
    """

    def __init__(
        self, remote: Remote, fingerprint: str, local: LocalFolder, sizes: dict[str, int]
    ) -> None:
        self._remote, self._fingerprint, self._local, self.sizes = remote, fingerprint, local, sizes
        self._withdrawn: set[str] = set()
        self.manifests: dict[str, Manifest] = {}
        self.problems: dict[str, str] = {}
        self.damaged: set[str] = set()

    def first(self) -> Manifest | None:
        """Return the manifest that comes first; None if there is none."""
        return min(self.manifests.values(), key=lambda one: one.id, default=None)

    @property
    def pin(self) -> str | None:
        """The id of a manifest that means all that counts here, if there is one."""
        ids = self.manifests.keys()
        return next((m.id for m in self.manifests.values() if {m.id, *m.alongside} == ids), None)

    def offers(self) -> list[Offer]:
        """Return every shard that counts, once, in an order that is the same on every machine.

        Raises:
            IntegrityError: More than any honest place has.
        """
        found: dict[ShardEntry, Offer] = {}
        for _, manifest in sorted(self.manifests.items()):
            for entry in manifest.shards:
                key = replace(entry, without=())
                there = found.get(key, Offer(manifest, entry))
                # What one of them counts, counts.
                without = frozenset(there.entry.without) & frozenset(entry.without)
                counted = replace(entry, without=tuple(sorted(without)))
                found[key] = Offer(there.manifest, counted)
        num_samples = sum(entry.num_samples for entry in found)
        num_bytes = sum(entry.header_bytes for entry in found)
        if num_samples > _MAX_SAMPLES or num_bytes > _MAX_HEADERS_BYTES:
            raise IntegrityError(
                f"the manifests of {self._fingerprint} list {num_samples} samples and {num_bytes} "
                f"bytes of headers; up to {_MAX_SAMPLES} and {_MAX_HEADERS_BYTES} are read. Remove "
                "the manifests that don't belong there"
            )
        return list(found.values())

    def read_all(self) -> None:
        """Read all that count."""
        # A manifest that takes the place of others lists what they did: it is the larger one.
        self._read_each(sorted(self.sizes, key=lambda one: (-self.sizes[one], one)))
        for gone in self._withdrawn:
            self.manifests.pop(gone, None)
            self.problems.pop(manifest_path(gone), None)
        for one in self.manifests.values():
            for other in {*one.alongside} - self.sizes.keys() - self._withdrawn:
                self.problems[manifest_path(other)] = f"isn't there, and {one.id} was alongside it"

    def read_pinned(self, manifest_id: str) -> None:
        """Read one, and those alongside it."""
        self._read_each([manifest_id])
        if manifest_id in self.manifests:
            self._read_each(self.manifests[manifest_id].alongside)

    def _read_each(self, manifest_ids: Iterable[str]) -> None:
        for manifest_id, found in in_parallel(self._read, self._bounded(manifest_ids)):
            try:
                self.manifests[manifest_id] = found.result()
                self._withdrawn.update(self.manifests[manifest_id].withdraws)
            except (RemoteError, IntegrityError) as error:
                self.problems[manifest_path(manifest_id)] = str(error)
                if isinstance(error, RemoteError):
                    # Raises where nothing answers any more: all others would fail as well.
                    self._remote.list_files(f"{self._fingerprint}/{MANIFESTS_NAME}")
                elif not isinstance(error, FormatVersionError):
                    self.damaged.add(manifest_id)

    def _bounded(self, manifest_ids: Iterable[str]) -> Iterator[str]:
        num_bytes = 0
        for manifest_id in manifest_ids:
            if manifest_id not in self._withdrawn:
                num_bytes += min(self.sizes.get(manifest_id, 0), _MAX_MANIFEST_BYTES)
                if num_bytes > _MAX_READ_BYTES:
                    raise IntegrityError(
                        f"{self._remote.place}/{self._fingerprint}/{MANIFESTS_NAME} has more than "
                        f"{_MAX_READ_BYTES} bytes. Remove what doesn't belong there"
                    )
                yield manifest_id

    def _read(self, manifest_id: str) -> Manifest:
        fingerprint, path = self._fingerprint, manifest_path(manifest_id)
        data, num_bytes = self._local.copy(manifest_id, manifest_id[-64:]), None
        if self.sizes:
            num_bytes = self.sizes.get(manifest_id, 0)
        # Another length than the copy's is damage that a listing shows.
        if data is None or num_bytes not in (None, len(data)):
            if not num_bytes:
                raise IntegrityError(f"{path} isn't there (any more)")
            if num_bytes > _MAX_MANIFEST_BYTES:
                raise IntegrityError(f"{path} has {num_bytes} bytes; no manifest has so many")
            check = partial(check_digest, sha256=manifest_id[-64:], name=path)
            data = self._remote.read(f"{fingerprint}/{path}", 0, num_bytes, check)
            manifest = decode_manifest(manifest_id, data, fingerprint)
            self._local.keep(manifest_id, data)
            return manifest
        return decode_manifest(manifest_id, data, fingerprint)


def read_state(
    remote: Remote, fingerprint: str, local: LocalFolder, manifest: str | None = None
) -> SharedState:
    """Read the manifests of one fingerprint: one listing, and a read for each that counts.

    Args:
        remote: The place.
        fingerprint: Of the config.
        local: Has copies of what was read before.
        manifest: The state that this id means, or the beginning of an id; None: all that is
            there. A whole id whose manifests were all read before needs no network.

    Raises:
        ConfigError: The id, or its beginning, is that of no manifest or of several.
        RemoteError: The place can't be reached. A single file that can't be read is a problem of
            the state.
        FormatVersionError: It was pushed by the previous form of sharing.
        IntegrityError: There are more manifests than any honest place has.
    """
    if manifest is not None and _ID.fullmatch(manifest):
        state = SharedState(remote, fingerprint, local, {})
        state.read_pinned(manifest)
        if not state.problems:
            return state
    sizes = _manifest_sizes(remote, fingerprint)
    state = SharedState(remote, fingerprint, local, sizes)
    if manifest is None:
        state.read_all()
        return state
    found = [one for one in sizes if one.startswith(manifest)]
    if len(found) != 1:
        what = f"begins {len(found)} manifests" if found else "isn't a manifest"
        raise ConfigError(
            f"manifest {manifest!r} {what} of {fingerprint}; there: {few(sorted(found or sizes))}"
        )
    state.read_pinned(found[0])
    return state


def _manifest_sizes(remote: Remote, fingerprint: str) -> dict[str, int]:
    """Return id → bytes of each manifest that is there."""
    listed = remote.list_files(f"{fingerprint}/{MANIFESTS_NAME}")
    found = {match[1]: n for name, n in listed.items() if (match := _FILE_NAME.fullmatch(name))}
    where = f"{remote.place}/{fingerprint}"
    if not found and remote.list_files(f"{fingerprint}/{_FORMER_NAME}"):
        raise FormatVersionError(
            f"{where} was pushed by an earlier lmdbcache, in a form that isn't read any more: push "
            "again to an empty folder"
        )
    if len(found) > _MAX_MANIFESTS:
        raise IntegrityError(
            f"{where}/{MANIFESTS_NAME} has {len(found)} files, {_MAX_MANIFESTS} at most are read. "
            "Remove those that don't belong there"
        )
    return found


def read_header(remote: Remote, offer: Offer, local: LocalFolder) -> ShardHeader:
    """Return what a shard holds, from a copy or from the beginning of its file.

    Raises:
        IntegrityError: The file is damaged, or isn't what its manifest says.
        RemoteError: It can't be read.
    """
    (manifest, entry), config = offer, offer.manifest.config
    data = copy = local.copy(entry.sha256, entry.header_sha256)
    if data is None:
        path = f"{config.fingerprint}/{entry.path}"
        check = partial(check_digest, sha256=entry.header_sha256, name=entry.path)
        data = remote.read(path, 0, entry.header_bytes, check)
    header = decode_header(data, entry.path)
    listed = (config, manifest.embedding_shape, entry.num_bytes, entry.num_samples)
    if listed != (header.config, header.embedding_shape, header.num_bytes, len(header.keys)) or (
        (entry.first, entry.last) != (header.sample_ids[0], header.sample_ids[-1])
    ):
        raise IntegrityError(f"{entry.path} isn't the shard that manifest {manifest.id} says")
    if copy is None:
        local.keep(entry.sha256, data)
    return header


# ---- stores


def shared_fingerprints(remote: Remote, beginning: str | None = None) -> list[str]:
    """Return the fingerprints of the stores that are shared at a place, or of those of a beginning.

    Raises:
        CacheNotFoundError: None; names what is there.
        RemoteError: The place can't be reached.
    """
    there = [name for name in remote.list_folders() if FINGERPRINT.fullmatch(name)]
    found = [name for name in there if name.startswith((beginning or "").strip().lower())]
    if not there:
        raise CacheNotFoundError(f"nothing is shared at {remote.place}; is the URL right?")
    if not found:
        raise _not_the_one(f"no fingerprint at {remote.place} begins {beginning!r}", remote, there)
    return found


def find_fingerprint(remote: Remote, beginning: str | None) -> str:
    """Return the one fingerprint at a place that has a beginning; without one the only one.

    Raises:
        CacheNotFoundError: None, or several; names what is there.
        RemoteError: The place can't be reached.
    """
    found = shared_fingerprints(remote, beginning)
    if len(found) > 1:
        # A first push that hasn't ended leaves a folder in which nothing is shared yet.
        found = [name for name in found if _manifest_sizes(remote, name)] or found
    if len(found) > 1:
        raise _not_the_one(f"{len(found)} stores are shared at {remote.place}", remote, found)
    return found[0]


def _not_the_one(problem: str, remote: Remote, there: Sequence[str]) -> CacheNotFoundError:
    described = ", ".join(_described(remote, one) for one in there[:_FEW])
    return CacheNotFoundError(f"{problem}; there: {described}. Give the `fingerprint` of one")


def _described(remote: Remote, fingerprint: str) -> str:
    with contextlib.suppress(IntegrityError, RemoteError):
        first = read_state(remote, fingerprint, LocalFolder(None)).first()
        return fingerprint if first is None else f"{fingerprint} ({first.config.slug})"
    return fingerprint

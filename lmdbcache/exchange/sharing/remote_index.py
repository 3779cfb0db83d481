"""What is shared at a place: stores, their manifests, and what their shards hold.

All that is read here may be hostile: numbers and sizes are bounded before anything is fetched,
and no path is taken from a file's content.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from lmdbcache.errors import (
    CacheNotFoundError,
    ConfigError,
    FormatVersionError,
    IntegrityError,
    RemoteError,
)
from lmdbcache.exchange.sharing.local_folder import LocalFolder
from lmdbcache.exchange.sharing.manifests import (
    MANIFEST_NAME,
    MANIFESTS_NAME,
    MAX_MANIFEST_BYTES,
    Manifest,
    decode_manifest,
    manifest_path,
)
from lmdbcache.exchange.sharing.remote import Remote, in_parallel
from lmdbcache.exchange.sharing.shards import ShardEntry, ShardHeader, decode_header
from lmdbcache.files import few

__all__ = [
    "FINGERPRINT",
    "Offer",
    "SharedState",
    "find_fingerprint",
    "read_header",
    "read_state",
    "shared_fingerprints",
]

FINGERPRINT: Final = re.compile(r"[0-9a-f]{16}")
_FORMER_NAME: Final = "commits"  # where the first form of sharing kept its history
_FEW: Final = 10
# No honest place comes near these; a hostile one costs no more than them.
_MAX_MANIFESTS: Final = 100_000
_MAX_READ_BYTES: Final = 64 << 20  # of all manifests that count
_MAX_SAMPLES: Final = 10_000_000
_MAX_HEADERS_BYTES: Final = 1 << 30


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
        if not self.entry.without:
            return list(range(self.entry.num_samples))
        without = frozenset(self.entry.without)
        return [row for row, one in enumerate(header.sample_ids) if one not in without]


@dataclass
class SharedState:
    """What is shared of one store.

    Args:
        fingerprint: Of its config.
        manifests: Those that count, by id.
        problems: Manifests that are damaged, missing or foreign: path → what is wrong.
        unread: Paths of those of them that may be sound: of a newer release, or refused.
        listed: Ids of all manifest files that are there.
    """

    fingerprint: str
    manifests: dict[str, Manifest] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    listed: set[str] = field(default_factory=set)

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
                there = found.get(key)
                if there is not None:  # what one of them counts, counts
                    both = frozenset(there.entry.without) & frozenset(entry.without)
                    entry = replace(entry, without=tuple(sorted(both)))  # noqa: PLW2901
                found[key] = Offer(there.manifest if there else manifest, entry)
        _check_limits(self.fingerprint, found)
        return list(found.values())


def _check_limits(fingerprint: str, entries: Iterable[ShardEntry]) -> None:
    num_samples = num_bytes = 0
    for entry in entries:
        num_samples += entry.num_samples
        num_bytes += entry.header_bytes
    if num_samples > _MAX_SAMPLES or num_bytes > _MAX_HEADERS_BYTES:
        raise IntegrityError(
            f"the manifests of {fingerprint} list {num_samples} samples and {num_bytes} bytes of "
            f"headers; up to {_MAX_SAMPLES} and {_MAX_HEADERS_BYTES} are read. Remove the "
            "manifests that don't belong there"
        )


# ---- manifests


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
    if manifest is None:
        reading = _Reading(remote, fingerprint, local, _manifest_sizes(remote, fingerprint))
        reading.read_all()
        return reading.state
    if MANIFEST_NAME.fullmatch(f"{manifest}.json"):
        reading = _Reading(remote, fingerprint, local, {})
        reading.read_pinned(manifest)
        if not reading.state.problems:
            return reading.state
    sizes = _manifest_sizes(remote, fingerprint)
    found = [one for one in sizes if one.startswith(manifest)]
    if len(found) != 1:
        what = f"begins {len(found)} manifests" if found else "isn't a manifest"
        raise ConfigError(
            f"manifest {manifest!r} {what} of {fingerprint}; there: {few(sorted(found or sizes))}"
        )
    reading = _Reading(remote, fingerprint, local, sizes)
    reading.read_pinned(found[0])
    return reading.state


class _Reading:
    """The manifests of one fingerprint, being read.

    Args:
        remote: The place.
        fingerprint: Of the config.
        local: Has copies of what was read before.
        sizes: Id → bytes of each manifest that is there; with none only copies are read.
    """

    def __init__(
        self, remote: Remote, fingerprint: str, local: LocalFolder, sizes: Mapping[str, int]
    ) -> None:
        self._remote, self._local, self._sizes = remote, local, sizes
        self._withdrawn: set[str] = set()
        self.state = SharedState(fingerprint, listed=set(sizes))

    def read_all(self) -> None:
        """Read all that count."""
        state = self.state
        self._read_each(self._ahead())
        for gone in self._withdrawn:
            state.manifests.pop(gone, None)
            state.problems.pop(manifest_path(gone), None)
        for one in state.manifests.values():
            for other in {*one.alongside} - self._sizes.keys() - self._withdrawn:
                state.problems[manifest_path(other)] = f"isn't there, and {one.id} was alongside it"

    def read_pinned(self, manifest_id: str) -> None:
        """Read one, and those alongside it."""
        self._read_each([manifest_id])
        if manifest_id in self.state.manifests:
            self._read_each(self.state.manifests[manifest_id].alongside)

    def _ahead(self) -> Iterator[str]:
        # A manifest that takes the place of others lists what they did: it is the larger one.
        num_bytes = 0
        for manifest_id in sorted(self._sizes, key=lambda one: (-self._sizes[one], one)):
            if manifest_id not in self._withdrawn:
                num_bytes += min(self._sizes[manifest_id], MAX_MANIFEST_BYTES)
                if num_bytes > _MAX_READ_BYTES:
                    raise IntegrityError(
                        f"{self._remote.place}/{self.state.fingerprint}/{MANIFESTS_NAME} has more "
                        f"than {_MAX_READ_BYTES} bytes. Remove what doesn't belong there"
                    )
                yield manifest_id

    def _read_each(self, manifest_ids: Iterable[str]) -> None:
        state = self.state
        for manifest_id, found in in_parallel(self._read, manifest_ids):
            try:
                state.manifests[manifest_id] = found.result()
                self._withdrawn.update(state.manifests[manifest_id].withdraws)
            except (RemoteError, IntegrityError) as error:
                path = manifest_path(manifest_id)
                if isinstance(error, RemoteError):
                    # Raises where nothing answers any more: all others would fail as well.
                    self._remote.list_files(f"{state.fingerprint}/{MANIFESTS_NAME}")
                state.problems[path] = str(error)
                if isinstance(error, (RemoteError, FormatVersionError)):
                    state.unread.add(path)

    def _read(self, manifest_id: str) -> Manifest:
        fingerprint, path = self.state.fingerprint, manifest_path(manifest_id)
        copy, num_bytes = self._local.copy(manifest_id, manifest_id[-64:]), None
        if self._sizes:
            num_bytes = self._sizes.get(manifest_id, 0)
        # Another length is damage that a listing shows.
        if copy is not None and num_bytes in (None, len(copy)):
            return decode_manifest(manifest_id, copy, fingerprint)
        if not num_bytes:
            raise IntegrityError(f"{path} isn't there (any more)")
        if num_bytes > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"{path} has {num_bytes} bytes; no manifest has so many")
        data = self._remote.read(f"{fingerprint}/{path}", num_bytes)
        if hashlib.sha256(data).hexdigest() != manifest_id[-64:]:  # perhaps on the way only
            data = self._remote.read(f"{fingerprint}/{path}", num_bytes)
        manifest = decode_manifest(manifest_id, data, fingerprint)
        self._local.keep(manifest_id, data)
        return manifest


def _manifest_sizes(remote: Remote, fingerprint: str) -> dict[str, int]:
    """Return id → bytes of each manifest that is there."""
    listed = remote.list_files(f"{fingerprint}/{MANIFESTS_NAME}")
    found = {match[1]: n for name, n in listed.items() if (match := MANIFEST_NAME.fullmatch(name))}
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


# ---- what shards hold


def read_header(remote: Remote, offer: Offer, local: LocalFolder) -> ShardHeader:
    """Return what a shard holds, from a copy or from the beginning of its file.

    Raises:
        IntegrityError: The file is damaged, or isn't what its manifest says.
        RemoteError: It can't be read.
    """
    entry, config = offer.entry, offer.manifest.config
    data = copy = local.copy(entry.sha256, entry.header_sha256)
    for _ in range(2):  # it may be damaged on the way only
        if data is None or hashlib.sha256(data).hexdigest() != entry.header_sha256:
            path = f"{config.fingerprint}/{entry.path}"
            data = remote.read_span(path, 0, entry.header_bytes)
    if data is None or hashlib.sha256(data).hexdigest() != entry.header_sha256:
        raise IntegrityError(f"{entry.path} is damaged: its header doesn't have its digest")
    header = decode_header(data, entry.path)
    listed = (config, offer.manifest.embedding_shape, entry.num_bytes, entry.num_samples)
    if listed != (header.config, header.embedding_shape, header.num_bytes, len(header.keys)) or (
        (entry.first, entry.last) != (header.sample_ids[0], header.sample_ids[-1])
    ):
        raise IntegrityError(f"{entry.path} isn't the shard that manifest {offer.manifest.id} says")
    if copy is None:
        local.keep(entry.sha256, data)
    return header


# ---- stores


def shared_fingerprints(remote: Remote) -> list[str]:
    """Return the fingerprints of the stores that are shared at a place.

    Raises:
        RemoteError: The place can't be reached.
    """
    return sorted(name for name in remote.list_folders() if FINGERPRINT.fullmatch(name))


def find_fingerprint(remote: Remote, text: str | None) -> str:
    """Return the one fingerprint at a place that a text is, or begins; without a text the only one.

    Raises:
        CacheNotFoundError: None, or several; names what is there.
        RemoteError: The place can't be reached.
    """
    there = shared_fingerprints(remote)
    found = [name for name in there if name.startswith((text or "").strip().lower())]
    if len(found) > 1:
        # A first push that hasn't ended leaves a folder in which nothing is shared yet.
        found = [name for name in found if _manifest_sizes(remote, name)] or found
    if len(found) == 1:
        return found[0]
    if not there:
        raise CacheNotFoundError(f"nothing is shared at {remote.place}; is the URL right?")
    what = f"{len(found) or 'none'} of the stores at {remote.place}"
    if text:
        what = f"{text!r} begins the fingerprints of {what}"
    raise CacheNotFoundError(
        f"{what}; there: {', '.join(_described(remote, one) for one in (found or there)[:_FEW])}. "
        "Give the `fingerprint` of one"
    )


def _described(remote: Remote, fingerprint: str) -> str:
    with contextlib.suppress(IntegrityError, RemoteError):
        first = read_state(remote, fingerprint, LocalFolder(None)).first()
        return fingerprint if first is None else f"{fingerprint} ({first.config.slug})"
    return fingerprint

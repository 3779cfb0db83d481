"""`verify_remote`: whether everything that is shared is as it was written."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from lmdbcache.errors import IntegrityError, RemoteError
from lmdbcache.exchange.sharing.local_folder import LocalFolder
from lmdbcache.exchange.sharing.manifests import (
    Offer,
    read_header,
    read_state,
    shared_fingerprints,
)
from lmdbcache.exchange.sharing.remote import Remote, in_parallel
from lmdbcache.exchange.sharing.shards import MAX_SHARD_FILE_BYTES
from lmdbcache.storage import Progress, Report

_SHARD_NAME: Final = re.compile(r"([0-9a-f]{64})\.safetensors")


@dataclass
class SharedStoreReport(Report):
    """What is shared of one store.

    Args:
        fingerprint: Of its config.
        num_manifests: Manifests that count and are sound.
        num_shards: Shards that they list and that are sound.
        num_samples: Samples that the sound ones hold, each once.
        num_bytes: Size of all shards that are there.
        problems: Files that are damaged, missing or unreadable: path → what is wrong.
        num_unlisted: Sound shards that no manifest lists: of a push that is under way or that was
            interrupted and will use them, or of an earlier state.
    """

    derived: ClassVar[tuple[str, ...]] = ("is_sound",)

    fingerprint: str
    num_manifests: int = 0
    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    num_unlisted: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether everything is sound."""
        return not self.problems


@dataclass
class RemoteReport(Report):
    """What a look at a shared place found.

    Args:
        url: The place, without a password.
        stores: What is shared there.
    """

    derived: ClassVar[tuple[str, ...]] = ("is_sound",)

    url: str
    stores: list[SharedStoreReport] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether everything is sound."""
        return all(store.is_sound for store in self.stores)


def verify_remote(
    url: str,
    fingerprint: str | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RemoteReport:
    """Compare every manifest and shard of a place with its digest; nothing is changed.

    `push(…, repair=True)` uploads damaged shards again.

    Args:
        url: The place.
        fingerprint: Of the store to look at, or its first digits; None takes all.
        storage_options: For fsspec; default: its configuration and the environment.
        progress: Called with the bytes read and those of the shards, for each store.

    Raises:
        CacheNotFoundError: Nothing is shared there, or nothing with this fingerprint.
        RemoteError: The place can't be reached or refuses.
        FormatVersionError: It was pushed by the previous form of sharing.
        ConfigError: Not a URL.
    """
    remote = Remote(url, storage_options)
    found = shared_fingerprints(remote, fingerprint)
    return RemoteReport(remote.place, [_look_at(remote, one, progress) for one in found])


def _look_at(remote: Remote, fingerprint: str, progress: Progress | None) -> SharedStoreReport:
    state = read_state(remote, fingerprint, LocalFolder(None))
    listed = remote.list_files(f"{fingerprint}/shards")
    sizes = {match[1]: n for name, n in listed.items() if (match := _SHARD_NAME.fullmatch(name))}
    report = SharedStoreReport(
        fingerprint,
        num_manifests=len(state.manifests),
        num_bytes=sum(sizes.values()),
        problems=dict(sorted(state.problems.items())),
    )
    offers: dict[str, list[Offer]] = {digest: [] for digest in sizes}
    for offer in state.offers():
        offers.setdefault(offer.entry.sha256, []).append(offer)

    def look(digest: str) -> list[str]:
        """Compare a shard with its digest and its manifests; return the samples that count."""
        check_shard(remote, fingerprint, digest, sizes.get(digest, 0))
        headers = [(one, read_header(remote, one, LocalFolder(None))) for one in offers[digest]]
        return [header.sample_ids[row] for one, header in headers for row in one.rows(header)]

    done = 0
    sample_ids: set[str] = set()
    for digest, looked in in_parallel(look, offers):
        try:
            sample_ids.update(looked.result())
            report.num_shards += bool(offers[digest])
            report.num_unlisted += not offers[digest]
        except (RemoteError, IntegrityError) as error:
            report.problems[f"shards/{digest}.safetensors"] = str(error)
        done += sizes.get(digest, 0)
        if progress is not None:
            progress(done, report.num_bytes)
    report.num_samples = len(sample_ids)
    return report


def check_shard(remote: Remote, fingerprint: str, digest: str, num_bytes: int) -> None:
    """Compare a shard with the digest in its name, piece by piece.

    Raises:
        IntegrityError: It is damaged, missing, or larger than any shard.
        RemoteError: It can't be read.
    """
    path = f"shards/{digest}.safetensors"
    if not 0 < num_bytes <= MAX_SHARD_FILE_BYTES:
        what = f"has {num_bytes} bytes; no shard has so many" if num_bytes else "isn't there"
        raise IntegrityError(f"{path} {what}")
    received = hashlib.sha256()
    for piece in remote.pieces(f"{fingerprint}/{path}", 0, num_bytes):
        received.update(piece)
    if received.hexdigest() != digest:
        raise IntegrityError(f"{path} is damaged: its bytes don't have its digest")

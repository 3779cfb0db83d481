"""Verify: whether everything that is shared is as it was written, and what to do if it isn't."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from lmdbcache.cache import EmbeddingCache
from lmdbcache.errors import CacheNotFoundError
from lmdbcache.exchange.sharing.commits import checked_writer
from lmdbcache.exchange.sharing.copies import CommitCopies
from lmdbcache.exchange.sharing.inspecting import Inspection
from lmdbcache.exchange.sharing.pushing import default_writer
from lmdbcache.exchange.sharing.remote import Remote
from lmdbcache.exchange.sharing.remote_repair import Repair
from lmdbcache.exchange.sharing.remote_report import RemoteReport

__all__ = ["verify_remote"]

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{16}")


def verify_remote(
    url: str,
    fingerprint: str | None = None,
    *,
    repair_from: EmbeddingCache | None = None,
    known_to: EmbeddingCache | None = None,
    writer: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RemoteReport:
    """Compare every commit file and shard with its digest, and repair what is damaged if asked to.

    A repair writes the very same bytes again where a local store, or what is sound of a damaged
    shard, has all of its embeddings. Else it keeps what there is in a new shard, takes the damaged
    one back, and names the samples that nobody here has.

    Args:
        url: The place.
        fingerprint: Of the store to look at, or its first digits; None takes all.
        repair_from: Repair, with what this cache has.
        known_to: A cache that has pushed to or pulled from there: its copies tell of commits that
            have vanished since; default: `repair_from`.
        writer: Name for commits that a repair makes; default: this host's.
        storage_options: For fsspec; default: its configuration and the environment.
        progress: Called with the bytes read and those of the shards, for each store.

    Raises:
        CacheNotFoundError: Nothing is shared there, or nothing with this fingerprint.
        RemoteError: The place can't be reached or refuses.
        ConfigError: Not a URL, or no name for a writer.
    """
    remote = Remote(url, storage_options)
    report = RemoteReport(remote.place)
    name = default_writer() if writer is None else checked_writer(writer)
    cache = repair_from or known_to
    for one in _fingerprints(remote, fingerprint):
        inspection = Inspection(remote, one, CommitCopies(_folder(cache, one), remote.url))
        inspection.run(progress)
        if repair_from is not None:
            Repair(inspection, repair_from, name).run()
        report.stores.append(inspection.report)
    return report


def _fingerprints(remote: Remote, asked: str | None) -> list[str]:
    there = [name for name in remote.list_folders() if _FINGERPRINT.fullmatch(name)]
    found = [name for name in there if name.startswith((asked or "").strip().lower())]
    if not found:
        others = f"; there are {', '.join(there)}" if there else ": nothing is"
        what = f"{asked!r} isn't shared" if asked else "no store is shared"
        raise CacheNotFoundError(f"{what} at {remote.place}{others if asked else ''}")
    return found


def _folder(cache: EmbeddingCache | None, fingerprint: str) -> Path | None:
    if cache is None:
        return None
    return next((one for one in cache.folders() if one.name.endswith(f"-{fingerprint}")), None)

"""Which stores are shared at a place."""

from __future__ import annotations

import contextlib
import re
from typing import Final

from lmdbcache.cache import EmbeddingCache
from lmdbcache.errors import CacheNotFoundError, IntegrityError, RemoteError
from lmdbcache.exchange.sharing.commits import (
    COMMIT_NAME,
    COMMITS_NAME,
    Commit,
    commit_path,
    decode_commit,
)
from lmdbcache.exchange.sharing.copies import CommitCopies
from lmdbcache.exchange.sharing.history import History
from lmdbcache.exchange.sharing.remote import Remote

__all__ = [
    "copies_of",
    "find_fingerprint",
    "first_commit",
    "pinned_state",
    "shared_fingerprints",
]

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{16}")
_FEW: Final = 10


def shared_fingerprints(remote: Remote) -> list[str]:
    """The stores that are shared at a place.

    Raises:
        RemoteError: The place can't be reached.
    """
    return sorted(name for name in remote.list_folders() if _FINGERPRINT.fullmatch(name))


def find_fingerprint(remote: Remote, text: str | None) -> str:
    """The one fingerprint at a place that a text is, or begins; without a text the only one.

    Raises:
        CacheNotFoundError: None, or several; names what is there.
        RemoteError: The place can't be reached.
    """
    there = shared_fingerprints(remote)
    asked = (text or "").strip().lower()
    found = [name for name in there if name.startswith(asked)]
    if len(found) > 1:
        # A first push that hasn't ended leaves a folder in which nothing is shared yet.
        found = [name for name in found if _commit_sizes(remote, name)] or found
    if len(found) == 1:
        return found[0]
    where = remote.place
    if not there:
        raise CacheNotFoundError(
            f"nothing is shared at {where}; is the URL right? `lmdbcache push` puts a store there"
        )
    if not found:
        raise CacheNotFoundError(
            f"{text!r} isn't shared at {where}; there: {_described(remote, there)}"
        )
    what = f"{text!r} stands for {len(found)} stores" if text else f"{len(found)} stores are shared"
    raise CacheNotFoundError(
        f"{what} at {where}: {_described(remote, found)}. Give the fingerprint of one, or --all"
    )


def first_commit(remote: Remote, fingerprint: str, copies: CommitCopies | None = None) -> Commit:
    """A commit that there is a copy of, or the smallest that can be read: config and shape.

    Raises:
        CacheNotFoundError: There is none.
        IntegrityError: None can be read.
        RemoteError: The place can't be reached.
    """
    ids = _commit_sizes(remote, fingerprint)
    where = f"{remote.place}/{fingerprint}"
    if not ids:
        raise CacheNotFoundError(f"{where} holds no commit: nothing was pushed, or it isn't done")
    copies = copies or CommitCopies(None, remote.url)
    for _, commit_id in sorted(ids):
        if copy := copies.get(commit_id):
            with contextlib.suppress(IntegrityError):
                return decode_commit(commit_id, copy, fingerprint)
    why = ""
    for size, commit_id in sorted(ids):
        try:
            data = remote.read(f"{fingerprint}/{commit_path(commit_id)}", size)
            return decode_commit(commit_id, data, fingerprint)
        except (IntegrityError, RemoteError) as error:
            why = str(error)
    raise IntegrityError(
        f"{where}: none of {len(ids)} commits can be read ({why}). Run `lmdbcache verify "
        f"{remote.place} --repair` where the embeddings are"
    )


def copies_of(cache: EmbeddingCache, fingerprint: str, url: str) -> CommitCopies:
    """The copies of a place's commit files that lie beside the store of this fingerprint."""
    folders = [one for one in cache.folders() if one.name.endswith(f"-{fingerprint}")]
    return CommitCopies(folders[0] if folders else None, url)


def pinned_state(
    cache: EmbeddingCache, url: str, fingerprint: str | None, commit: str | None
) -> History | None:
    """The state that a whole commit id pins, if copies of all its commits are here.

    It can't have changed: nobody has to be asked.
    """
    if not commit or not fingerprint or not _FINGERPRINT.fullmatch(fingerprint):
        return None
    copies, found, ahead = copies_of(cache, fingerprint, url), {}, [commit]
    while ahead:
        commit_id = ahead.pop()
        if commit_id in found:
            continue
        data = copies.get(commit_id) if COMMIT_NAME.fullmatch(f"{commit_id}.json") else None
        if data is None:
            return None
        try:
            found[commit_id] = decode_commit(commit_id, data, fingerprint)
        except IntegrityError:
            return None
        ahead += found[commit_id].parents
    return History(fingerprint, found, {})


def _commit_sizes(remote: Remote, fingerprint: str) -> list[tuple[int, str]]:
    """(bytes, id) of each commit that is there."""
    listed = remote.list_files(f"{fingerprint}/{COMMITS_NAME}")
    found = [(size, COMMIT_NAME.fullmatch(name)) for name, size in listed.items()]
    return [(size, match[1]) for size, match in found if match]


def _described(remote: Remote, fingerprints: list[str]) -> str:
    named = []
    for fingerprint in fingerprints[:_FEW]:
        try:
            named.append(f"{fingerprint} ({first_commit(remote, fingerprint).config.slug})")
        except (CacheNotFoundError, IntegrityError, RemoteError):
            named.append(fingerprint)
    more = len(fingerprints) - _FEW
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")

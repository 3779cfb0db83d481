"""The history that the commits of one fingerprint make, and what of it counts.

What a commit takes back concerns its ancestors alone, so two writers who don't know of each other
can't undo each other's work, and the order in which files arrive doesn't matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from lmdbcache.config import CacheConfig
from lmdbcache.errors import ConfigError, FormatVersionError, IntegrityError, RemoteError
from lmdbcache.exchange.sharing.commits import (
    COMMIT_NAME,
    COMMITS_NAME,
    Commit,
    commit_path,
    decode_commit,
)
from lmdbcache.exchange.sharing.copies import CommitCopies
from lmdbcache.exchange.sharing.remote import Remote
from lmdbcache.exchange.sharing.shards import ShardEntry

__all__ = ["History", "Offer", "SharedChecksums", "read_history"]

_MAX_COMMIT_BYTES: Final = 256 << 20


class Offer(NamedTuple):
    """A shard that counts, and what of it does.

    Args:
        commit: The first that lists it.
        entry: The shard.
        rows: Positions in the shard of the samples that weren't replaced since.
    """

    commit: Commit
    entry: ShardEntry
    rows: Sequence[int]


class History:
    """The commits of one fingerprint that could be read.

    Args:
        fingerprint: Of the config.
        commits: By id.
        problems: Commit files that are damaged, missing or foreign: path → what is wrong.
        unread: Paths of those of them that may be sound: of a newer release, or refused.
    """

    def __init__(
        self,
        fingerprint: str,
        commits: Mapping[str, Commit],
        problems: Mapping[str, str],
        unread: Iterable[str] = (),
    ) -> None:
        self.fingerprint = fingerprint
        self.commits = dict(commits)
        self.problems = dict(problems)
        self.unread = frozenset(unread)
        self._ordered: list[Commit] | None = None

    @property
    def config(self) -> CacheConfig | None:
        """Of all commits; None if there is none."""
        return next((commit.config for commit in self.commits.values()), None)

    @property
    def heads(self) -> tuple[str, ...]:
        """The ids that no other commit has as a parent, sorted."""
        inner = {parent for commit in self.commits.values() for parent in commit.parents}
        return tuple(sorted(self.commits.keys() - inner))

    def find(self, text: str) -> Commit:
        """The one commit that an id, its digest, or the beginning of one of the two stands for.

        Raises:
            ConfigError: None, or several.
        """
        asked = text.strip().removesuffix(".json")
        found = [
            commit
            for commit in self.commits.values()
            if asked and (commit.id.startswith(asked) or commit.id[-64:].startswith(asked))
        ]
        if len(found) != 1:
            which = f"stands for {len(found)} commits" if found else "isn't a commit"
            raise ConfigError(
                f"commit {text!r} {which} of {self.fingerprint}; there are "
                f"{len(self.commits)}: {_few(sorted(self.commits))}"
            )
        return found[0]

    def at(self, text: str) -> History:
        """The state that a commit pins: itself and all its ancestors.

        Raises:
            ConfigError: See `find`.
        """
        commit = self.find(text)
        ids = self.ancestors(commit.id) | {commit.id}
        closure = {id_: self.commits[id_] for id_ in ids if id_ in self.commits}
        gone = _withdrawn(closure.values())
        absent = {commit_path(one) for one in ids - closure.keys() if one[-64:] not in gone}
        known = {path: why for path, why in self.problems.items() if path in absent}
        problems = {path: known.get(path, "isn't there") for path in absent}
        return History(self.fingerprint, closure, problems)

    def ancestors(self, commit_id: str) -> set[str]:
        """Ids of the parents and theirs, those that can't be read included."""
        found: set[str] = set()
        ahead = list(self.commits[commit_id].parents)
        while ahead:
            parent = ahead.pop()
            if parent not in found:
                found.add(parent)
                ahead += self.commits[parent].parents if parent in self.commits else ()
        return found

    def ordered(self) -> list[Commit]:
        """Parents before children; else by id, so that every machine has one order."""
        if self._ordered is None:
            self._ordered = _parents_first(self.commits)
        return self._ordered

    def offers(self) -> list[Offer]:
        """Every shard that counts, once, in the order of `ordered`."""
        gone = _Withdrawals(self)
        found: dict[str, Offer] = {}
        for commit in self.ordered():
            for entry in commit.shards:
                rows = gone.rows_left(commit, entry)
                there = found.get(entry.sha256)
                if there is None and rows:
                    found[entry.sha256] = Offer(commit, entry, rows)
                elif there is not None and len(there.rows) < len(rows):
                    # Replaced as the one listed it, and not as the other did.
                    both = sorted({*there.rows, *rows})
                    found[entry.sha256] = there._replace(rows=both)
        return list(found.values())

    def checksums(self) -> SharedChecksums:
        """The checksums of what is shared, by sample id."""
        return SharedChecksums(self.offers())


class SharedChecksums:
    """The checksums of what is shared, by sample id; most samples have one."""

    def __init__(self, offers: Iterable[Offer]) -> None:
        self._first: dict[str, bytes] = {}
        self._others: dict[str, set[bytes]] = {}
        for _, entry, rows in offers:
            for row in rows:
                sample_id, found = entry.sample_ids[row], entry.checksums[row]
                if self._first.setdefault(sample_id, found) != found:
                    self._others.setdefault(sample_id, set()).add(found)

    def __len__(self) -> int:
        return len(self._first)

    def of(self, sample_id: str) -> set[bytes]:
        """The checksums shared for this sample; several mean a conflict."""
        first = self._first.get(sample_id)
        return set() if first is None else {first, *self._others.get(sample_id, ())}


class _Withdrawals:
    """What commits have taken back of what their ancestors listed."""

    def __init__(self, history: History) -> None:
        self._by_commit = [
            (history.ancestors(commit.id), frozenset(commit.withdrawn), commit.replaced)
            for commit in history.commits.values()
            if commit.withdrawn or commit.replaced
        ]

    def rows_left(self, commit: Commit, entry: ShardEntry) -> Sequence[int]:
        later = [(gone, old) for ids, gone, old in self._by_commit if commit.id in ids]
        if any(entry.sha256 in gone for gone, _ in later):
            return ()
        rows: Sequence[int] = range(len(entry.sample_ids))
        for _, old in later:
            if old:
                rows = [
                    row
                    for row in rows
                    if entry.checksums[row] not in old.get(entry.sample_ids[row], ())
                ]
        return rows


def read_history(
    remote: Remote,
    fingerprint: str,
    copies: CommitCopies | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> History:
    """Read the commits of one fingerprint: one LIST, and a GET for each that there is no copy of.

    Args:
        remote: The place.
        fingerprint: Of the config.
        copies: Where commit files are kept that were read before.
        progress: Called with the number of commits read and in all.

    Raises:
        RemoteError: The place can't be reached. A single file that can't be read is a problem of
            the history.
    """
    copies = CommitCopies(None) if copies is None else copies
    listed = remote.list_files(f"{fingerprint}/{COMMITS_NAME}")
    ids = sorted(match[1] for name in listed if (match := COMMIT_NAME.fullmatch(name)))
    commits: dict[str, Commit] = {}
    problems: dict[str, str] = {}
    unread = []
    for done, commit_id in enumerate(ids, 1):
        try:
            commits[commit_id] = _read_commit(
                remote, fingerprint, commit_id, listed[f"{commit_id}.json"], copies
            )
        except (RemoteError, IntegrityError) as error:
            if isinstance(error, RemoteError):
                # Where nobody answers any more, all others would be tried in vain.
                remote.list_files(f"{fingerprint}/{COMMITS_NAME}")
            problems[commit_path(commit_id)] = str(error)
            if isinstance(error, (RemoteError, FormatVersionError)):
                unread.append(commit_path(commit_id))
        if progress is not None:
            progress(done, len(ids))
    gone = _withdrawn(commits.values())
    for commit in commits.values():
        for parent in commit.parents:
            if parent not in commits and parent[-64:] not in gone:
                problems.setdefault(
                    commit_path(parent), f"isn't there, and {commit.id} builds on it"
                )
    return History(fingerprint, commits, problems, unread)


def _withdrawn(commits: Iterable[Commit]) -> set[str]:
    return {digest for commit in commits for digest in commit.withdrawn}


def _read_commit(
    remote: Remote, fingerprint: str, commit_id: str, num_bytes: int, copies: CommitCopies
) -> Commit:
    copy = copies.get(commit_id)
    # Another length is damage that a LIST shows.
    if copy is not None and len(copy) == num_bytes:
        return decode_commit(commit_id, copy, fingerprint)
    if num_bytes > _MAX_COMMIT_BYTES:
        raise IntegrityError(
            f"{commit_path(commit_id)} has {num_bytes} bytes, too many for a commit"
        )
    path = f"{fingerprint}/{commit_path(commit_id)}"
    data = remote.read(path, num_bytes)
    try:
        commit = decode_commit(commit_id, data, fingerprint)
    except IntegrityError:  # on the way, or where it comes from: one look more
        data = remote.read(path, num_bytes)
        commit = decode_commit(commit_id, data, fingerprint)
    copies.keep(commit_id, data)
    return commit


def _parents_first(commits: Mapping[str, Commit]) -> list[Commit]:
    waiting = {
        commit.id: len([parent for parent in commit.parents if parent in commits])
        for commit in commits.values()
    }
    children: dict[str, list[str]] = {}
    for commit in commits.values():
        for parent in commit.parents:
            children.setdefault(parent, []).append(commit.id)
    found: list[Commit] = []
    ready = sorted([one for one, number in waiting.items() if number == 0], reverse=True)
    while ready:
        found.append(commits[ready.pop()])
        freed = []
        for child in children.get(found[-1].id, ()):
            waiting[child] -= 1
            freed += [child] if waiting[child] == 0 else []
        if freed:
            ready = sorted([*ready, *freed], reverse=True)
    return found


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")

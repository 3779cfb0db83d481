"""A look at every file that is shared of one store."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Final

from lmdbcache.errors import FormatVersionError, IntegrityError, RemoteError
from lmdbcache.exchange.sharing.commits import COMMIT_NAME, COMMITS_NAME, commit_path, decode_commit
from lmdbcache.exchange.sharing.copies import CommitCopies
from lmdbcache.exchange.sharing.history import History, Offer, read_history
from lmdbcache.exchange.sharing.remote import Remote
from lmdbcache.exchange.sharing.remote_report import Finding, SharedStoreReport, State
from lmdbcache.exchange.sharing.shards import SHARD_NAME, SHARDS_NAME, check_content, decode_shard

__all__ = ["MOST_IN_MEMORY", "Inspection", "download_shard"]

# No shard of ours comes near; of a stranger's that does, only the digest is looked at.
MOST_IN_MEMORY: Final = 1 << 30


class Inspection:
    """What is shared of one store, file by file.

    Args:
        remote: The place.
        fingerprint: Of the store.
        copies: Commits that were there when this machine last looked.

    `run` fills in the rest:

        history: The commits that can be read.
        listed: Name → bytes of the shards that are there.
        offers: Digest → the shard, of all that a commit lists and none took back.
        bad: Digests of those of them that are missing or damaged.
        unlisted: Digests of other files that are as their name says.
        bad_unlisted: Digests of others that aren't.
    """

    def __init__(self, remote: Remote, fingerprint: str, copies: CommitCopies) -> None:
        self.remote, self.fingerprint, self.copies = remote, fingerprint, copies
        self.report = SharedStoreReport(fingerprint)
        self.listed: dict[str, int] = {}
        self.offers: dict[str, Offer] = {}
        self.bad: list[str] = []
        self.unlisted: list[str] = []
        self.bad_unlisted: list[str] = []
        self.history = History(fingerprint, {}, {})

    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every file.

        Raises:
            RemoteError: The place can't be reached.
        """
        self.read_commits()
        found = self.remote.list_files(f"{self.fingerprint}/{SHARDS_NAME}")
        self.listed = {name: size for name, size in found.items() if SHARD_NAME.fullmatch(name)}
        report = self.report
        report.num_bytes = sum(self.listed.values())
        report.num_samples = len(self.history.checksums())
        report.leftovers = [
            f"{folder}/{name}"
            for folder in (SHARDS_NAME, COMMITS_NAME)
            for name in self.remote.leftovers(f"{self.fingerprint}/{folder}")
        ]
        self.offers = _all_offers(self.history)
        done = 0
        there = {match[1] for name in self.listed if (match := SHARD_NAME.fullmatch(name))}
        for digest in [*self.offers, *sorted(there - self.offers.keys())]:
            self._look_at(digest)
            done += self.listed.get(f"{digest}.safetensors", 0)
            if progress is not None:
                progress(done, report.num_bytes)

    def read_commits(self) -> None:
        """Read the commit files anew, each from the place."""
        self.history = read_history(self.remote, self.fingerprint)
        there = self.remote.list_files(f"{self.fingerprint}/{COMMITS_NAME}")
        for path, why in self.history.problems.items():
            is_there = path.rpartition("/")[2] in there
            state: State = "damaged" if is_there else "missing"
            state = "unreadable" if path in self.history.unread else state
            reason = why.removeprefix(f"{path} is damaged: ").removeprefix(f"{path} ")
            self.report.findings.append(Finding(path, state, reason))
        noted = {found.path for found in self.report.findings}
        for commit_id in self.copies.ids():
            path = commit_path(commit_id)
            if (
                f"{commit_id}.json" not in there
                and path not in noted
                and self._tells_more(commit_id)
            ):
                why = "isn't there any more; this machine has a copy"
                self.report.findings.append(Finding(path, "missing", why))
        self.report.num_commits = len(self.history.commits)

    def _tells_more(self, commit_id: str) -> bool:
        """Whether a copy of a commit lists what no commit lists that is there."""
        data = self.copies.get(commit_id)
        try:
            commit = None if data is None else decode_commit(commit_id, data, self.fingerprint)
        except IntegrityError:
            commit = None
        if commit is None:
            return False
        shared = self.history.checksums()
        commits = self.history.commits.values()
        gone = {digest for one in commits for digest in one.withdrawn}
        return any(
            expected not in shared.of(sample_id)
            and not any(expected in one.replaced.get(sample_id, ()) for one in commits)
            for entry in commit.shards
            if entry.sha256 not in gone
            for sample_id, expected in zip(entry.sample_ids, entry.checksums, strict=True)
        )

    def lost_commits(self) -> list[str]:
        """Ids of the commits that are damaged or missing."""
        bad = [found for found in self.report.findings if found.state != "unreadable"]
        names = [found.path.rpartition("/")[2] for found in bad]
        return [match[1] for name in names if (match := COMMIT_NAME.fullmatch(name))]

    def _look_at(self, digest: str) -> None:
        name = f"{digest}.safetensors"
        offer, size = self.offers.get(digest), self.listed.get(name)
        path = f"{SHARDS_NAME}/{name}"
        try:
            if size is None:
                self.report.findings.append(Finding(path, "missing", "isn't there"))
                self.bad.append(digest)
                return
            _check_shard(self.remote, self.fingerprint, digest, size, offer)
        except (RemoteError, FormatVersionError) as error:
            self.report.findings.append(Finding(path, "unreadable", str(error)))
        except IntegrityError as error:
            self.report.findings.append(Finding(path, "damaged", str(error)))
            (self.bad if offer else self.bad_unlisted).append(digest)
        else:
            if offer is not None:
                self.report.num_shards += 1
            else:
                self.unlisted.append(digest)
                self.report.num_unlisted += 1


def download_shard(remote: Remote, fingerprint: str, digest: str, num_bytes: int) -> bytes:
    """A shard's bytes, whatever they are.

    Raises:
        RemoteError: It can't be read.
        IntegrityError: Larger than any shard.
    """
    if num_bytes > MOST_IN_MEMORY:
        raise IntegrityError(f"{num_bytes} bytes, too many for a shard")
    received = io.BytesIO()
    remote.fetch(f"{fingerprint}/{SHARDS_NAME}/{digest}.safetensors", received, num_bytes)
    return received.getvalue()


def _check_shard(
    remote: Remote, fingerprint: str, digest: str, num_bytes: int, offer: Offer | None
) -> None:
    if offer is not None and num_bytes != offer.entry.num_bytes:
        raise IntegrityError(f"{num_bytes} of {offer.entry.num_bytes} bytes")
    data = download_shard(remote, fingerprint, digest, num_bytes)
    if hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError("its bytes don't have the digest in its name")
    if offer is not None:  # a file that nobody lists may be whatever it likes
        content = decode_shard(data, f"{digest}.safetensors")
        check_content(content, offer.entry, offer.commit.config)


def _all_offers(history: History) -> dict[str, Offer]:
    """Every shard that a commit lists, with the rows that count; without those taken back."""
    counting = {offer.entry.sha256: offer for offer in history.offers()}
    withdrawn = {digest for commit in history.commits.values() for digest in commit.withdrawn}
    found: dict[str, Offer] = {}
    for commit in history.ordered():
        for entry in commit.shards:
            if entry.sha256 in counting:
                found[entry.sha256] = counting[entry.sha256]
            elif entry.sha256 not in withdrawn:
                found.setdefault(entry.sha256, Offer(commit, entry, ()))
    return found

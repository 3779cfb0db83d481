"""`pull`: what others have shared comes into a store, shard by shard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lmdbcache.cache import DEFAULT_TOLERANCE, EmbeddingCache, Origin
from lmdbcache.config import CacheConfig
from lmdbcache.errors import IntegrityError, ProvenanceMismatchError, RemoteError
from lmdbcache.exchange.intake import Intake, Refusal
from lmdbcache.exchange.sharing.commits import Commit
from lmdbcache.exchange.sharing.copies import CommitCopies
from lmdbcache.exchange.sharing.downloads import Downloads
from lmdbcache.exchange.sharing.history import History, read_history
from lmdbcache.exchange.sharing.partial import Span, fetch_rows, spans_of
from lmdbcache.exchange.sharing.places import (
    copies_of,
    find_fingerprint,
    first_commit,
    pinned_state,
)
from lmdbcache.exchange.sharing.pull_report import Problem, PullReport
from lmdbcache.exchange.sharing.remote import Remote
from lmdbcache.exchange.sharing.settled import Settled
from lmdbcache.exchange.sharing.shards import ShardEntry, check_content, decode_shard
from lmdbcache.exchange.sharing.wanted import Plan, Selection, Wanted, alternatives, make_plan
from lmdbcache.storage import (
    RESERVE_BYTES,
    OnDuplicate,
    check_room,
    portable,
    sample_id_of_key,
    stored_checksums,
)

__all__ = ["pull"]

_SETTLED_NAME: Final = "compared"
_TRANSACTION_BYTES: Final = 256 << 20  # shards are smaller, unless somebody wanted them larger
_PAGE: Final = 4096
Bytes = Callable[[int, int], None]


def pull(
    cache: EmbeddingCache | str | Path,
    url: str,
    fingerprint: str | CacheConfig | None = None,
    *,
    commit: str | None = None,
    on_duplicate: OnDuplicate = "error",
    tolerance: float = DEFAULT_TOLERANCE,
    classes: Iterable[str] | None = None,
    sample_ids: Iterable[str] | None = None,
    dry_run: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Bytes | None = None,
) -> PullReport:
    """Bring embeddings that were pushed to a place into a store.

    Only shards that hold something that is missing here are fetched. Each is checked by its digest
    and imported in one transaction. Stopped or cut at any moment, the same call goes on where it
    was.

    Args:
        cache: The cache, or its root.
        url: Where they were pushed to: `s3://bucket/folder`, `file:///mnt/shared`, …
        fingerprint: Of the config, or its first digits, or the config; None takes the only one
            that is there.
        commit: The state to pull: the id of a commit, or the beginning of the id or of its digest;
            None takes all that is there now.
        on_duplicate: `"error"` leaves a stored embedding that is further from the shared one than
            the tolerance as it is and lists both; `"skip"` keeps it, `"overwrite"` takes the
            shared one.
        tolerance: Largest difference of two elements that counts as none.
        classes: Only samples of these classes.
        sample_ids: Only these samples.
        dry_run: Only tell what would be fetched.
        storage_options: For the fsspec file system; default: fsspec's configuration and the
            environment.
        progress: Called with the bytes fetched and in all.

    Returns:
        What came into the store, and what didn't.

    Raises:
        CacheNotFoundError: Nothing of this fingerprint is there; names what is.
        ConfigError: Not a URL, no such commit or class, or a commit id that stands for several.
        RemoteError: The place can't be reached or refuses.
        CacheFullError: The disk is full; what was imported stays.
        ReadOnlyCacheError: The cache directory can't be written.
        MissingDependencyError: A package is needed for this kind of place.
    """
    cache = cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache)
    selection = Selection(classes, sample_ids)
    remote = Remote(url, storage_options)
    asked = fingerprint.fingerprint if isinstance(fingerprint, CacheConfig) else fingerprint
    pinned = pinned_state(cache, remote.url, asked, commit)
    if pinned is not None:
        first = pinned.find(commit or "")
    else:
        named = find_fingerprint(remote, asked)
        first = first_commit(remote, named, copies_of(cache, named, remote.url))
    intake = Intake(
        cache,
        first.config,
        tolerance=tolerance,
        on_duplicate=on_duplicate,
        ragged=None in first.embedding_shape,
        dry_run=dry_run,
    )
    run = _Pull(remote, cache, intake, pinned, progress)
    if dry_run:
        run.look(selection, commit)
        return run.report
    with run.downloads.held():
        plan = run.look(selection, commit)
        run.check_room(plan)
        run.bring_in(plan)
        run.downloads.tidy()
    return run.report


class _Pull:
    """One pull on its way."""

    def __init__(
        self,
        remote: Remote,
        cache: EmbeddingCache,
        intake: Intake,
        pinned: History | None,
        progress: Bytes | None,
    ) -> None:
        self._remote = remote
        self._cache = cache
        self._intake = intake
        self._progress = progress
        merged = intake.report
        self._config = merged.config
        self._fingerprint = self._config.fingerprint
        self._pinned = pinned
        self._all_history: History | None = None
        self._there: dict[str, int] = {}
        self._stored: dict[str, bytes] = {}
        self._new: set[str] = set()
        self._close: set[str] = set()
        self._not_taken: set[str] = set()  # of refused weights
        self._refused_weights: set[str] = set()
        self._spans_of_shard: dict[str, list[Span]] = {}
        # Of the files that are dealt with, of the one at hand, of all.
        self._bytes_before = self._bytes_of_this = self._bytes_in_all = 0
        self.report = PullReport(merged.path, self._config, remote.place, merged.is_dry_run, merged)
        self.downloads = Downloads(merged.path)
        self._settled = Settled(
            self.downloads.folder / _SETTLED_NAME,
            merged.tolerance,
            keeps_ours=merged.on_duplicate == "skip",
        )

    def look(self, selection: Selection, commit: str | None) -> Plan:
        """Read what is shared and what is stored, and see what is missing."""
        report = self.report
        history = self._pinned or self._everything()
        if commit is not None:
            report.commit = history.find(commit).id
            history = history.at(report.commit)
        report.heads = history.heads
        report.problems += [Problem(*pair) for pair in sorted(history.problems.items())]
        self._stored = self._checksums()
        plan = make_plan(
            history,
            self._stored,
            selection,
            self._settled,
            newest_wins=report.merged.on_duplicate == "overwrite",
        )
        report.num_samples, report.num_present = plan.num_samples, plan.num_present
        report.num_settled, report.absent = plan.num_settled, plan.absent
        report.num_shards = len(plan.shards)
        self._bytes_in_all = sum(map(self._size, plan.shards))
        here = sum(self.downloads.bytes_there(wanted.offer.entry) for wanted in plan.shards)
        report.bytes_to_fetch = self._bytes_in_all - here
        return plan

    def check_room(self, plan: Plan) -> None:
        """Refuse what the disk can't hold.

        Raises:
            CacheFullError: It can't hold the embeddings and, for a moment, the largest shard.
        """
        if not plan.shards:
            return
        self._there = self._listed()
        # A shard that isn't there as its commit says is no reason to refuse all others.
        coming = [one for one in plan.shards if _is_listed(one.offer.entry, self._there)]
        stored = 0.0
        for _, entry, rows in [(*wanted.offer[:2], wanted.rows) for wanted in coming]:
            size = entry.num_bytes / len(entry.sample_ids)
            # A value of more than half a page gets pages of its own.
            stored += len(rows) * (math.ceil(size / _PAGE) * _PAGE if size > _PAGE / 2 else size)
        entries = [wanted.offer.entry for wanted in coming]
        beside = max(
            (entry.num_bytes - self.downloads.bytes_there(entry) for entry in entries),
            default=0,
        )
        check_room(self.report.path, int(stored) + beside + RESERVE_BYTES, "this pull")

    def bring_in(self, plan: Plan) -> None:
        """Fetch, check and import shard after shard."""
        queue, tried = list(plan.shards), set[str]()
        failed: list[tuple[Wanted, str]] = []
        lost: set[tuple[str, bytes]] = set()
        while queue:
            missed: set[tuple[str, bytes]] = set()
            for wanted in queue:
                entry = wanted.offer.entry
                tried.add(entry.sha256)
                try:
                    _check_listed(entry, self._there)
                    self._import(wanted)
                except (IntegrityError, RemoteError) as error:
                    if isinstance(error, RemoteError):
                        # What concerns this shard alone, or else all others would fail, too.
                        self._listed()
                    failed.append((wanted, str(error)))
                    missed.update(wanted.versions)
                self._bytes_before += self._size(wanted)
            # Of all that is shared, not of the state alone: a repair comes after what it repairs.
            if not missed:
                break
            queue, missed = alternatives(self._everything(), missed, tried)
            lost |= missed
            self._bytes_in_all += sum(map(self._size, queue))
        for wanted, reason in failed:
            is_made_up_for = lost.isdisjoint(wanted.versions)
            listed = self.report.made_up_for if is_made_up_for else self.report.problems
            listed.append(Problem(wanted.offer.entry.path, reason))
        self.report.lost = sorted({sample_id for sample_id, _ in lost})
        self._count_samples(plan)

    def _count_samples(self, plan: Plan) -> None:
        """Each sample once, by the most that there is to say of it."""
        merged = self.report.merged
        refused = {one.sample_id for one in merged.refused if one.sample_id is not None}
        self.report.count(
            {
                "conflict": {one.sample_id for one in merged.conflicts},
                "refused": refused | self._not_taken,
                "lost": set(self.report.lost),
                "new": self._new,
                "close": self._close,
                "settled": plan.settled,
                "same": plan.present,
            }
        )

    def _everything(self) -> History:
        """All that is shared, read once."""
        if self._all_history is None:
            copies = CommitCopies(self.report.path, self._remote.url)
            self._all_history = read_history(self._remote, self._fingerprint, copies)
        return self._all_history

    def _listed(self) -> dict[str, int]:
        return self._remote.list_files(f"{self._fingerprint}/shards")

    def _import(self, wanted: Wanted) -> None:
        commit, entry, _ = wanted.offer
        weights = commit.provenance.get("weights_digest", "")
        if weights in self._refused_weights:
            self._not_taken.update(sample_id for sample_id, _ in wanted.versions)
            return
        self._bytes_of_this = 0
        self._count(self.downloads.bytes_there(entry))
        embeddings = self._embeddings(wanted)
        try:
            self._add(wanted, embeddings)
        except ProvenanceMismatchError as error:
            self._refused_weights.add(weights)
            self._not_taken.update(sample_id for sample_id, _ in wanted.versions)
            self._intake.report.refused.append(Refusal(commit.writer, None, str(error)))
        self.downloads.discard(entry)

    def _embeddings(self, wanted: Wanted) -> Any:
        """The embeddings by row: of the whole shard, or of the rows that are wanted."""
        entry = wanted.offer.entry
        if spans := self._spans(wanted):
            try:
                return fetch_rows(self._remote, wanted, spans, self._count_fetched)
            except IntegrityError:  # on the way, or where it comes from: one look more
                return fetch_rows(self._remote, wanted, spans, self._count_fetched)
        data = self.downloads.fetch(self._remote, self._fingerprint, entry, self._count_fetched)
        content = decode_shard(data, entry.path)
        check_content(content, entry, self._config)
        return content.embeddings

    def _spans(self, wanted: Wanted) -> list[Span]:
        """What to read of a shard that little is wanted of; nothing: the shard as a whole."""
        entry = wanted.offer.entry
        if entry.sha256 not in self._spans_of_shard:
            begun = self.downloads.bytes_there(entry)
            self._spans_of_shard[entry.sha256] = [] if begun else spans_of(wanted)
        return self._spans_of_shard[entry.sha256]

    def _size(self, wanted: Wanted) -> int:
        """How many bytes are fetched of a shard, or were."""
        spans = self._spans(wanted)
        return sum(last - first for first, last in spans) or wanted.offer.entry.num_bytes

    def _add(self, wanted: Wanted, embeddings: Any) -> None:
        commit, entry, _ = wanted.offer
        origin, merged = _origin(commit, self.report.url), self._intake.report
        for rows in _in_steps(wanted.rows, entry.num_bytes // len(entry.sample_ids)):
            num_conflicts = len(merged.conflicts)
            checked = self._intake.checked(
                [entry.sample_ids[row] for row in rows],
                [embeddings[row] for row in rows],
                origin,
                checksums=[entry.checksums[row] for row in rows],
            )
            self._intake.add(checked, origin.provenance)
            conflicts = merged.conflicts[num_conflicts:]
            self._note_compared(entry, rows, {one.sample_id: one.kept for one in conflicts})

    def _note_compared(
        self, entry: ShardEntry, rows: Iterable[int], conflicts: Mapping[str, str]
    ) -> None:
        kept = []
        for row in rows:
            sample_id, theirs = entry.sample_ids[row], entry.checksums[row]
            ours = self._stored.get(sample_id)
            (self._new if ours is None else self._close).add(sample_id)
            if ours is None or conflicts.get(sample_id) == "given":
                self._stored[sample_id] = theirs
            elif ours != theirs:
                kept.append((sample_id, ours, theirs))
        self._settled.add(kept, frozenset(conflicts))

    def _checksums(self) -> dict[str, bytes]:
        if self._config not in self._cache:
            return {}
        with self._cache.reader(self._config, track_usage=False) as reader:
            return {sample_id_of_key(key): found for key, found in stored_checksums(reader)}

    def _count_fetched(self, num_bytes: int) -> None:
        self.report.bytes_fetched += max(0, num_bytes)
        self._count(num_bytes)

    def _count(self, num_bytes: int) -> None:
        self._bytes_of_this += num_bytes
        if self._progress is not None:
            self._progress(self._bytes_before + self._bytes_of_this, self._bytes_in_all)


def _is_listed(entry: ShardEntry, there: Mapping[str, int]) -> bool:
    return there.get(entry.path.rpartition("/")[2]) == entry.num_bytes


def _check_listed(entry: ShardEntry, there: Mapping[str, int]) -> None:
    found = there.get(entry.path.rpartition("/")[2])
    if found is None:
        raise IntegrityError(f"{entry.path} isn't there (any more)")
    if found != entry.num_bytes:
        raise IntegrityError(f"{entry.path} has {found} bytes instead of {entry.num_bytes}")


def _origin(commit: Commit, url: str) -> Origin:
    detail = {"url": url, "commit": commit.id, "created": commit.created}
    return Origin(commit.writer, detail, portable(commit.provenance))


def _in_steps(rows: Sequence[int], row_bytes: int) -> Iterator[Sequence[int]]:
    step = max(1, _TRANSACTION_BYTES // max(1, row_bytes))
    for first in range(0, len(rows), step):
        yield rows[first : first + step]

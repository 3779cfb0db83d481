"""`pull`: what others have shared comes into a store, shard by shard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Final, NamedTuple

import numpy as np

from lmdbcache.cache import DEFAULT_TOLERANCE, EmbeddingCache, Origin
from lmdbcache.config import CacheConfig
from lmdbcache.errors import IntegrityError, ProvenanceMismatchError, RemoteError
from lmdbcache.exchange.intake import Intake, IntakeReport, Refusal
from lmdbcache.exchange.selection import Selection
from lmdbcache.exchange.sharing.local_folder import LocalFolder
from lmdbcache.exchange.sharing.manifests import (
    FINGERPRINT,
    Manifest,
    Offer,
    SharedState,
    find_fingerprint,
    read_header,
    read_state,
)
from lmdbcache.exchange.sharing.remote import CONNECTIONS, Remote, in_parallel
from lmdbcache.exchange.sharing.shards import (
    MAX_LENGTHS_BYTES,
    Embeddings,
    ShardHeader,
    decode_lengths,
)
from lmdbcache.storage import (
    RESERVE_BYTES,
    OnDuplicate,
    Progress,
    check_room,
    checksum,
    is_first_window,
    portable,
    recording_of,
    sample_id_of_key,
)

_PAGE: Final = 4096
# So many bytes come in the time that one more request takes.
_GAP_BYTES: Final = 1 << 20
_Values = Mapping[int, Any] | Embeddings  # by position in the shard


class _Wanted(NamedTuple):
    """A shard to fetch, and the positions of the samples in it to bring in."""

    offer: Offer
    header: ShardHeader
    rows: list[int]

    @property
    def sample_ids(self) -> list[str]:
        return [self.header.sample_ids[row] for row in self.rows]

    @property
    def stored_bytes(self) -> int:
        """What their values take in a store: more than half a page takes whole pages."""
        sizes = (last - first for first, last in (self.header.bounds[row] for row in self.rows))
        return sum(-(-size // _PAGE) * _PAGE if size > _PAGE // 2 else size for size in sizes)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """What to read of the file; nothing if it may as well be fetched as a whole."""
        spans: list[tuple[int, int]] = []
        for first, last in (self.header.bounds[row] for row in self.rows):
            if spans and first - spans[-1][1] < _GAP_BYTES:
                spans[-1] = (spans[-1][0], last)
            else:
                spans.append((first, last))
        num_bytes = sum(last - first for first, last in spans)
        return spans if 2 * num_bytes <= self.header.num_bytes - len(self.header.encoded) else []


@dataclass
class PullReport(IntakeReport):
    """What came into one store; `num_same` also counts what wasn't fetched for being the same.

    Args:
        url: The place, without what is secret in it.
        manifest: The id that means the state that was pulled; None if several writers have
            pushed side by side.
        num_samples: Samples that are shared and were asked for.
        num_skipped: Of these, stored with other bytes, and not looked at (`on_duplicate="skip"`).
        num_shards: Shards that hold what is missing or differs.
        bytes_to_fetch: Of these shards, less what is here already.
        bytes_fetched: Of these, what came over the network.
        problems: Manifests and shards that can't be used: path → why.
        lost: Sample ids that only such shards have, sorted.
        absent: Sample ids that were asked for and aren't shared, sorted.
    """

    url: str = ""
    manifest: str | None = None
    num_samples: int = 0
    num_skipped: int = 0
    num_shards: int = 0
    bytes_to_fetch: int = 0
    bytes_fetched: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if all that was asked for is in the store, or was decided for what is; else 1."""
        return 1 if self.problems or self.lost or self.absent else super().exit_code

    def __str__(self) -> str:
        counts = {
            "kept as they are": self.num_skipped,
            "lost in damaged files": len(self.lost),
            "asked for and not shared": len(self.absent),
        }
        parts = [f"{number} {what}" for what, number in counts.items() if number]
        return ", ".join([super().__str__(), *parts])


def pull(
    cache: EmbeddingCache | str | Path,
    config: CacheConfig | str | None,
    url: str,
    *,
    manifest: str | None = None,
    on_duplicate: OnDuplicate = "error",
    tolerance: float = DEFAULT_TOLERANCE,
    classes: Iterable[str] | None = None,
    sample_ids: Iterable[str] | None = None,
    dry_run: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> PullReport:
    """Bring embeddings that were pushed to a place into a store.

    Only shards that hold something that is missing here are fetched, several at once. Each is
    checked by its digest and imported as a whole. Stopped or cut at any moment, the same call goes
    on where it was.

    Args:
        cache: The cache, or its root.
        config: The config, or its fingerprint, or the fingerprint's first digits; None takes the
            only store that is shared there.
        url: Where they were pushed to: `s3://bucket/folder`, `file:///mnt/shared`, …
        manifest: The state to pull: the id of a manifest, or its beginning; None takes all that is
            there now.
        on_duplicate: What happens to a sample that is stored already and whose shared value is
            further from it than the tolerance. `"error"` leaves it as it is and lists both;
            `"skip"` keeps it without a look at the shared one; `"overwrite"` takes the shared one.
        tolerance: Largest difference of two elements that counts as none.
        classes: Only samples of these classes.
        sample_ids: Only these samples.
        dry_run: Only count what would be fetched.
        storage_options: For the fsspec file system; default: fsspec's configuration and the
            environment.
        progress: Called with the bytes fetched and in all, from the threads that fetch.

    Returns:
        What came into the store, and what didn't.

    Raises:
        CacheNotFoundError: Nothing of this fingerprint is there; names what is.
        ConfigError: Not a URL, no such manifest or class, or the beginning of several ids.
        RemoteError: The place can't be reached or refuses.
        IntegrityError: Nothing that is there can be read.
        FormatVersionError: It was pushed by another release, in a form that isn't read.
        CacheFullError: The disk is full; what was imported stays.
        ReadOnlyCacheError: The cache directory can't be written.
        MissingDependencyError: A package is needed for this kind of place.
    """
    cache = cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache)
    selection = Selection(classes, sample_ids)
    remote = Remote(url, storage_options)
    asked = config.fingerprint if isinstance(config, CacheConfig) else config
    if asked is None or not FINGERPRINT.fullmatch(asked):
        asked = find_fingerprint(remote, asked)
    folders = [one for one in cache.folders() if one.name.endswith(f"-{asked}")]
    local = LocalFolder(folders[0] if folders else None, read_only=dry_run)
    state = read_state(remote, asked, local, manifest)
    first = state.first()
    if first is None:
        find_fingerprint(remote, asked)  # names what is there, if this isn't
        why = next(iter(state.problems.values()), "nothing was pushed, or the push isn't done")
        raise IntegrityError(f"{remote.place}/{asked} has no manifest that can be read: {why}")
    intake = Intake(
        cache,
        first.config,
        tolerance=tolerance,
        on_duplicate=on_duplicate,
        ragged=None in first.embedding_shape,
        dry_run=dry_run,
    )
    report = intake.report = PullReport(
        **vars(intake.report),
        url=remote.place,
        manifest=state.pin,
        problems=dict(state.problems),
    )
    local.store = report.path
    run = _Pull(remote, cache, intake, report, local, state, progress)
    if dry_run:
        run.look(selection)
        return report
    with local.held():
        run.bring_in(selection)
        local.tidy({*state.manifests, *(offer.entry.sha256 for offer in state.offers())})
    return report


class _Pull:
    """One pull on its way."""

    def __init__(
        self,
        remote: Remote,
        cache: EmbeddingCache,
        intake: Intake,
        report: PullReport,
        local: LocalFolder,
        state: SharedState,
        progress: Progress | None,
    ) -> None:
        self._remote, self._cache, self._intake, self._report = remote, cache, intake, report
        self._local, self._state, self._progress = local, state, progress
        self._config = report.config
        self._listed: dict[str, int] = {}  # name → bytes of the shards that are there
        self._failed: set[str] = set()  # digests
        # Of what was searched: what is shared, and what became of that without being fetched.
        self._asked, self._present, self._skipped = set[str](), set[str](), set[str]()
        self._lock = Lock()  # of the counts, which several downloads add to
        self._bytes_done = self._bytes_in_all = 0
        self._is_over = False
        # By digest of a shard: names and bytes of the files with its clips' lengths.
        self._lengths: dict[str, list[tuple[str, int]]] = {}
        self._first_windows: list[tuple[Offer, ShardHeader, dict[int, Any], dict[str, int]]] = []

    def look(self, selection: Selection) -> list[_Wanted]:
        """Return the shards to fetch, so that all that is asked for is here or can be compared."""
        report = self._report
        self._refuse_other_weights()
        wanted = self._search(selection)
        if not report.problems:
            selection.check_classes(f"{self._remote.place}/{self._config.fingerprint}")
        report.num_samples, report.num_same = len(self._asked), len(self._present)
        report.num_skipped, report.num_shards = len(self._skipped), len(wanted)
        report.absent = selection.absent(self._asked)
        report.bytes_to_fetch = sum(map(self._size, wanted))
        return wanted

    def bring_in(self, selection: Selection) -> None:
        """Fetch and check several shards at once, and import them one after the other.

        Raises:
            CacheFullError: The disk can't hold them.
        """
        queue, lost = self.look(selection), set[str]()
        for name, size in self._remote.list_files(f"{self._config.fingerprint}/lengths").items():
            if size <= MAX_LENGTHS_BYTES:
                self._lengths.setdefault(name[:64], []).append((name, size))
        try:
            while queue:
                self._check_room(queue)
                self._bytes_in_all += sum(map(self._size, queue))
                missed: set[str] = set()
                for wanted, fetched in in_parallel(self._fetched, queue):
                    try:
                        self._import(wanted, *fetched.result())
                    except (IntegrityError, RemoteError) as error:
                        self._fail(wanted.offer, error)
                        missed.update(wanted.sample_ids)
                lost |= missed
                # Another shard may have what a damaged one was to bring.
                queue = self._search(Selection(sample_ids=missed)) if missed else []
            self._finish_recordings(lost)
        finally:
            self._is_over = True
        self._report.lost = sorted(lost - self._stored().keys()) if lost else []

    def _refuse_other_weights(self) -> None:
        """Leave out the manifests whose embeddings may not be mixed with those of the store."""
        stored = self._intake.metadata()
        if stored is None:
            return
        for manifest in [one for one in self._state.manifests.values() if one.shards]:
            try:
                stored.check_stated(manifest.provenance, self._report.path)
                stored.with_provenance(manifest.provenance, self._report.path)
            except ProvenanceMismatchError as error:
                del self._state.manifests[manifest.id]
                self._refuse(manifest, error)

    def _refuse(self, manifest: Manifest, error: ProvenanceMismatchError) -> None:
        refusal = Refusal(manifest.writer, None, str(error))
        if refusal not in self._report.refused:
            self._report.refused.append(refusal)

    # ---- which shards

    def _search(self, selection: Selection) -> list[_Wanted]:
        """Return the shards that hold what is missing here of these samples, or differs."""
        stored, on_duplicate = self._stored(), self._report.on_duplicate
        offers = [
            one
            for one in self._state.offers()
            if one.entry.sha256 not in self._failed
            and selection.meets(one.entry.first, one.entry.last)
        ]
        if on_duplicate == "overwrite":
            offers.reverse()  # the last of several values counts, or the store would go to and fro
        found: list[_Wanted] = []
        values: set[bytes] = set()  # a sample's key and the checksum of a value it has somewhere
        met: set[str] = set()
        for offer, look in in_parallel(self._header, offers):
            try:
                header = look.result()
            except (IntegrityError, RemoteError) as error:
                self._fail(offer, error)
                continue
            wanted = _Wanted(offer, header, [])
            for row in offer.rows(header):
                sample_id, theirs = header.sample_ids[row], header.checksums[row]
                if sample_id not in selection or (on_duplicate == "overwrite" and sample_id in met):
                    continue
                met.add(sample_id)
                ours = stored.get(sample_id)
                if ours == theirs:
                    self._present.add(sample_id)
                elif ours is not None and on_duplicate == "skip":
                    self._skipped.add(sample_id)
                elif (value := header.keys[row] + theirs) not in values:
                    values.add(value)
                    wanted.rows.append(row)
            if wanted.rows:
                found.append(wanted)
        self._asked |= met
        return found

    def _header(self, offer: Offer) -> ShardHeader:
        return read_header(self._remote, offer, self._local)

    def _stored(self) -> dict[str, bytes]:
        """Return sample id → checksum of what is stored."""
        if self._config not in self._cache:
            return {}
        with self._cache.reader(self._config, track_usage=False) as reader:
            return {sample_id_of_key(key): found for key, found in reader.checksums()}

    def _check_room(self, queue: Sequence[_Wanted]) -> None:
        self._listed = self._remote.list_files(f"{self._config.fingerprint}/shards")
        # A shard that isn't there as its manifest says is no reason to refuse all others.
        coming = [one for one in queue if self._listed.get(one.offer.entry.name)]
        stored = sum(one.stored_bytes for one in coming)
        on_their_way = sum(sorted(map(self._size, coming))[-CONNECTIONS:])
        check_room(self._report.path, stored + on_their_way + RESERVE_BYTES, "this pull")

    def _fail(self, offer: Offer, error: Exception) -> None:
        if isinstance(error, RemoteError):
            # Raises where nothing answers any more: all others would fail as well.
            self._remote.list_files(f"{self._config.fingerprint}/shards")
        self._failed.add(offer.entry.sha256)
        self._report.problems[offer.entry.path] = str(error)

    # ---- one shard: in a thread

    def _fetched(self, wanted: _Wanted) -> tuple[_Values, dict[str, int]]:
        """Return the embeddings by row, and sample id → length of the clip, where that is known."""
        embeddings, lengths = self._embeddings(wanted), dict[str, int]()
        for name, size in self._lengths.get(wanted.offer.entry.sha256, []):
            path = f"{self._config.fingerprint}/lengths/{name}"
            try:
                lengths |= decode_lengths(self._remote.read(path, 0, size), name, wanted.header)
            except (IntegrityError, RemoteError) as error:
                self._report.problems[f"lengths/{name}"] = str(error)
        return embeddings, lengths

    def _embeddings(self, wanted: _Wanted) -> _Values:
        """Return the embeddings by row."""
        entry = wanted.offer.entry
        entry.check_listed(self._listed)
        if self._is_in_part(wanted):
            return self._fetch_rows(wanted)
        data = self._local.fetch(self._remote, entry, wanted.header, self._count)
        return wanted.header.values(data)

    def _fetch_rows(self, wanted: _Wanted) -> dict[int, Any]:
        """Return the embeddings that are wanted; only their bytes are read."""
        header, entry = wanted.header, wanted.offer.entry
        path = f"{self._config.fingerprint}/{entry.path}"
        found: dict[int, Any] = {}

        def take(data: bytes, start: int, rows: list[int]) -> None:
            view = memoryview(data)
            for row in rows:
                first, last = header.bounds[row]
                raw = view[first - start : last - start]
                if checksum(header.keys[row], raw) != header.checksums[row]:
                    raise IntegrityError(
                        f"{entry.path} is damaged: {header.sample_ids[row]} doesn't have its "
                        "checksum"
                    )
                found[row] = header.value(raw)

        for start, end in wanted.spans:
            rows = [row for row in wanted.rows if start <= header.bounds[row][0] < end]
            data = self._remote.read(path, start, end, partial(take, start=start, rows=rows))
            self._count(len(data))
        return found

    def _is_in_part(self, wanted: _Wanted) -> bool:
        entry = wanted.offer.entry
        return self._local.bytes_there(entry) == entry.header_bytes and bool(wanted.spans)

    def _size(self, wanted: _Wanted) -> int:
        """Return how many bytes are to be fetched of a shard."""
        if self._is_in_part(wanted):
            return sum(last - first for first, last in wanted.spans)
        entry = wanted.offer.entry
        return entry.num_bytes - self._local.bytes_there(entry)

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            if self._is_over:
                raise RemoteError("the pull has ended")
            self._bytes_done += num_bytes
            self._report.bytes_fetched = self._bytes_done
            if self._progress is not None:
                self._progress(self._bytes_done, max(self._bytes_done, self._bytes_in_all))

    # ---- into the store

    def _import(self, wanted: _Wanted, embeddings: _Values, lengths: dict[str, int]) -> None:
        offer, header, rows = wanted.offer, wanted.header, wanted.rows
        if self._config.window is not None:  # see `Intake.add`
            first = [row for row in rows if is_first_window(header.sample_ids[row])]
            values = {row: np.array(embeddings[row]) for row in first}
            self._first_windows.append((offer, header, values, lengths))
            rows = [row for row in rows if row not in values]
        self._add(offer, header, rows, _chosen(embeddings, rows), lengths)
        self._local.discard(offer.entry)

    def _add(
        self,
        offer: Offer,
        header: ShardHeader,
        rows: Sequence[int],
        values: Embeddings,
        lengths: Mapping[str, int],
    ) -> None:
        manifest = offer.manifest
        provenance = portable(manifest.provenance)
        detail = {"url": self._report.url, "manifest": manifest.id, "created": manifest.created}
        checked = self._intake.checked(
            [header.sample_ids[row] for row in rows],
            values,
            Origin(manifest.writer, detail, provenance),
            checksums=[header.checksums[row] for row in rows],
        )
        try:
            self._intake.add((one.with_lengths(lengths) for one in checked), provenance)
        except ProvenanceMismatchError as error:  # two writers with different weights, a new store
            self._refuse(manifest, error)

    def _finish_recordings(self, lost: set[str]) -> None:
        """Store the first windows of the recordings whose other windows are stored."""
        incomplete = set(map(recording_of, lost - self._stored().keys())) if lost else set()
        for offer, header, values, lengths in self._first_windows:
            rows = [row for row in values if recording_of(header.sample_ids[row]) not in incomplete]
            self._add(offer, header, rows, [values[row] for row in rows], lengths)


def _chosen(embeddings: _Values, rows: list[int]) -> Embeddings:
    """The embeddings at these positions, which ascend; all of them without a copy."""
    if isinstance(embeddings, np.ndarray):
        chosen: Embeddings = embeddings if len(rows) == len(embeddings) else embeddings[rows]
        return chosen
    return [embeddings[row] for row in rows]

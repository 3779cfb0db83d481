"""`push`: what a place lacks of a store, as shards and a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import islice
from typing import Any, ClassVar, Final, NamedTuple

import numpy.typing as npt

from lmdbcache.cache import EmbeddingCache, SourceRecords
from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    ConfigError,
    IntegrityError,
    RemoteError,
    SampleNotFoundError,
)
from lmdbcache.exchange.sharing.local_folder import LocalFolder
from lmdbcache.exchange.sharing.manifests import (
    MANIFESTS_NAME,
    Manifest,
    checked_writer,
    encode_manifest,
    entry_bytes,
    in_manifests,
    manifest_path,
    writer_of,
)
from lmdbcache.exchange.sharing.remote import Remote, in_parallel
from lmdbcache.exchange.sharing.remote_index import Offer, SharedState, read_header, read_state
from lmdbcache.exchange.sharing.selection import Selection
from lmdbcache.exchange.sharing.shards import (
    MAX_SHARD_SAMPLES,
    SHARD_BYTES,
    ShardEntry,
    ShardHeader,
    encode_shard,
    row_bytes,
)
from lmdbcache.exchange.sharing.verifying import check_shard
from lmdbcache.files import few
from lmdbcache.storage import (
    EmbeddingReader,
    OnDuplicate,
    Report,
    StoreMetadata,
    portable,
    sample_id_of_key,
    sample_key,
    stored_checksums,
)

__all__ = ["PushReport", "push"]

# A push that is killed has no more than this to list again; its shards stay.
_SHARDS_PER_MANIFEST: Final = 64
_CHOICES: Final = ("skip", "overwrite", "error")
_ORIGINS_AT_ONCE: Final = 10_000

Values = Sequence[npt.NDArray[Any]] | npt.NDArray[Any]


@dataclass
class PushReport(Report):
    """What a push did.

    Args:
        url: The place, without what is secret in it.
        fingerprint: Of the store.
        writer: Under which id.
        num_chosen: Samples that were asked for.
        num_there: Of these, there already with the same value.
        num_pushed: Of these, pushed.
        num_different: Of these, there already with another value.
        conflicts: Those of them that were not pushed for that reason, with `on_duplicate="error"`.
        damaged: Sample id → why its stored value can't be pushed.
        num_shards: Shards that were listed anew.
        num_uploaded: Shards that were uploaded; a push that was interrupted had uploaded others.
        num_bytes: Uploaded, in shards and manifests.
        manifests: Ids of the manifests that were written.
        manifest: The id that stands for all that is shared now; None if several writers have
            pushed side by side.
        repaired: Damaged shards that were uploaded again.
        problems: Other files there that can't be used: path → why. What they hold is pushed again
            by a store that has it.
        dry_run: Nothing was pushed, only looked at.
    """

    derived: ClassVar[tuple[str, ...]] = ("is_complete",)

    url: str
    fingerprint: str
    writer: str
    num_chosen: int = 0
    num_there: int = 0
    num_pushed: int = 0
    num_different: int = 0
    conflicts: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    num_shards: int = 0
    num_uploaded: int = 0
    num_bytes: int = 0
    manifests: list[str] = field(default_factory=list)
    manifest: str | None = None
    repaired: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether all that was chosen is there now."""
        return not (self.damaged or self.conflicts or self.dry_run)

    @property
    def exit_code(self) -> int:
        """0; 1 if a stored value is damaged, or wasn't pushed because of another one."""
        return 1 if self.damaged or self.conflicts else 0


def push(
    cache: EmbeddingCache,
    config: CacheConfig,
    url: str,
    *,
    writer: str | None = None,
    own: bool = False,
    classes: Iterable[str] | None = None,
    sample_ids: Iterable[str] | None = None,
    on_duplicate: OnDuplicate = "overwrite",
    repair: bool = False,
    dry_run: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PushReport:
    """Share a store's embeddings through a folder or bucket: upload what it lacks.

    No sound file that is there is changed. A push that is interrupted goes on where it was when it
    is started again; several may run at once. Each value is compared with its checksum before it
    leaves this machine.

    Embeddings can tell much about the audio they were computed from: push what may be shared.

    Args:
        cache: The cache.
        config: Identity of the store.
        url: Such as `s3://bucket/folder`, `file:///mnt/shared`, `ssh://host/folder`.
        writer: Name that the manifest carries; default: a random id that the store keeps.
        own: Only what was computed or imported in this store, not what was pulled or merged.
        classes: Only these classes.
        sample_ids: Only these samples.
        on_duplicate: What happens to a sample that is there with another value. `"overwrite"`
            pushes this store's: it takes the place of an earlier one of the same writer; one of
            another writer stays beside it, and a pull finds the conflict. `"skip"` leaves the
            sample out, and so does `"error"`, which lists it.
        repair: Read every shard that is there, and upload a damaged one again if all of its
            embeddings are stored here. A shard that is missing or cut is uploaded again in any
            case.
        dry_run: Only count what would be pushed.
        storage_options: For fsspec; default: its configuration and the environment.
        progress: Called with the number of samples looked at and of those to be pushed.

    Raises:
        CacheNotFoundError: Nothing is stored for this config.
        SampleNotFoundError: A sample isn't stored.
        ConfigError: Not a URL, no such class, no name for a writer, or the place holds embeddings
            of another shape.
        ProvenanceMismatchError: The place holds embeddings of other weights.
        IntegrityError: The store is damaged. A single damaged value is reported instead.
        FormatVersionError: The place was pushed by another release, in a form that isn't read.
        RemoteError: The place can't be reached or refuses.
        MissingDependencyError: A package is needed for this kind of URL.
    """
    if on_duplicate not in _CHOICES:
        raise ConfigError(f"on_duplicate: {on_duplicate!r}; known are {', '.join(_CHOICES)}")
    remote = Remote(url, storage_options)
    if writer is not None:
        checked_writer(writer)
    with cache.reader(config, verify="always", track_usage=False) as reader:
        chosen, unusable = _choose(reader, Selection(classes, sample_ids), own=own)
        local = LocalFolder(cache.path(config), read_only=dry_run)
        report = PushReport(remote.place, config.fingerprint, writer or local.writer())
        report.dry_run = dry_run
        report.damaged.update(unusable)
        report.num_chosen = len(chosen) + len(unusable)
        run = _Push(reader, remote, local, report)
        run.compare(chosen, on_duplicate, repair=repair)
        if not dry_run:
            run.upload(progress)
    return report


class _Looked(NamedTuple):
    """What a look at one shard found: what it holds, and what is wrong with the file."""

    header: ShardHeader | None
    trouble: str | None


class _Push:
    """One push on its way.

    Args:
        reader: Of the store; compares each value with its checksum.
        remote: The place.
        local: What is kept of it here.
        report: What is done is noted here.
    """

    def __init__(
        self, reader: EmbeddingReader, remote: Remote, local: LocalFolder, report: PushReport
    ) -> None:
        self._reader, self._remote, self._local, self._report = reader, remote, local, report
        self._folder = report.fingerprint
        self._state: SharedState = read_state(remote, self._folder, local)
        self._mine = {
            one.id: one for one in self._state.manifests.values() if one.writer == report.writer
        }
        self._my_digests = {s.sha256 for one in self._mine.values() for s in one.shards}
        self._missing: dict[str, bytes] = {}
        self._pending: list[ShardEntry] = []  # uploaded, and in no manifest yet
        self._dropped: set[str] = set()  # digests of my shards that can't be mended
        self._superseded: dict[str, list[str]] = {}  # digest of my shard → its outdated samples
        self._listed: dict[str, int] = {}

    # ---- looking

    def compare(
        self, chosen: Mapping[str, bytes], on_duplicate: OnDuplicate, *, repair: bool
    ) -> None:
        """See what of the chosen samples the place lacks, and mend what is damaged there.

        Raises:
            ProvenanceMismatchError: The place holds embeddings of other weights.
            ConfigError: It holds embeddings of another shape.
        """
        report, state = self._report, self._state
        self._check_same_kind()
        report.problems.update(state.problems)
        self._listed = self._remote.list_files(f"{self._folder}/shards")
        self._missing = dict(chosen)
        first, last = (min(chosen), max(chosen)) if chosen else ("", "")
        offers = [
            offer
            for offer in state.offers()
            if repair or (offer.entry.first <= last and first <= offer.entry.last)
        ]
        different: set[str] = set()
        looks = in_parallel(lambda offer: self._look(offer, repair=repair), offers)
        for (manifest, entry), look in looks:
            header, trouble = look.result()
            if header is None or (trouble is not None and not self._mend(entry, header)):
                report.problems[entry.path] = str(trouble)
                self._dropped.add(entry.sha256)
                continue
            for row in Offer(manifest, entry).rows(header):
                sample_id, found = header.sample_ids[row], header.checksums[row]
                ours = chosen.get(sample_id)
                if ours == found:
                    self._missing.pop(sample_id, None)
                elif ours is not None:
                    different.add(sample_id)
                    if entry.sha256 in self._my_digests:
                        self._superseded.setdefault(entry.sha256, []).append(sample_id)
        left_out = sorted(different & self._missing.keys())
        report.num_different = len(left_out)
        if on_duplicate != "overwrite":
            self._superseded.clear()
            for sample_id in left_out:
                del self._missing[sample_id]
            report.conflicts = left_out if on_duplicate == "error" else []
        report.num_there = len(chosen) - len(self._missing)
        if report.dry_run:
            report.num_pushed = len(self._missing)
        report.manifest = state.pin

    def _check_same_kind(self) -> None:
        """Refuse to mix embeddings of other weights, or of another shape, with what is there."""
        shape, provenance = self._reader.embedding_shape, self._reader.metadata.provenance
        place = f"{self._remote.place}/{self._folder}"
        for manifest in self._state.manifests.values():
            there = StoreMetadata(manifest.config, provenance=manifest.provenance)
            there.with_provenance(provenance, place)
            if manifest.shards and shape is not None and manifest.embedding_shape != shape:
                raise ConfigError(
                    f"{place} holds embeddings of shape {manifest.embedding_shape} (manifest "
                    f"{manifest.id}), the store of shape {shape}: another output or length needs "
                    "a config of its own"
                )

    def _look(self, offer: Offer, *, repair: bool) -> _Looked:
        entry, trouble = offer.entry, None
        size = self._listed.get(entry.name)
        if size != entry.num_bytes:
            found = "isn't there" if size is None else f"has {size} bytes"
            trouble = f"{found}, and manifest {offer.manifest.id} lists {entry.num_bytes}"
        try:
            if trouble is None and repair:
                check_shard(self._remote, self._folder, entry.sha256, entry.num_bytes)
        except IntegrityError as error:
            trouble = str(error)
        try:
            return _Looked(read_header(self._remote, offer, self._local), trouble)
        except (IntegrityError, RemoteError) as error:
            if trouble is None and isinstance(error, RemoteError):
                raise  # it may be sound, and is nothing to be given up
            return _Looked(None, trouble or str(error))

    def _mend(self, entry: ShardEntry, header: ShardHeader) -> bool:
        """Upload a shard again, byte for byte, if all of its embeddings are stored here."""
        try:
            ids, values = self._values(list(header.sample_ids))
            made, data = encode_shard(self._reader.config, header.embedding_shape, ids, values)
        except CacheError:
            return False
        if made.sha256 != entry.sha256:
            return False
        if not self._report.dry_run:
            self._remote.write(f"{self._folder}/{entry.path}", data)
            self._report.num_bytes += len(data)
            self._report.num_uploaded += 1
        self._report.repaired.append(entry.path)
        return True

    # ---- uploading

    def upload(self, progress: Callable[[int, int], None] | None) -> None:
        """Upload what is missing, several shards at once, and list it in a manifest."""
        total, done = len(self._missing), 0
        shards = (
            (self._encode(ids, values), num_looked_at)
            for ids, values, num_looked_at in self._pieces(list(self._missing))
        )
        for (shard, num_looked_at), written in in_parallel(self._write, shards):
            written.result()
            if shard is not None:
                self._pending.append(shard[0])
            if len(self._pending) >= _SHARDS_PER_MANIFEST:
                self._publish(is_last=False)
            done += num_looked_at
            if progress is not None:
                progress(done, total)
        if self._pending or self._has_changes():
            self._publish(is_last=True)
        digests = [offer.entry.sha256 for offer in self._state.offers()]
        self._local.tidy({*self._state.manifests, *digests})

    def _encode(self, ids: list[str], values: Values) -> tuple[ShardEntry, bytes] | None:
        """Return the shard of these, with no bytes if it is there already."""
        if not ids:
            return None
        reader = self._reader
        entry, data = encode_shard(reader.config, reader.embedding_shape or (), ids, values)
        self._local.keep(entry.sha256, data[: entry.header_bytes])
        if self._listed.get(entry.name) == entry.num_bytes:
            return entry, b""
        self._report.num_bytes += len(data)
        self._report.num_uploaded += 1
        return entry, data

    def _write(self, piece: tuple[tuple[ShardEntry, bytes] | None, int]) -> None:
        shard, _ = piece
        if shard is not None and shard[1]:
            self._remote.write(f"{self._folder}/{shard[0].path}", shard[1])

    def _pieces(self, sample_ids: Sequence[str]) -> Iterator[tuple[list[str], Values, int]]:
        """Yield (ids, values, how many samples were looked at) of one shard after the other."""
        shape = self._reader.embedding_shape or ()
        if None not in shape:
            step = max(1, SHARD_BYTES // row_bytes(self._reader.config, shape))
            step = min(step, MAX_SHARD_SAMPLES)
            for first in range(0, len(sample_ids), step):
                some = list(sample_ids[first : first + step])
                yield *self._values(some), len(some)
            return
        ids: list[str] = []
        values: list[npt.NDArray[Any]] = []
        held = looked_at = 0
        for sample_id in sample_ids:
            sound, found = self._values([sample_id])
            size = sum(value.nbytes for value in found)
            if ids and (held + size > SHARD_BYTES or len(ids) == MAX_SHARD_SAMPLES):
                yield ids, values, looked_at
                ids, values, held, looked_at = [], [], 0, 0
            ids += sound
            values += list(found)
            held, looked_at = held + size, looked_at + 1
        yield ids, values, looked_at

    def _values(self, ids: list[str]) -> tuple[list[str], Values]:
        """Return those of these samples whose value is sound, and the values."""
        try:
            if None not in (self._reader.embedding_shape or ()):
                return ids, self._reader.get_batch(ids)
        except (IntegrityError, SampleNotFoundError):
            pass  # one by one, to know which
        sound, values = [], []
        for sample_id in ids:
            try:
                values.append(self._reader[sample_id])
                sound.append(sample_id)
            except (IntegrityError, SampleNotFoundError) as error:
                if sample_id in self._missing:
                    self._report.damaged[sample_id] = str(error)
        return sound, values

    # ---- listing

    def _has_changes(self) -> bool:
        changed = self._superseded.keys() | self._dropped
        return not changed.isdisjoint(self._my_digests) or bool(self._unreadable())

    def _unreadable(self) -> set[str]:
        """Return the ids of this writer's manifests that are damaged."""
        state = self._state
        return {
            one
            for one in state.listed
            if writer_of(one) == self._report.writer
            and manifest_path(one) in state.problems.keys() - state.unread
        }

    def _publish(self, *, is_last: bool) -> None:
        """List the pending shards in a manifest.

        It takes the place of this writer's earlier ones that list no more than twice as much: so
        a thousand pushes leave ten manifests to be read. The last one of a push also takes the
        place of those that list what doesn't count any more.
        """
        report, state = self._report, self._state
        self._check_there("shards", {one.name: one.num_bytes for one in self._pending})
        entries = list(self._pending)
        withdraws = self._unreadable() if is_last else set[str]()
        held = entry_bytes(entries)
        for manifest in sorted(self._mine.values(), key=lambda one: len(one.shards)):
            kept = tuple(self._still_counting(manifest)) if is_last else manifest.shards
            size = entry_bytes(kept)
            if kept == manifest.shards and size > 2 * held:
                continue
            entries = [*kept, *entries]
            held += size
            withdraws |= {manifest.id, *(set(manifest.withdraws) & state.listed)}
        parts = list(in_manifests(entries))
        for number, part in enumerate(parts, 1):
            self._write_manifest(part, withdraws if number == len(parts) else set())
        report.num_shards += len(self._pending)
        report.num_pushed += sum(entry.num_samples for entry in self._pending)
        self._pending.clear()
        for one in withdraws:
            state.manifests.pop(one, None)
            self._mine.pop(one, None)
            report.problems.pop(manifest_path(one), None)
        report.manifest = state.pin

    def _write_manifest(self, entries: Sequence[ShardEntry], withdraws: set[str]) -> None:
        report, reader, state = self._report, self._reader, self._state
        manifest, data = encode_manifest(
            reader.config,
            reader.embedding_shape or (),
            report.writer,
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
            provenance=portable(reader.metadata.provenance),
            shards=entries,
            withdraws=withdraws,
            beside=state.manifests.keys() - withdraws,
        )
        self._remote.write(f"{self._folder}/{manifest.path}", data)
        self._check_there(MANIFESTS_NAME, {f"{manifest.id}.json": len(data)})
        self._local.keep(manifest.id, data)
        state.manifests[manifest.id] = self._mine[manifest.id] = manifest
        state.listed.add(manifest.id)
        report.manifests.append(manifest.id)
        report.num_bytes += len(data)

    def _still_counting(self, manifest: Manifest) -> Iterator[ShardEntry]:
        for entry in manifest.shards:
            if entry.sha256 in self._dropped:
                continue
            outdated = set(self._superseded.get(entry.sha256, ())) - self._report.damaged.keys()
            without = {*entry.without, *outdated}
            if len(without) < entry.num_samples:
                yield replace(entry, without=tuple(sorted(without)))

    def _check_there(self, folder: str, sizes: Mapping[str, int]) -> None:
        """Compare files with a listing: it shows what a server has lost, or kept in part."""
        listed = self._remote.list_files(f"{self._folder}/{folder}")
        for name, num_bytes in sizes.items():
            found = listed.get(name)
            if found != num_bytes:
                state = "isn't there" if found is None else f"has {found} of {num_bytes} bytes"
                raise RemoteError(
                    f"{self._remote.place}/{self._folder}/{folder}/{name} {state}, though it was "
                    "written. Is another program changing files there? Push again"
                )


def _choose(
    reader: EmbeddingReader, selection: Selection, *, own: bool
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the samples to push with their checksums, and the keys that can't be: key → why.

    Raises:
        SampleNotFoundError: One that is asked for isn't stored.
        ConfigError: A class that has no sample.
    """
    chosen: dict[str, bytes] = {}
    unusable: dict[str, str] = {}
    absent = set(selection.sample_ids or ())
    for key, expected in stored_checksums(reader):
        sample_id = sample_id_of_key(key)
        absent.discard(sample_id)
        if not _is_key_of(key, sample_id):
            unusable[sample_id] = "not a sample id in its canonical form: the store is damaged"
        elif sample_id in selection:
            chosen[sample_id] = expected
    if absent:
        raise SampleNotFoundError(
            f"{len(absent)} samples aren't stored in {reader.path}: {few(sorted(absent), 3)}"
        )
    selection.check_classes(str(reader.path))
    return (_own(chosen, reader) if own else chosen), unusable


def _is_key_of(key: bytes, sample_id: str) -> bool:
    try:
        return sample_key(sample_id) == key
    except ValueError:
        return False


def _own(chosen: dict[str, bytes], reader: EmbeddingReader) -> dict[str, bytes]:
    own: dict[str, bytes] = {}
    items = iter(chosen.items())
    with SourceRecords(reader.path) as records:
        while some := dict(islice(items, _ORIGINS_AT_ONCE)):
            elsewhere = records.origins(some)
            own |= {one: expected for one, expected in some.items() if one not in elsewhere}
    return own

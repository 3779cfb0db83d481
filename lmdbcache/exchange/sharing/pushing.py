"""`push`: what a place lacks of a store, as shards and a manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import islice
from threading import Lock
from typing import Any, Final, NamedTuple

import numpy.typing as npt

from lmdbcache.cache import EmbeddingCache, SourceRecords, clip_lengths
from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    ConfigError,
    IntegrityError,
    RemoteError,
    SampleNotFoundError,
)
from lmdbcache.exchange.selection import Selection
from lmdbcache.exchange.sharing.local_folder import LocalFolder
from lmdbcache.exchange.sharing.manifests import (
    MANIFESTS_NAME,
    Manifest,
    Offer,
    checked_writer,
    encode_manifest,
    entry_bytes,
    in_manifests,
    manifest_path,
    read_header,
    read_state,
    writer_of,
)
from lmdbcache.exchange.sharing.remote import Remote, in_parallel
from lmdbcache.exchange.sharing.shards import (
    MAX_SHARD_SAMPLES,
    ShardEntry,
    ShardHeader,
    encode_shard,
    lengths_file,
)
from lmdbcache.exchange.sharing.verifying import check_shard
from lmdbcache.files import few
from lmdbcache.storage import (
    EmbeddingReader,
    OnDuplicate,
    Progress,
    Report,
    StoreMetadata,
    check_on_duplicate,
    is_what_is_stored,
    portable,
    sample_id_of_key,
    sample_key,
    value_bytes,
)

SHARD_BYTES: Final = 16 << 20  # of values
# A push that is killed has no more than this to list again; its shards stay.
_SHARDS_PER_MANIFEST: Final = 64
_READ_AT_ONCE_BYTES: Final = 4 << 20


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
        damaged: Sample id → why its stored value can't be pushed.
        num_shards: Shards that were listed anew.
        num_uploaded: Shards that were uploaded; a push that was interrupted had uploaded others.
        num_bytes: Uploaded, in shards and manifests.
        manifest: The id that means all that is shared now; None if several writers have
            pushed side by side.
        repaired: Damaged shards that were uploaded again.
        problems: Other files there that can't be used: path → why. What they hold is pushed again
            by a store that has it.
        dry_run: Nothing was pushed, only looked at.
    """

    url: str
    fingerprint: str
    writer: str
    num_chosen: int = 0
    num_there: int = 0
    num_pushed: int = 0
    num_different: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    num_shards: int = 0
    num_uploaded: int = 0
    num_bytes: int = 0
    manifest: str | None = None
    repaired: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False

    @property
    def exit_code(self) -> int:
        """0; 1 if a stored value is damaged."""
        return 1 if self.damaged else 0


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
    progress: Progress | None = None,
) -> PushReport:
    """Share a store's embeddings through a folder or bucket: upload what it lacks.

    No sound file that is there is changed. A push that is interrupted goes on where it was when it
    is started again; several may run at once. Each value is compared with its checksum before it
    leaves this machine.

    Embeddings can reveal much about the audio they were computed from: push what may be shared.

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
            another writer stays with it, and a pull finds the conflict. `"skip"` leaves the
            sample out, `"error"` raises.
        repair: Read every shard that is there, and upload a damaged one again if all of its
            embeddings are stored here. A shard that is missing or cut is uploaded again in any
            case.
        dry_run: Only count what would be pushed.
        storage_options: For fsspec; default: its configuration and the environment.
        progress: Called with the number of samples looked at and of those to be pushed.

    Raises:
        CacheNotFoundError: Nothing is stored for this config.
        SampleNotFoundError: A sample isn't stored.
        ConfigError: Not a URL, no such class, no name for a writer, another value is there with
            `on_duplicate="error"`, or the place holds embeddings of another shape.
        ProvenanceMismatchError: The place holds embeddings of other weights.
        IntegrityError: The store is damaged. A single damaged value is reported instead.
        FormatVersionError: The place was pushed by another release, in a form that isn't read.
        RemoteError: The place can't be reached or refuses.
        MissingDependencyError: A package is needed for this kind of URL.
    """
    check_on_duplicate(on_duplicate)
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


class _Part(NamedTuple):
    """Samples that make a shard, in the order of their keys."""

    ids: list[str]
    values: list[npt.NDArray[Any]]
    lengths: list[int | None]  # of their clips


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
        self._folder, self._shape = report.fingerprint, reader.embedding_shape or ()
        self._state = read_state(remote, self._folder, local)
        report.problems.update(self._state.problems)
        report.manifest = self._state.pin
        self._listed: dict[str, int] = {}  # name → bytes of the shards that are there
        self._missing: dict[str, bytes] = {}
        self._pending: list[ShardEntry] = []  # uploaded, and in no manifest yet
        self._lock = Lock()  # of the counts, which several uploads add to
        # By digest of a shard, what doesn't count in it any more; None: nothing of it.
        self._outdated: dict[str, set[str] | None] = {}

    # ---- looking

    def compare(
        self, chosen: Mapping[str, bytes], on_duplicate: OnDuplicate, *, repair: bool
    ) -> None:
        """See what of the chosen samples the place lacks, and repair what is damaged there.

        Raises:
            ProvenanceMismatchError: The place holds embeddings of other weights.
            ConfigError: It holds embeddings of another shape, or another value.
        """
        report, missing = self._report, dict(chosen)
        self._check_same_kind()
        self._listed = self._remote.list_files(f"{self._folder}/shards")
        first, last = (min(chosen), max(chosen)) if chosen else ("", "")
        offers = [
            offer
            for offer in self._state.offers()
            if repair or (offer.entry.first <= last and first <= offer.entry.last)
        ]
        different: dict[str, set[str]] = {}
        for offer, look in in_parallel(lambda one: self._look(one, repair=repair), offers):
            entry, (header, trouble) = offer.entry, look.result()
            if header is None or (trouble is not None and not self._mend(entry, header)):
                report.problems[entry.path] = str(trouble)
                self._outdated[entry.sha256] = None
                continue
            there = {header.sample_ids[row]: header.checksums[row] for row in offer.rows(header)}
            mine = {one: chosen[one] for one in there.keys() & chosen.keys()}
            different[entry.sha256] = {one for one in mine if mine[one] != there[one]}
            for sample_id in mine.keys() - different[entry.sha256]:
                missing.pop(sample_id, None)
        left_out = missing.keys() & set().union(*different.values())
        report.num_different = len(left_out)
        if left_out and on_duplicate == "error":
            raise ConfigError(
                f"{len(left_out)} samples are at {self._remote.place} with another value: "
                f'{few(left_out, 3)}. `on_duplicate="overwrite"` pushes them nevertheless, '
                '`on_duplicate="skip"` leaves them out'
            )
        if on_duplicate == "overwrite":
            self._outdated.update(different)
        else:
            # In the order of the keys still, or others would make other shards of the same samples.
            missing = {one: data for one, data in missing.items() if one not in left_out}
        self._missing = missing
        report.num_there = len(chosen) - len(missing)
        report.num_pushed = len(missing) if report.dry_run else 0

    def _check_same_kind(self) -> None:
        """Refuse to mix embeddings of other weights, or of another shape, with what is there."""
        place = f"{self._remote.place}/{self._folder}"
        for manifest in self._state.manifests.values():
            there = StoreMetadata(manifest.config, provenance=manifest.provenance)
            there.with_provenance(self._reader.metadata.provenance, place)
            if manifest.shards and self._shape and manifest.embedding_shape != self._shape:
                raise ConfigError(
                    f"{place} holds embeddings of shape {manifest.embedding_shape} (manifest "
                    f"{manifest.id}), the store of shape {self._shape}: another output or length "
                    "needs another config"
                )

    def _look(self, offer: Offer, *, repair: bool) -> tuple[ShardHeader | None, str | None]:
        """Return what a shard holds, and what is wrong with the file."""
        entry, trouble = offer.entry, None
        try:
            entry.check_listed(self._listed)
            if repair:
                check_shard(self._remote, self._folder, entry.sha256, entry.num_bytes)
        except IntegrityError as error:
            trouble = str(error)
        try:
            return read_header(self._remote, offer, self._local), trouble
        except IntegrityError as error:
            return None, trouble or str(error)
        except RemoteError:
            if trouble is None:
                raise  # it may be sound, and is nothing to be given up
            return None, trouble

    def _mend(self, entry: ShardEntry, header: ShardHeader) -> bool:
        """Upload a shard again, byte for byte, if all of its embeddings are stored here."""
        found = [self._value(one) for one in header.sample_ids]
        values = [value for value in found if value is not None]
        if len(values) < len(found):
            return False
        made, data = encode_shard(header.config, self._shape, header.sample_ids, values)
        if made.sha256 != entry.sha256:
            return False
        if not self._report.dry_run:
            self._upload(entry, data)
        self._report.repaired.append(entry.path)
        return True

    # ---- uploading

    def upload(self, progress: Progress | None) -> None:
        """Upload what is missing, several shards at once, and list it in a manifest."""
        done = 0
        for _, uploaded in in_parallel(self._upload_part, self._parts()):
            entry = uploaded.result()
            self._pending.append(entry)
            if len(self._pending) >= _SHARDS_PER_MANIFEST:
                self._publish(is_last=False)
            done += entry.num_samples
            if progress is not None:
                progress(done, len(self._missing))
        self._publish(is_last=True)
        digests = {offer.entry.sha256 for offer in self._state.offers()}
        self._local.tidy(digests | self._state.manifests.keys())

    def _parts(self) -> Iterator[_Part]:
        """Yield what is missing, as much as goes into one shard at a time."""
        part, held, dtype = _Part([], [], []), 0, self._reader.config.dtype
        for sample_id, value in self._values():
            expected = self._missing[sample_id]
            if dtype == "int8" and not is_what_is_stored(
                sample_key(sample_id), value, dtype, expected
            ):
                text = "the int8 value isn't in its one form; docs/format.md has it"
                self._report.damaged[sample_id] = text
                continue
            num_bytes = value_bytes(value.shape, dtype)
            is_full = held + num_bytes > SHARD_BYTES or len(part.ids) == MAX_SHARD_SAMPLES
            if part.ids and is_full:
                yield self._with_lengths(part)
                part, held = _Part([], [], []), 0
            part.ids.append(sample_id)
            part.values.append(value)
            held += num_bytes
        if part.ids:
            yield self._with_lengths(part)

    def _with_lengths(self, part: _Part) -> _Part:
        known: Mapping[str, int] = {}
        with contextlib.suppress(CacheError):  # `check_sources` reports what is wrong with them
            known = clip_lengths(self._reader, part.ids)
        return part._replace(lengths=[known.get(one) for one in part.ids])

    def _values(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield the missing samples with their values, but for those that are damaged."""
        ids, is_ragged = iter(self._missing), None in self._shape
        sizes = [size for size in self._shape if size is not None]
        num_bytes = value_bytes(sizes, self._reader.config.dtype)
        # After each read this thread waits for those that upload.
        step = 1 if is_ragged else max(1, _READ_AT_ONCE_BYTES // num_bytes)
        while some := list(islice(ids, step)):
            with contextlib.suppress(IntegrityError, SampleNotFoundError):
                yield from zip(some, self._reader.get_batch(some), strict=True)
                continue
            for sample_id in some:  # one by one, to know which
                value = self._value(sample_id)
                if value is not None:
                    yield sample_id, value

    def _value(self, sample_id: str) -> npt.NDArray[Any] | None:
        try:
            return self._reader[sample_id]
        except (IntegrityError, SampleNotFoundError) as error:
            if sample_id in self._missing:
                self._report.damaged[sample_id] = str(error)
            return None

    def _upload_part(self, part: _Part) -> ShardEntry:
        """Make a shard, and upload it unless it is there already: in a thread."""
        entry, data = encode_shard(self._reader.config, self._shape, part.ids, part.values)
        part.values.clear()  # `data` has them
        self._local.keep(entry.sha256, data[: entry.header_bytes])
        if any(part.lengths):
            name, lengths = lengths_file(entry, part.lengths)
            self._remote.write(f"{self._folder}/lengths/{name}", lengths)
        if self._listed.get(entry.name) != entry.num_bytes:
            self._upload(entry, data)
        return entry

    def _upload(self, entry: ShardEntry, data: bytes) -> None:
        self._remote.write(f"{self._folder}/{entry.path}", data)
        with self._lock:
            self._report.num_bytes += len(data)
            self._report.num_uploaded += 1

    # ---- listing

    def _publish(self, *, is_last: bool) -> None:
        """List the pending shards in a manifest.

        It takes the place of this writer's earlier ones that list no more than twice as much: so
        a thousand pushes leave ten manifests to be read. The last one of a push also takes the
        place of those that are damaged, or that list what doesn't count any more.
        """
        report, state = self._report, self._state
        mine = [one for one in state.manifests.values() if one.writer == report.writer]
        withdraws = set[str]()
        if is_last:
            withdraws = {one for one in state.damaged if writer_of(one) == report.writer}
        kept = {one.id: tuple(self._counting(one)) if is_last else one.shards for one in mine}
        is_changed = any(kept[one.id] != one.shards for one in mine)
        if not (self._pending or withdraws or is_changed):
            return
        self._check_there("shards", {one.name: one.num_bytes for one in self._pending})
        entries, held = list(self._pending), entry_bytes(self._pending)
        for manifest in sorted(mine, key=lambda one: len(one.shards)):
            shards = kept[manifest.id]
            size = entry_bytes(shards)
            if shards != manifest.shards or size <= 2 * held:
                entries = [*shards, *entries]
                held += size
                withdraws |= {manifest.id, *(set(manifest.withdraws) & state.sizes.keys())}
        parts = list(in_manifests(entries))
        for number, part in enumerate(parts, 1):
            self._write_manifest(part, withdraws if number == len(parts) else set())
        report.num_shards += len(self._pending)
        report.num_pushed += sum(entry.num_samples for entry in self._pending)
        self._pending.clear()
        for one in withdraws:
            state.manifests.pop(one, None)
            report.problems.pop(manifest_path(one), None)
        report.manifest = state.pin

    def _counting(self, manifest: Manifest) -> Iterator[ShardEntry]:
        """Yield the shards of a manifest that still count, without the samples that don't."""
        for entry in manifest.shards:
            outdated = self._outdated.get(entry.sha256, set())
            if outdated is not None:
                without = {*entry.without, *(outdated - self._report.damaged.keys())}
                if len(without) < entry.num_samples:
                    yield replace(entry, without=tuple(sorted(without)))

    def _write_manifest(self, entries: Sequence[ShardEntry], withdraws: set[str]) -> None:
        report, reader, state = self._report, self._reader, self._state
        manifest, data = encode_manifest(
            reader.config,
            self._shape,
            report.writer,
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
            provenance=portable(reader.metadata.provenance),
            shards=entries,
            withdraws=withdraws,
            alongside=state.manifests.keys() - withdraws,
        )
        self._remote.write(f"{self._folder}/{manifest.path}", data)
        self._check_there(MANIFESTS_NAME, {f"{manifest.id}.json": len(data)})
        self._local.keep(manifest.id, data)
        state.manifests[manifest.id] = manifest
        state.sizes[manifest.id] = len(data)
        report.num_bytes += len(data)

    def _check_there(self, folder: str, sizes: Mapping[str, int]) -> None:
        """Compare files with a listing: it shows what a server has lost, or kept in part."""
        listed = self._remote.list_files(f"{self._folder}/{folder}") if sizes else {}
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
    for key, expected in reader.checksums():
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
    if own:
        with SourceRecords(reader.path) as records:
            elsewhere = records.origins(chosen)
        chosen = {one: expected for one, expected in chosen.items() if one not in elsewhere}
    return chosen, unusable


def _is_key_of(key: bytes, sample_id: str) -> bool:
    try:
        return sample_key(sample_id) == key
    except ValueError:
        return False

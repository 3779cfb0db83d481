"""`Intake`: the one way into a store for embeddings that were computed elsewhere.

Import, merge and pull are sources of rows. A row is checked once, where its bytes come in; here it
is compared with what is stored, and written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lmdbcache.cache import (
    DEFAULT_TOLERANCE,
    THIS_STORE,
    EmbeddingCache,
    Origin,
    Source,
    SourceRecords,
    difference_of,
    largest_difference,
    write_sources,
)
from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    CacheNotFoundError,
    ConfigError,
    IntegrityError,
    InvalidEmbeddingError,
    InvalidSampleIdError,
)
from lmdbcache.storage import (
    EmbeddingReader,
    EmbeddingWriter,
    OnDuplicate,
    Report,
    StoreMetadata,
    as_stored,
    check_on_duplicate,
    check_pages,
    check_shape,
    check_window_key,
    checksum,
    checksums as checksums_of,
    encoded,
    is_first_window,
    is_what_is_stored,
    recording_of,
    sample_id_of_key,
    sample_key,
    sample_keys,
    stored_form,
    value_bytes,
)

_BATCH_BYTES: Final = 32 << 20
_BATCH_RECORDS: Final = 2048
_KEYS_AT_ONCE: Final = 512
_NO_LIMIT: Final = 1 << 62

# The position of a row to write, its value, and the checksum that it replaces.
_Change = tuple[int, npt.NDArray[Any], "bytes | None"]


class Rows(NamedTuple):
    """Embeddings that may come into a store, by columns; those of one sample stand together.

    One object for thousands of samples: an object each would keep Python's cyclic garbage
    collector busy.

    Args:
        keys: `(n,)` their keys in a store, which are canonical: see `sample_key`.
        checksums: `(n,)` the checksums that a store keeps of them.
        read: Returns the embedding at a position in its stored form. It is called only for values
            that are needed, and may raise a `CacheError`.
        where: `(n,)` where each comes from, for refusals.
        origins: `(n,)` who computed each; None counts as computed in the store that it comes into.
        sources: `(n,)` the file that each was computed from, where known.
    """

    keys: Sequence[bytes]
    checksums: Sequence[bytes]
    read: Callable[[int], npt.NDArray[Any]]
    where: Sequence[str]
    origins: Sequence[Origin | None]
    sources: Sequence[Source | None]

    @classmethod
    def in_memory(
        cls, rows: Iterable[tuple[bytes, bytes, npt.NDArray[Any], str]], origin: Origin | None
    ) -> Iterator[Rows]:
        """Yield (key, checksum, embedding, where it comes from) as blocks that memory can hold.

        Args:
            rows: All of one sample one after the other.
            origin: Who computed them.
        """
        block: list[tuple[bytes, bytes, npt.NDArray[Any], str]] = []
        num_bytes = 0
        for row in rows:
            is_full = num_bytes >= _BATCH_BYTES or len(block) >= _BATCH_RECORDS
            if is_full and row[0] != block[-1][0]:
                yield cls._of(block, origin)
                block, num_bytes = [], 0
            block.append(row)
            num_bytes += row[2].nbytes
        if block:
            yield cls._of(block, origin)

    @classmethod
    def _of(
        cls, block: list[tuple[bytes, bytes, npt.NDArray[Any], str]], origin: Origin | None
    ) -> Rows:
        keys, checksums, values, where = zip(*block, strict=True)
        nothing = [None] * len(block)
        return cls(keys, checksums, values.__getitem__, where, [origin] * len(block), nothing)

    def sample_id(self, number: int) -> str:
        """The sample id at a position."""
        return sample_id_of_key(self.keys[number])

    def chosen(self, numbers: Sequence[int]) -> Rows:
        """Return the rows at these positions."""
        return Rows(
            [self.keys[number] for number in numbers],
            [self.checksums[number] for number in numbers],
            lambda number: self.read(numbers[number]),
            [self.where[number] for number in numbers],
            [self.origins[number] for number in numbers],
            [self.sources[number] for number in numbers],
        )

    def with_lengths(self, lengths: Mapping[str, int]) -> Rows:
        """Return rows that record the lengths of their clips (sample id → samples), if any."""
        if not lengths:
            return self
        known = [lengths.get(self.sample_id(number)) for number in range(len(self.keys))]
        unknown_file = Source("", 0, None, None)
        return self._replace(
            sources=[None if one is None else unknown_file._replace(num_valid=one) for one in known]
        )

    def by(self, number: int) -> Origin:
        """Who computed the embedding at a position, as far as is known."""
        return self.origins[number] or Origin(self.where[number])


class Conflict(NamedTuple):
    """Two embeddings of one sample that are further apart than the tolerance.

    Args:
        sample_id: The sample.
        stored: Who computed the one that was stored, or that was given first.
        given: Who computed the other.
        max_abs: Largest difference of two elements; infinite if their shapes differ.
        cosine: 1 less the cosine of the angle between them; 0 is the same direction.
        kept: Which of them is stored now; `"neither"` if two given ones differ and none was taken.
    """

    sample_id: str
    stored: Origin
    given: Origin
    max_abs: float
    cosine: float
    kept: Literal["stored", "given", "neither"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        # Embeddings of different shapes are infinitely far apart, which JSON has no number for.
        max_abs = self.max_abs if math.isfinite(self.max_abs) else None
        origins = {"stored": self.stored.to_dict(), "given": self.given.to_dict()}
        return {**self._asdict(), "max_abs": max_abs, **origins}


class Refusal(NamedTuple):
    """Something that can't be brought in: one sample, or a source as a whole.

    Args:
        where: The source, or what the source calls the sample.
        sample_id: None if it concerns more than one sample, or no sample id is known.
        reason: Why.
    """

    where: str
    sample_id: str | None
    reason: str

    def __str__(self) -> str:
        # Sources that are files of sample ids call a sample by its id.
        return ": ".join(dict.fromkeys(filter(None, (self.where, self.sample_id, self.reason))))


@dataclass
class IntakeReport(Report):
    """What came into one store.

    Args:
        path: The store's folder.
        config: Its identity.
        on_duplicate: What happens to a sample that is stored with another value.
        tolerance: Largest difference of two elements that counts as none.
        is_dry_run: Whether nothing was written.
        num_new: Embeddings that weren't stored.
        num_bytes: Bytes of these.
        num_same: Embeddings that are bit for bit what is stored.
        num_close: Within the tolerance of what is stored, which is kept.
        conflicts: Those further apart.
        refused: What can't be stored here, or is damaged.
        notes: What else is worth knowing.
    """

    derived: ClassVar[tuple[str, ...]] = ("fingerprint",)

    path: Path
    config: CacheConfig
    on_duplicate: OnDuplicate = "error"
    tolerance: float = DEFAULT_TOLERANCE
    is_dry_run: bool = False
    num_new: int = 0
    num_bytes: int = 0
    num_same: int = 0
    num_close: int = 0
    conflicts: list[Conflict] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the store's config."""
        return self.config.fingerprint

    @property
    def unresolved(self) -> list[Conflict]:
        """The conflicts that `on_duplicate` leaves undecided."""
        return self.conflicts if self.on_duplicate == "error" else []

    @property
    def exit_code(self) -> int:
        """1 if something was left out."""
        return 1 if self.unresolved or self.refused else 0

    def absorb(self, found: IntakeReport) -> None:
        """Add what was found of further rows."""
        for name in ("num_new", "num_bytes", "num_same", "num_close"):
            setattr(self, name, getattr(self, name) + getattr(found, name))
        self.conflicts += found.conflicts
        self.refused += found.refused
        self.notes += found.notes

    def refuse(self, where: str, sample_id: str, error: object) -> None:
        """Note why an embedding can't be brought in."""
        reason = str(error).removeprefix(f"{sample_id}: ")
        self.refused.append(Refusal(where, sample_id, reason))

    def __str__(self) -> str:
        would = "would be " if self.is_dry_run else ""
        parts = [f"{self.num_new} {would}new", f"{self.num_same} stored already"]
        if self.num_close:
            parts.append(f"{self.num_close} within {self.tolerance:g} of what is stored")
        if self.conflicts:
            outcome = {
                "error": "left as they are",
                "skip": "the stored ones are kept",
                "overwrite": "the given ones are taken",
            }[self.on_duplicate]
            parts.append(f"{len(self.conflicts)} in conflict ({outcome})")
        if self.refused:
            parts.append(f"{len(self.refused)} refused")
        return f"{self.fingerprint} {self.config.title}: {', '.join(parts)}"


class Intake:
    """Brings embeddings that were computed elsewhere into one store.

    What is stored already is never written again: the same bytes are counted, others are compared.
    Within the tolerance the stored one is kept; further apart it is a conflict. Rows are written
    in transactions of some MiB, each durable, so an intake that is killed continues where it was
    when it is started again. Other processes may write to the store at the same time.

    Args:
        cache: The cache.
        config: Identity of the store, which is made with the first embedding.
        tolerance: Largest difference of two elements that counts as none.
        on_duplicate: For a sample that is stored with another value: `"error"` leaves it as it is
            and lists both as unresolved, `"skip"` keeps it, `"overwrite"` takes the given one. Of
            several given for one sample, the same holds between the first and the others; with
            `"error"`, none of them is taken.
        ragged: Let the first dimension differ between embeddings, if the store is new.
        dry_run: Only find out what would be done.
        dataset_root: Kept in the metadata of a new store.
        without_provenance: Add to a store of known weights although `provenance` states none.
        read_back: Read what was written once more, and refuse what isn't as it was given.

    Raises:
        ConfigError: An argument is invalid.
        IntegrityError: The store is damaged.
        ReadOnlyCacheError: It can't be written.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        config: CacheConfig,
        *,
        tolerance: float = DEFAULT_TOLERANCE,
        on_duplicate: OnDuplicate = "error",
        ragged: bool = False,
        dry_run: bool = False,
        dataset_root: str = "",
        without_provenance: bool = False,
        read_back: bool = False,
    ) -> None:
        check_on_duplicate(on_duplicate)
        if not tolerance >= 0:
            raise ConfigError(f"tolerance: {tolerance!r}; it is 0 or more")
        if not dry_run:
            cache.check_writable(config)
        path = cache.path(config)
        if config in cache:
            # LMDB follows damaged pages into nowhere: look before it does.
            check_pages(path)
        self.report = IntakeReport(path, config, on_duplicate, float(tolerance), dry_run)
        self._cache = cache
        self._ragged = ragged
        self._dataset_root = dataset_root
        self._without_provenance = without_provenance
        self._reads_back = read_back
        # During `add`. LMDB keeps the memory of its pages from one commit to the next.
        self._writer: EmbeddingWriter | None = None
        self._before_commit: Callable[[Mapping[str, Any]], None] | None = None
        # Of a dry run: what would be stored by now.
        self._would_be: dict[bytes, bytes] = {}

    def stored(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the checksums of those that are stored, or by a dry run would be."""
        with self._look() as look:
            return self._stored(look, keys)

    def metadata(self) -> StoreMetadata | None:
        """Return the store's metadata; None until there is a store."""
        with self._look() as look:
            return None if look is None else look.metadata

    def checked(
        self,
        sample_ids: Sequence[str],
        embeddings: npt.NDArray[Any] | Sequence[Any],
        origin: Origin,
        *,
        checksums: Sequence[bytes] | None = None,
    ) -> Iterator[Rows]:
        """Yield embeddings that come in; those that can't be stored are refused.

        Args:
            sample_ids: `(n,)` sample ids.
            embeddings: One for each, in the stored dtype: `(n, *embedding_shape)`, or a sequence.
            origin: Who computed them.
            checksums: The checksum that each had where it comes from; one that doesn't match is
                refused.

        Raises:
            InvalidEmbeddingError: Not as many embeddings as sample ids.
        """
        if len(sample_ids) != len(embeddings) or len(checksums or sample_ids) != len(sample_ids):
            raise InvalidEmbeddingError(
                f"{len(embeddings)} embeddings and {len(checksums or sample_ids)} checksums for "
                f"{len(sample_ids)} sample ids"
            )
        parts = (slice(n, n + _KEYS_AT_ONCE) for n in range(0, len(sample_ids), _KEYS_AT_ONCE))
        rows = (
            self._checked(
                sample_ids[part], embeddings[part], origin.writer, checksums and checksums[part]
            )
            for part in parts
        )
        return Rows.in_memory(chain.from_iterable(rows), origin)

    def _checked(
        self,
        sample_ids: Sequence[str],
        embeddings: npt.NDArray[Any] | Sequence[Any],
        where: str,
        checksums: Sequence[bytes] | None,
    ) -> Iterator[tuple[bytes, bytes, npt.NDArray[Any], str]]:
        dtype = self.report.config.dtype
        if isinstance(embeddings, np.ndarray) and embeddings.ndim > 1:
            # All at once; one by one only where something is wrong, to know what.
            is_sound = False
            with contextlib.suppress(InvalidSampleIdError, InvalidEmbeddingError):
                keys = sample_keys(sample_ids)
                block = as_stored("", embeddings, dtype, copy=False)
                values, sums = list(block), checksums_of(keys, encoded(block, dtype))
                is_sound = checksums is None or sums == list(checksums)
            if is_sound:
                yield from zip(keys, sums, values, repeat(where))
                return
        for number, (sample_id, embedding) in enumerate(zip(sample_ids, embeddings, strict=True)):
            try:
                key = sample_key(sample_id)
                value = as_stored(sample_id, embedding, dtype, copy=False)
                found = checksum(key, encoded(value, dtype))
                if checksums is not None and found != bytes(checksums[number]):
                    raise InvalidEmbeddingError("the value doesn't match its checksum")
            except (InvalidSampleIdError, InvalidEmbeddingError) as error:
                self.report.refuse(where, sample_id, error)
                continue
            yield key, found, value, where

    def add(
        self,
        rows: Iterable[Rows],
        provenance: Mapping[str, str],
        *,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Bring in these; durable when this returns.

        Args:
            rows: Taken block by block. All rows of one sample are in one block. Rows in the order
                of their keys fill the pages of a new store. Of windows, the first of a recording
                comes behind all others, in whichever call: it says that they are stored. It is
                refused if one of them was.
            provenance: Of all of them; compared with the store's.
            advance: Called with the number of rows that are done since the last call.

        Raises:
            ProvenanceMismatchError: The store was filled with other weights; nothing was written.
            CacheFullError: The disk is full; what was committed stays.
        """
        try:
            for block in chain.from_iterable(map(self._parts, rows)):
                start = 0
                while start < len(block.keys):
                    end = self._bring_in(block, start, provenance)
                    if advance is not None:
                        advance(end - start)
                    start = end
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def _parts(self, rows: Rows) -> Iterator[Rows]:
        """Yield rows that are brought in one after the other; see `add` for those of windows."""
        if self.report.config.window is None:
            yield rows
            return
        others: list[int] = []
        first: list[int] = []
        for number, key in enumerate(rows.keys):
            name = rows.sample_id(number)
            try:
                check_window_key(key, self.report.config)
            except InvalidSampleIdError as error:
                self.report.refuse(rows.where[number], name, error)
            else:
                (first if is_first_window(name) else others).append(number)
        yield rows.chosen(others)
        # Now it is known which of the others are refused.
        refused = {refusal.sample_id or "" for refusal in self.report.refused}
        incomplete = set(map(recording_of, refused))
        whole = []
        for number in first:
            name = rows.sample_id(number)
            if recording_of(name) in incomplete:
                reason = "other windows of this recording are refused"
                self.report.refuse(rows.where[number], name, reason)
            else:
                whole.append(number)
        yield rows.chosen(whole)

    # ---- one look at the store, one transaction

    def _bring_in(self, rows: Rows, start: int, provenance: Mapping[str, str]) -> int:
        """Bring in as many as one transaction takes; return where the following begin."""
        # Ends before anything is written, or old pages would be kept.
        with self._look() as reader:
            look = _Look(
                self.report, rows, reader, partial(self._stored, reader), ragged=self._ragged
            )
            end = look.judge_batch(start)
        if look.changes and not self.report.is_dry_run:
            try:
                self._write(look, provenance)
            except _ConcurrentWriteError:
                return start  # others write to this store: look again
            if self._reads_back:
                self._read_back(look)
        if self.report.is_dry_run:
            changed = [number for number, _, _ in look.changes]
            self._would_be.update({rows.keys[n]: rows.checksums[n] for n in changed})
        self.report.absorb(look.found)
        return end

    @contextlib.contextmanager
    def _look(self) -> Iterator[EmbeddingReader | None]:
        """What is stored now; None until there is a store."""
        with contextlib.ExitStack() as stack:
            reader = None
            with contextlib.suppress(CacheNotFoundError):
                reader = stack.enter_context(
                    self._cache.reader(self.report.config, track_usage=False)
                )
                reader.pinned()
            yield reader

    def _stored(self, reader: EmbeddingReader | None, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        stored = {} if reader is None else reader.checksums_of(keys)
        would_be = {key: self._would_be[key] for key in keys if key in self._would_be}
        return {**would_be, **stored} if would_be else stored

    def _write(self, look: _Look, provenance: Mapping[str, str]) -> None:
        """Write what changes in one transaction.

        Raises:
            _ConcurrentWriteError: One of the samples isn't stored as it was; nothing was written.
        """
        path, rows = self.report.path, look.rows
        numbers, values, replaced = zip(*look.changes, strict=True)
        keys = [rows.keys[number] for number in numbers]
        checksums = [rows.checksums[number] for number in numbers]
        names = list(map(sample_id_of_key, keys))
        expected = dict(zip(names, zip(replaced, checksums, strict=True), strict=True))

        def recorded(column: Sequence[Any]) -> list[tuple[str, bytes | None, bytes, Any]]:
            chosen = zip(names, replaced, checksums, map(column.__getitem__, numbers), strict=True)
            return [record for record in chosen if record[3] is not None]

        def before_commit(committed: Mapping[str, Any]) -> None:
            if committed != expected:
                raise _ConcurrentWriteError
            sources, origins = recorded(rows.sources), recorded(rows.origins)
            if sources or origins:
                write_sources(path, sources, origins=origins)

        self._before_commit = before_commit
        if self._writer is None:
            self._writer = self._open_writer(provenance)
        try:
            self._writer.put_stored(keys, values, checksums)
            self._writer.commit()
        except BaseException:
            self._writer.discard()
            raise

    def _open_writer(self, provenance: Mapping[str, str]) -> EmbeddingWriter:
        def before_commit(committed: Mapping[str, Any]) -> None:
            if self._before_commit is not None:
                self._before_commit(committed)

        return EmbeddingWriter(
            self.report.path,
            self.report.config,
            on_duplicate="overwrite",  # what `before_commit` allows
            ragged=self._ragged,
            provenance=provenance,
            without_provenance=self._without_provenance,
            dataset_root=self._dataset_root,
            commit_bytes=_NO_LIMIT,
            commit_records=_NO_LIMIT,
            commit_seconds=math.inf,
            before_commit=before_commit,
        )

    def _read_back(self, look: _Look) -> None:
        """Refuse those that were just written and aren't stored as they were given."""
        rows = look.rows
        with self._look() as reader:
            for n, _, _ in look.changes:
                if reader is None or _sound_value(reader, rows.keys[n], rows.checksums[n]) is None:
                    look.refuse(n, "read back, it isn't what was given")


class _ConcurrentWriteError(Exception):
    """Another process has written one of the samples since the look; nothing was written."""


class _Look:
    """What one look at the store says about some rows.

    Args:
        report: What is asked for.
        rows: These rows.
        reader: The store; None until it is made.
        lookup: Returns the checksums that are stored of some keys.
        ragged: Whether the first dimension may differ, in a new store.
    """

    def __init__(
        self,
        report: IntakeReport,
        rows: Rows,
        reader: EmbeddingReader | None,
        lookup: Callable[[Sequence[bytes]], Mapping[bytes, bytes]],
        *,
        ragged: bool,
    ) -> None:
        self.rows = rows
        self._asked = report
        self._reader = reader
        self._lookup = lookup
        self._stored: Mapping[bytes, bytes] = {}
        self._shape = None if reader is None else reader.embedding_shape
        self._ragged = ragged
        self._checksums_in_conflict: dict[str, bytes] = {}
        self._fitting_shapes: set[tuple[int, ...]] = set()
        self.found = IntakeReport(report.path, report.config)
        self.changes: list[_Change] = []

    def judge_batch(self, start: int) -> int:
        """Judge as many rows from a position on as one transaction takes, whole samples.

        Returns:
            The position behind them.
        """
        keys = self.rows.keys
        looked_up = start
        number, num_bytes, last = start, 0, min(start + _BATCH_RECORDS, len(keys))
        while number < last and num_bytes < _BATCH_BYTES:
            if number >= looked_up:
                looked_up = number + _KEYS_AT_ONCE
                self._stored = self._lookup(keys[number:looked_up])
            end = number + 1
            while end < len(keys) and keys[end] == keys[number]:
                end += 1
            num_bytes += self._judge(number, end)
            number = end
        if self._checksums_in_conflict:
            with SourceRecords(self._asked.path) as records:
                origins = records.origins(self._checksums_in_conflict)
            self.found.conflicts = [
                conflict._replace(stored=origins.get(conflict.sample_id, THIS_STORE))
                if conflict.stored is THIS_STORE
                else conflict
                for conflict in self.found.conflicts
            ]
        return number

    def _judge(self, start: int, end: int) -> int:
        """Compare the rows of one sample with what is stored, and with each other.

        Returns:
            The bytes to write.
        """
        rows = self.rows
        before = kept = self._stored.get(rows.keys[start])
        taken: _Change | None = None  # instead of the stored one, or where there is none
        num_conflicts = len(self.found.conflicts)
        for number in range(start, end):
            expected = rows.checksums[number]
            if expected == kept:
                self.found.num_same += 1
                continue
            try:
                value = rows.read(number)
                if value.shape not in self._fitting_shapes:
                    self._check_shape(number, value)
            except CacheError as error:
                self.refuse(number, error)
                continue
            if kept is None or self._replaces(number, value, taken):
                taken, kept = (number, value, before), expected
        if taken is None or kept == before:
            return 0
        is_disputed = before is None and len(self.found.conflicts) > num_conflicts
        if is_disputed and self._asked.on_duplicate == "error":
            return 0  # which of them is right isn't for their order to decide
        num_bytes = value_bytes(taken[1].shape, self._asked.config.dtype)
        if before is None:
            self.found.num_new += 1
            self.found.num_bytes += num_bytes
        self.changes.append(taken)
        return num_bytes

    def refuse(self, number: int, error: object) -> None:
        """Note why the row at a position can't be brought in."""
        self.found.refuse(self.rows.where[number], self.rows.sample_id(number), error)

    def _check_shape(self, number: int, value: npt.NDArray[Any]) -> None:
        if self._shape is None:  # the first of a new store decides
            shape: tuple[int | None, ...] = value.shape
            shape = (None, *shape[1:]) if self._ragged and shape else shape
            stored_form(shape, self._asked.config.dtype)  # refuses one without rows
            self._shape = shape
        check_shape(self.rows.sample_id(number), value.shape, self._shape)
        self._fitting_shapes.add(value.shape)

    def _replaces(self, number: int, value: npt.NDArray[Any], taken: _Change | None) -> bool:
        """Compare an embedding with the one before it, and note the outcome.

        Args:
            number: Its position.
            value: The embedding.
            taken: What it is compared with; None: what is stored.

        Returns:
            Whether it is to be stored instead.
        """
        key, sample_id = self.rows.keys[number], self.rows.sample_id(number)
        overwrites = self._asked.on_duplicate == "overwrite"
        by = THIS_STORE if taken is None else self.rows.by(taken[0])
        if taken is not None:
            other: npt.NDArray[Any] | None = taken[1]
        elif self._reader is None or (self._asked.is_dry_run and sample_id not in self._reader):
            self.found.notes.append(
                f"{sample_id}: this dry run met two embeddings, and compared neither"
            )
            return False
        else:
            other = _sound_value(self._reader, key, self._stored[key])
        if other is None and overwrites:
            text = f"the stored value of {sample_id} was damaged, and was replaced"
            self.found.notes.append(text)
            return True
        if other is None:
            reason = "the value that is stored is damaged: repair the store, and do this again"
            where = str(self._asked.path)
            self.found.refused.append(Refusal(where, sample_id, reason))
            return False
        max_abs = largest_difference(other, value)
        if max_abs <= self._asked.tolerance:
            self.found.num_close += 1
            return False
        cosine = difference_of(other, value).cosine
        is_undecided = taken is not None and self._asked.on_duplicate == "error"
        kept: Literal["stored", "given", "neither"] = "neither" if is_undecided else "stored"
        self.found.conflicts.append(
            Conflict(
                sample_id,
                by,
                self.rows.by(number),
                max_abs,
                cosine,
                "given" if overwrites else kept,
            )
        )
        if taken is None:
            self._checksums_in_conflict[sample_id] = self._stored[key]
        return overwrites


def _sound_value(reader: EmbeddingReader, key: bytes, expected: bytes) -> npt.NDArray[Any] | None:
    """The stored value of a key; None if it doesn't have its checksum."""
    try:
        value = reader[sample_id_of_key(key)]
    except IntegrityError:
        return None
    return value if is_what_is_stored(key, value, reader.config.dtype, expected) else None

"""`merge_stores`: stores of other roots into those of one."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from heapq import merge as merge_sorted
from itertools import islice, starmap, zip_longest
from operator import itemgetter, ne
from pathlib import Path
from typing import Any, Final

import lmdb
import numpy.typing as npt

from lmdbcache.cache import (
    DEFAULT_TOLERANCE,
    EmbeddingCache,
    Origin,
    Source,
    SourceRecords,
    is_store,
    read_failures,
    update_failures,
)
from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    CacheFullError,
    ConfigError,
    FormatVersionError,
    IntegrityError,
    InvalidSampleIdError,
    ReadOnlyCacheError,
)
from lmdbcache.exchange.intake import Intake, IntakeReport, Refusal, Rows
from lmdbcache.exchange.staging_lock import RUNNING_SUFFIX, at_rest
from lmdbcache.files import expand_user, few
from lmdbcache.storage import (
    DamagedStore,
    EmbeddingReader,
    OnDuplicate,
    Progress,
    Report,
    StoreMetadata,
    check_pages,
    checksum,
    data_file,
    from_stored,
    is_first_window,
    is_what_is_stored,
    sample_id_of_key,
    sample_key,
    sample_keys,
    unnamed_generations,
    write_lock,
)

_DEPTH: Final = 6  # of folders below a source
# Open at once. Those after them meet what these have left.
_STORES_AT_ONCE: Final = 128
_DESCRIPTORS_PER_STORE, _OTHER_DESCRIPTORS = 6, 64
# A rank that was ended commits what it has.
_PATIENCE_SECONDS: Final = 10.0
_KEYS_AT_ONCE: Final = 4096
_VALUES_AT_ONCE, _BYTES_AT_ONCE = 256, 1 << 20

_Found = tuple[bytes, int, bytes]  # a key, the number of the store that has it, the checksum


@dataclass
class MergeReport(Report):
    """What came into the stores of one root.

    Args:
        stores: One report for each store.
        refused: Sources whose config isn't known.
        notes: What else is worth knowing.
    """

    stores: list[IntakeReport] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 if something was left out."""
        return 1 if self.refused or any(store.exit_code for store in self.stores) else 0

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.stores, *self.refused, *self.notes)))


def merge_stores(
    cache: EmbeddingCache,
    sources: Iterable[str | os.PathLike[str]],
    *,
    configs: Collection[CacheConfig] | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    on_duplicate: OnDuplicate = "error",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge stores into those of the same configs under one root.

    What is damaged in a source is left out and reported, the rest is merged. Committed batch by
    batch: stopped at any moment, the same call continues where it was.

    Args:
        cache: Where they go.
        sources: Stores, roots, or folders that hold roots.
        configs: Only stores of these; None takes all.
        tolerance: Largest difference of two elements that counts as none.
        on_duplicate: For a sample that is stored with another value: `"error"` leaves it as it is,
            and takes neither of two sources that differ; `"skip"` keeps what is stored, or the
            first source's; `"overwrite"` takes the last source's.
        dry_run: Only find out what would be done.
        progress: Called with (embeddings done, embeddings in all).

    Returns:
        What was merged and what wasn't.

    Raises:
        CacheFullError: The disk is full; what was committed stays.
        ReadOnlyCacheError: The root can't be written.
    """
    run = _Merge(cache, tolerance, on_duplicate, dry_run=dry_run, progress=progress)
    paths, step = run.find(sources), _stores_at_once()
    for start in range(0, len(paths), step):
        with contextlib.ExitStack() as stack:
            run.merge(run.open(paths[start : start + step], configs, stack))
    return run.report


def _stores_at_once() -> int:
    """As many as this process may have open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _STORES_AT_ONCE
    return max(1, min(_STORES_AT_ONCE, (limit - _OTHER_DESCRIPTORS) // _DESCRIPTORS_PER_STORE))


class _Merge:
    """One call of `merge_stores`."""

    def __init__(
        self,
        cache: EmbeddingCache,
        tolerance: float,
        on_duplicate: OnDuplicate,
        *,
        dry_run: bool,
        progress: Progress | None,
    ) -> None:
        self.report = MergeReport()
        self._cache = cache
        self._tolerance = tolerance
        self._on_duplicate: OnDuplicate = on_duplicate
        self._dry_run = dry_run
        self._progress = progress
        self._intakes: dict[CacheConfig, Intake] = {}
        self._done = self._total = 0
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._detail = {"merged_at": now, "merged_on": socket.gethostname()}
        self._deadline = time.monotonic() + _PATIENCE_SECONDS
        self._own = {number: store for store in cache.folders() if (number := _file_number(store))}

    def _refuse(self, path: Path, error: object) -> None:
        self.report.refused.append(_refusal(path, error))

    # ---- which stores

    def find(self, sources: Iterable[str | os.PathLike[str]]) -> list[Path]:
        """Return the stores under these folders, each once, in order; nothing in them is opened.

        The same store by another path, a link or hard links is taken once.
        """
        found: dict[tuple[int, int] | Path, Path] = {}
        for source in sources:
            folder = expand_user(source).absolute()
            notes: list[str] = []
            refused: list[Refusal] = []
            stores = list(_stores_under(folder, _DEPTH, notes, refused))
            for store in stores:
                number = _file_number(store) or store
                if number in found:
                    notes.append(f"{store} is {found[number]}: taken once")
                else:
                    found[number] = store
            if not (stores or notes or refused):
                # Left by ranks of a staged extraction that had nothing to store.
                if folder.is_dir() and any(folder.rglob(f"*{RUNNING_SUFFIX}")):
                    notes.append(f"{folder}: the ranks had nothing to store")
                else:
                    refused.append(_refusal(folder, _nothing_in(folder)))
            self.report.notes += notes
            self.report.refused += refused
        return list(found.values())

    def open(
        self,
        paths: Iterable[Path],
        configs: Collection[CacheConfig] | None,
        stack: contextlib.ExitStack,
    ) -> dict[CacheConfig, list[_Source]]:
        """Open stores by their config; those of the root itself are passed over."""
        opened: dict[CacheConfig, list[_Source]] = {}
        for path in paths:
            own = self._own.get(_file_number(path) or (0, 0))
            is_below_root = own is not None and own.resolve() == path.resolve()
            if own is not None and not is_below_root:
                self.report.notes.append(f"{path} is a store of {self._cache.root} itself")
                continue
            try:
                # No rank of a staged extraction, of this or another machine, may write it.
                stack.enter_context(at_rest(path.resolve(), self._deadline))
                # A store of the root may be the target: nobody else could write to it then.
                store = _open_source(path, stack, takes_lock=not is_below_root)
            except (CacheError, OSError) as error:
                self._refuse(path, error)
                continue
            config = store.metadata.config
            if path.resolve() == self._cache.path(config).resolve():
                self.report.notes.append(f"{path} is a store of {self._cache.root} itself")
            elif configs is None or config in configs:
                opened.setdefault(config, []).append(store)
        return opened

    # ---- into one store

    def merge(self, opened: Mapping[CacheConfig, list[_Source]]) -> None:
        """Merge stores that are open, by their config."""
        self._total += sum(store.num_embeddings for each in opened.values() for store in each)
        for config, stores in opened.items():
            done = self._done
            try:
                self._merge_into(config, stores)
            except CacheFullError:
                raise
            except (CacheError, OSError) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise CacheFullError(f"{error}. Free space and merge again") from None
                self._refuse(self._cache.path(config), error)
            self._done = done
            self._advance(sum(store.num_embeddings for store in stores))

    def _merge_into(self, config: CacheConfig, stores: list[_Source]) -> None:
        intake = self._intake(config, stores)
        stores, provenance = self._fitting(stores, intake)
        intake.add(self._rows(stores, intake.report), provenance, advance=self._advance)
        for store in stores:
            if store.records_problem is not None:
                text = f"merged without its records: {store.records_problem}"
                intake.report.notes.append(text)
        if not self._dry_run:
            try:
                self._merge_failures(config, stores)
            except (OSError, ReadOnlyCacheError) as error:
                intake.report.notes.append(f"the list of failed clips isn't complete: {error}")

    def _intake(self, config: CacheConfig, stores: list[_Source]) -> Intake:
        if config not in self._intakes:
            self._intakes[config] = Intake(
                self._cache,
                config,
                tolerance=self._tolerance,
                on_duplicate=self._on_duplicate,
                ragged=any(None in (store.metadata.embedding_shape or ()) for store in stores),
                dry_run=self._dry_run,
                dataset_root=next(filter(None, (s.metadata.dataset_root for s in stores)), ""),
            )
            self.report.stores.append(self._intakes[config].report)
        return self._intakes[config]

    def _fitting(
        self, stores: list[_Source], intake: Intake
    ) -> tuple[list[_Source], Mapping[str, str]]:
        """The stores that may be merged at all, and their provenance with the target's."""
        report, fitting = intake.report, []
        known = intake.metadata() or StoreMetadata.new(report.config)
        for store in stores:
            if store.damage is not None:
                text = f"damaged; what is sound of it is merged ({store.damage})"
                report.refused.append(_refusal(store.path, text))
            report.refused += [Refusal(store.where, name, "damaged") for name in store.lost]
            shape = store.metadata.embedding_shape
            if shape is None:
                report.notes.append(f"{store.path} is empty")
                continue
            try:
                _check_shapes(shape, known.embedding_shape)
                combined = known.with_provenance(store.metadata.provenance, report.path)
                combined.pack()
            except CacheError as error:
                report.refused.append(_refusal(store.path, error))
                continue
            if known.states_weights and not store.metadata.states_weights:
                report.notes.append(
                    f"{store.path} doesn't state which weights computed its embeddings; those of "
                    f"{report.path} are known"
                )
            if known.embedding_shape is None:
                ragged = any(None in (s.metadata.embedding_shape or ()) for s in stores)
                shape = (None, *shape[1:]) if ragged and shape else shape
                combined = StoreMetadata(known.config, shape, provenance=combined.provenance)
            known = combined
            fitting.append(store)
        return fitting, known.provenance

    def _rows(self, stores: Sequence[_Source], report: IntakeReport) -> Iterator[Rows]:
        """The rows of several stores side by side, in the order of their keys.

        So the pages of a new store are full, and what several sources have of a sample meets.
        """
        found: Iterator[_Found] = merge_sorted(
            *(_keys_of(n, store, report) for n, store in enumerate(stores))
        )
        if report.config.window is not None:
            found = _first_windows_last(found)
        origins = [store.origin._replace(detail=self._detail) for store in stores]
        following = next(found, None)
        while following is not None:
            chunk = [following, *islice(found, _KEYS_AT_ONCE - 1)]
            # A sample's rows stay together.
            while (following := next(found, None)) and following[0] == chunk[-1][0]:
                chunk.append(following)
            yield _rows_of(chunk, stores, origins)

    def _merge_failures(self, config: CacheConfig, stores: Iterable[_Source]) -> None:
        """Bring the sources' failed clips along, but for those that are stored now."""
        path = self._cache.path(config)
        failed = {
            failure.sample_id: failure
            for folder in (path, *(store.path for store in stores))
            for failure in read_failures(folder)
        }
        if failed:
            missing = self._cache.coverage(config, list(failed)).missing
            update_failures(path, failed, [failed[sample_id] for sample_id in missing])

    def _advance(self, number: int) -> None:
        self._done += number
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _rows_of(found: Sequence[_Found], stores: Sequence[_Source], origins: Sequence[Origin]) -> Rows:
    """Rows with their records, by what is known of keys; `origins` are those of the rest."""
    keys, numbers, checksums = zip(*found, strict=True)
    names = list(map(sample_id_of_key, keys))
    asked: list[dict[str, bytes]] = [{} for _ in stores]
    for name, number, expected in zip(names, numbers, checksums, strict=True):
        asked[number][name] = expected
    records = [store.records(those) for store, those in zip(stores, asked, strict=True)]
    pairs = list(zip(names, numbers, strict=True))
    is_canonical = False
    with contextlib.suppress(InvalidSampleIdError):
        is_canonical = sample_keys(names) == list(keys)

    def read(number: int) -> npt.NDArray[Any]:
        key, name = keys[number], names[number]
        if not is_canonical and sample_key(name) != key:
            raise InvalidSampleIdError(f"{name!r} isn't how a sample id is stored")
        store: _Source = stores[numbers[number]]
        return store.value(key, name, checksums[number])

    return Rows(
        keys,
        checksums,
        read,
        [stores[number].where for number in numbers],
        [records[number][0].get(name, origins[number]) for name, number in pairs],
        [records[number][1].get(name) for name, number in pairs],
    )


def _first_windows_last(found: Iterable[_Found]) -> Iterator[_Found]:
    """Yield the first window of each recording behind all others, see `Intake.add`."""
    first = []
    for entry in found:
        if is_first_window(sample_id_of_key(entry[0])):
            first.append(entry)
        else:
            yield entry
    yield from first


def _keys_of(number: int, store: _Source, report: IntakeReport) -> Iterator[_Found]:
    try:
        for key, expected in store.checksums():
            yield key, number, expected
    except CacheError as error:
        # What came before is merged, and all of the other stores.
        report.refused.append(_refusal(store.path, error))


def _check_shapes(theirs: Sequence[int | None], ours: Sequence[int | None] | None) -> None:
    if ours is None:
        return
    if len(theirs) != len(ours) or any(
        a is not None and b is not None and a != b for a, b in zip(theirs, ours, strict=True)
    ):
        raise ConfigError(
            f"its embeddings have shape {tuple(theirs)}, those of the store {tuple(ours)}. "
            "Another output or length needs another config"
        )


def _refusal(store: Path, error: object) -> Refusal:
    """Why a store as a whole can't be merged, or be merged into."""
    where = os.fspath(store)
    # The path isn't said twice; that of a file in the store is another one.
    return Refusal(where, None, str(error).removeprefix(f"{where}: ").removeprefix(f"{where} "))


# ---- finding the stores


def _stores_under(
    folder: Path, depth: int, notes: list[str], refused: list[Refusal]
) -> Iterator[Path]:
    """Yield the stores in a folder and those below it; note what is passed over or refused."""
    try:
        if is_store(folder):
            yield folder
            return
        entries = sorted(folder.iterdir())
        generations = unnamed_generations(folder)
    except (NotADirectoryError, FileNotFoundError):
        return
    except OSError as error:
        refused.append(_refusal(folder, f"can't be listed ({error.strerror})"))
        return
    if any(generations.values()):
        text = (
            f"CURRENT is missing, and {few(generations)} holds embeddings: nothing of it is "
            "merged. If they weren't removed on purpose, write the generation's name into "
            "CURRENT and merge again"
        )
        refused.append(_refusal(folder, text))
    elif generations:
        notes.append(f"{folder} is a store that was never written to: passed over")
    elif depth:
        for child in entries:
            # Links to folders may lead round in a circle.
            if child.is_dir() and (not child.is_symlink() or is_store(child)):
                yield from _stores_under(child, depth - 1, notes, refused)


def _nothing_in(folder: Path) -> str:
    if not folder.exists():
        return "the folder doesn't exist"
    if not folder.is_dir():
        return "a file; a source is the folder of a store, a root, or a folder of roots"
    return "it holds no store"


def _file_number(store: Path) -> tuple[int, int] | None:
    """What distinguishes a store's data from any other's, by whichever path; None if unknown."""
    try:
        status = data_file(store).stat()
    except (CacheError, OSError):
        return None
    return status.st_dev, status.st_ino


# ---- reading them


class _Source(ABC):
    """One store to read from, as of when it was opened; nothing of it is changed.

    Args:
        path: Its folder.
        metadata: Its metadata record.
        num_embeddings: How many can be read, as far as is known.
        stack: Closes what it opens.
        damage: What is wrong with it as a whole, or None.
        lost: Sample ids of damaged values.
    """

    def __init__(
        self,
        path: Path,
        metadata: StoreMetadata,
        num_embeddings: int,
        stack: contextlib.ExitStack,
        damage: str | None = None,
        lost: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.where = os.fspath(path)
        self.metadata = metadata
        self.num_embeddings = num_embeddings
        self.damage = damage
        self.lost = lost
        # Of what has no origin of its own.
        self.origin = Origin(self.where, {}, metadata.provenance)
        self.records_problem: str | None = None
        self._records: SourceRecords | None = None
        try:
            self._records = stack.enter_context(SourceRecords(path))
        except CacheError as error:  # concerns nothing else
            self.records_problem = str(error)

    @abstractmethod
    def checksums(self) -> Iterator[tuple[bytes, bytes]]:
        """(key, checksum) by key."""

    @abstractmethod
    def _bytes(self, key: bytes) -> Any:
        """The stored buffer of a key, whether it is sound or not; None if it can't be read."""

    def value(self, key: bytes, name: str, expected: bytes) -> npt.NDArray[Any]:
        """The embedding of a key and its sample id.

        Raises:
            IntegrityError: It isn't what was written.
        """
        content = self._bytes(key)
        if content is None or checksum(key, content) != expected:
            raise IntegrityError("the value doesn't match its checksum")
        dtype, shape = self.metadata.config.dtype, self.metadata.embedding_shape
        embedding = from_stored(name, content, dtype, shape, copy=False)
        if dtype == "int8" and not is_what_is_stored(key, embedding, dtype, expected):
            raise IntegrityError("the int8 value isn't in its one form; docs/format.md has it")
        return embedding

    def records(
        self, checksums: Mapping[str, bytes]
    ) -> tuple[Mapping[str, Origin], Mapping[str, Source]]:
        """Who computed these, and from which files, where the store knows."""
        if self._records is not None and self.records_problem is None:
            try:
                return self._records.origins(checksums), self._records.of(checksums)
            except CacheError as error:
                self.records_problem = str(error)
        return {}, {}


class _SoundSource(_Source):
    """Read through LMDB, from one snapshot."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        # LMDB follows damaged pages into nowhere: look before it does.
        check_pages(path)
        self._reader = stack.enter_context(EmbeddingReader(path, track_usage=False))
        super().__init__(path, self._reader.metadata, len(self._reader), stack)
        self._check_keys()
        # What was read together with the last value that had to be read, and how much of it
        # was asked for.
        self._read: Mapping[bytes, bytes] = {}
        self._num_used = 0

    def _check_keys(self) -> None:
        """Both databases have the same keys, in order; else a sample could be lost unnamed."""
        # A reader that verifies lists the embeddings themselves; others list their checksums.
        with EmbeddingReader(self.path, verify="first_read", track_usage=False) as reader:
            names = map(sample_id_of_key, map(itemgetter(0), reader.checksums()))
            if any(starmap(ne, zip_longest(reader, names))):
                raise IntegrityError(
                    f"{self.path} is damaged (embeddings and checksums have different keys)"
                )

    def checksums(self) -> Iterator[tuple[bytes, bytes]]:
        return self._reader.checksums()

    def _bytes(self, key: bytes) -> Any:
        # Rows come by key. Where all values are needed, many are read at once; where few are,
        # hardly more than these.
        if key not in self._read:
            number, self._num_used = 1 + 2 * self._num_used, 0
            read = partial(_values_from, key, min(number, _VALUES_AT_ONCE))
            self._read = self._reader.read_pinned(lambda _, transaction: read(transaction))
        self._num_used += 1
        return self._read.get(key)


def _values_from(key: bytes, number: int, transaction: lmdb.Transaction) -> dict[bytes, bytes]:
    """Copies of the stored buffers of a key and of the next ones, as far as they are small."""
    found: dict[bytes, bytes] = {}
    num_bytes = 0
    with transaction.cursor() as cursor:
        for here, value in cursor.iternext() if cursor.set_key(key) else ():
            found[bytes(here)] = bytes(value)
            num_bytes += len(value)
            if len(found) >= number or num_bytes >= _BYTES_AT_ONCE:
                break
    return found


class _DamagedSource(_Source):
    """What is sound in a damaged store, read without LMDB."""

    def __init__(
        self, path: Path, damage: str, stack: contextlib.ExitStack, *, takes_lock: bool
    ) -> None:
        if takes_lock:
            with contextlib.suppress(ReadOnlyCacheError):  # then it can't be had
                stack.enter_context(write_lock(path))
        self._store = stack.enter_context(DamagedStore(path))
        super().__init__(
            path, self._store.metadata, len(self._store), stack, damage, self._store.dropped
        )

    def checksums(self) -> Iterator[tuple[bytes, bytes]]:
        return self._store.checksums()

    def _bytes(self, key: bytes) -> Any:
        return self._store.read(key)


def _open_source(path: Path, stack: contextlib.ExitStack, *, takes_lock: bool) -> _Source:
    """Open a store to read from; `stack` closes it.

    Args:
        path: Its folder.
        stack: What closes it.
        takes_lock: Whether to keep other processes from writing to it, if it is damaged.

    Raises:
        CacheError: It can't be read at all.
    """
    with contextlib.ExitStack() as opening:
        try:
            opened: _Source = _SoundSource(path, opening)
        except FormatVersionError:
            raise
        except IntegrityError as error:
            opening.close()
            opened = _DamagedSource(path, str(error), opening, takes_lock=takes_lock)
        stack.push(opening.pop_all())
        return opened

"""Reading one store: a Mapping of sample ids to embeddings, and some of them by position."""

from __future__ import annotations

import contextlib
import json
import operator
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import lmdb
import numpy as np
import numpy.typing as npt

from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    CacheNotFoundError,
    ConfigError,
    IntegrityError,
    InvalidEmbeddingError,
    InvalidSampleIdError,
    SampleNotFoundError,
)
from lmdbcache.files import few
from lmdbcache.storage.engine_errors import DAMAGE_REMEDY, raise_translated
from lmdbcache.storage.environment import Environment, Holder, Snapshot, acquire_current, release
from lmdbcache.storage.forking import no_fork, process_id
from lmdbcache.storage.gather import MappedFile
from lmdbcache.storage.generations import current_generation
from lmdbcache.storage.layout import CHECKSUMS_NAME, NUM_RESERVED_KEYS, sample_id_of_key, sample_key
from lmdbcache.storage.metadata import StoreMetadata
from lmdbcache.storage.pages.page_file import PageFile
from lmdbcache.storage.pages.pages import EntryTable, UnreadablePagesError, leaf_pages
from lmdbcache.storage.row_parts import RowPart
from lmdbcache.storage.similarity import Nearest, nearest
from lmdbcache.storage.statistics import add_reads, counts_of, family, join_family
from lmdbcache.storage.value_table import ValueTable, find_rows, key_or_empty, stack, value_table
from lmdbcache.storage.values import NUMPY_DTYPES, batch_array, from_stored
from lmdbcache.storage.verified_reads import (
    Mismatch,
    Verify,
    check_mode,
    check_pages,
    has_samples,
    prepare,
    read_batch,
    read_one,
    stored_keys,
)
from lmdbcache.storage.windows import (
    Windows,
    first_window,
    is_first_window,
    keys_of_windows,
    recording_of,
    window_range,
    window_start,
)

_T = TypeVar("_T")
Positions = Sequence[int] | npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]

_KEYS_PER_STEP: Final = 4096
_KEYS_OF_A_RECORDING: Final = 256
_MANY: Final = 64  # from this share of the samples on, all keys are read at once
_SINGLES_BEFORE_LOOKUP: Final = 32  # from here on it pays to know where the values are


class EmbeddingReader(Mapping[str, npt.NDArray[Any]]):
    """The embeddings of one store, by sample id (`file_id:class`).

    Reads see one snapshot, the newest commit when it was pinned; `refresh` moves on to the newest.
    A sample that the snapshot lacks is looked up in the newest commit before it is called missing.
    While a reader is open, the pages of its snapshot can't be reused by writers: `refresh` or
    `close` what is kept for long.

    Threads may share a reader. It pickles as its path and config, to the same bytes in any process
    (Hugging Face datasets makes fingerprints of them), opens when first read, and works in forked,
    spawned and forkserver processes alike. A reader used after `close` opens again.

    Args:
        store: The store's folder.
        config: Refuse the store if it was written for another config; None takes what is there.
        verify: Compare each embedding with its checksum after it was copied: `"never"`,
            `"first_read"` (once per snapshot) or `"always"`. A damaged value is an IntegrityError
            that names the sample; without verification it is read as it is. LMDB's pages are
            also looked at whenever a snapshot is pinned.
        track_usage: Whether reading moves the store's time of last use and is counted.
    """

    num_read = 0
    # Called with the reader and the samples of a read that it doesn't have.
    on_miss: Callable[[EmbeddingReader, Sequence[str]], None] | None = None

    def __init__(
        self,
        store: str | Path,
        config: CacheConfig | None = None,
        verify: Verify = "never",
        *,
        track_usage: bool = True,
    ) -> None:
        check_mode(verify)
        self._store = store if isinstance(store, Path) else Path(store)
        if not self._store.is_absolute():
            self._store = self._store.absolute()
        self._expected_config = config
        self.verify = verify
        self._counts_as_use = track_usage
        # Whether hits and misses are counted; off where the caller counts in its own way.
        self.counts_reads = track_usage
        self._reset()

    def _reset(self) -> None:
        self._process_id = process_id()
        self._pin_lock = threading.RLock()
        self._snapshot: Snapshot | None = None
        self._holder = Holder(self)

    def __getstate__(self) -> dict[str, Any]:
        # Text: what equals pickles to equal bytes, in every process, which some use as a cache key.
        config = self._expected_config
        return {
            "store": str(self._store),
            "config": None if config is None else json.dumps(config.to_dict()),
            "verify": self.verify,
            "track_usage": self._counts_as_use,
            "on_miss": self.on_miss,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        fields, verify, track_usage = (state[n] for n in ("config", "verify", "track_usage"))
        config = None if fields is None else CacheConfig.from_dict(json.loads(fields))
        EmbeddingReader.__init__(self, state["store"], config, verify, track_usage=track_usage)
        self.on_miss = state["on_miss"]

    def __enter__(self) -> EmbeddingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the snapshot and the environment. Reading again opens them again."""
        if self._counts_as_use and self._snapshot is not None:
            add_reads(self._store)
        if self._process_id != process_id():
            self._reset()
        with self._pin_lock:
            if self._snapshot is not None:
                self._snapshot.end()
                self._snapshot = None
            self._holder.drop()

    # ---- the snapshot

    def reopened(self) -> EmbeddingReader:
        """Return another reader of the store, at its newest commit, whose reads aren't counted."""
        return EmbeddingReader(self._store, self.config, self.verify, track_usage=False)

    def refresh(self) -> bool:
        """Move to the newest commit.

        Returns:
            Whether there was a newer one.

        Raises:
            CacheNotFoundError: The store has been cleared.
        """
        snapshot = self.pinned()
        snapshot.environment.check_whole()
        live = snapshot.environment.is_live(current_generation(self._store))
        if live and snapshot.num_newer_commits() == 0:
            return False
        self._pin(instead_of=snapshot)
        return True

    def pinned(self) -> Snapshot:
        """Return the snapshot to read, pinned now if it isn't yet."""
        if no_fork.is_forking:
            no_fork.wait_for_fork()
        snapshot = self._snapshot
        if (
            snapshot is not None
            and snapshot.transaction
            and (snapshot.is_protected or not snapshot.may_be_overwritten())
        ):
            return snapshot
        return self._pin(instead_of=snapshot)

    def _pin(self, instead_of: Snapshot | None) -> Snapshot:
        if self._counts_as_use:
            counts_of(self._store)  # from here on, the end of the process is noted as a use
        if self.verify == "never":
            return self._pin_newest(instead_of)
        check_pages(self._store)
        while True:
            snapshot = self._pin_newest(instead_of)
            with snapshot.lock:
                if snapshot.verified is not None or prepare(snapshot, self.verify):
                    return snapshot
            instead_of = snapshot

    def _pin_newest(self, instead_of: Snapshot | None) -> Snapshot:
        if self._process_id != process_id():
            self._reset()  # a lock or snapshot inherited over a fork is the parent's
            instead_of = None
        with self._pin_lock, no_fork:
            if self._snapshot is not None and self._snapshot is not instead_of:
                return self._snapshot  # another thread was faster
            environment, snapshot = self._newest()
            if self._snapshot is not None:
                self._snapshot.end()
            self._snapshot = snapshot
            self._holder.take(environment)
            return snapshot

    def _newest(self) -> tuple[Environment, Snapshot]:
        while True:
            environment = acquire_current(self._store)
            try:
                snapshot = Snapshot(environment, self._expected_config)
                snapshot.metadata.check_config(self._expected_config, self._store)
            except BaseException as error:
                release(environment)
                # A compaction may have removed it meanwhile.
                moved = not environment.is_live(current_generation(self._store))
                if not (moved and isinstance(error, CacheError)):
                    raise
            else:
                return environment, snapshot

    def read_pinned(
        self,
        read: Callable[[Snapshot, lmdb.Transaction], _T],
        is_miss: Callable[[_T], bool] | None = None,
    ) -> _T:
        """Call `read` under a pinned snapshot; after a miss, again under the newest."""
        while True:
            snapshot = self.pinned()
            with snapshot.lock:
                transaction = snapshot.transaction
                if transaction is None:  # ended between the two lines, by another thread
                    continue
                try:
                    found = read(snapshot, transaction)
                except BaseException as error:  # noqa: BLE001 - raised again below
                    # Whoever keeps the error must not keep the transaction and its slot.
                    traceback.clear_frames(error.__traceback__)
                    transaction = None
                    raise_translated(error, self._store)
                finally:
                    transaction = None
            if snapshot.may_be_overwritten():
                continue
            if is_miss is None or not is_miss(found) or not self._newer_than(snapshot):
                return found

    def _newer_than(self, snapshot: Snapshot) -> bool:
        if self._snapshot is not snapshot:
            return True
        # A store that was cleared is no reason to fail here: its samples are missing.
        with contextlib.suppress(CacheNotFoundError):
            if self.refresh():
                newest = self.pinned()
                # The commits of a cleared and remade store count from one again.
                return (newest.environment, newest.id) != (snapshot.environment, snapshot.id)
        return False

    # ---- what is stored

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._store

    @property
    def metadata(self) -> StoreMetadata:
        """The store's metadata as of the snapshot."""
        return self.pinned().metadata

    @property
    def config(self) -> CacheConfig:
        """The config that the store was written for."""
        return self.metadata.config

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of what is read: the stored one, and float32 of int8.

        bfloat16 is ml_dtypes' numpy dtype.
        """
        return NUMPY_DTYPES[self.config.dtype]

    @property
    def embedding_shape(self) -> tuple[int | None, ...] | None:
        """Shape of one embedding; None in front if the first dimension is free."""
        return self.metadata.embedding_shape

    # ---- the Mapping

    def __getitem__(self, sample_id: str) -> npt.NDArray[Any]:
        """An owned, writable copy of one embedding.

        Raises:
            SampleNotFoundError: The newest commit doesn't hold it (a KeyError).
            IntegrityError: The stored value doesn't have the store's shape; or see `verify`.
        """
        if self.verify != "never":
            found = self._verified(lambda snapshot, _: read_one(snapshot, sample_id))
            self._count_hits([sample_id])
            return found
        snapshot = self.pinned()
        with snapshot.lock:
            table: ValueTable | None = snapshot.values
            if table is not None and snapshot.is_protected:
                row = table.known_rows.get(sample_id)
                if row is not None:
                    if table.counter is not None and self.counts_reads:
                        table.counter.count_one(row)
                    return table.copy(row)
        return self._look_up(sample_id)

    def _look_up(self, sample_id: str) -> npt.NDArray[Any]:
        """Return an embedding whose place isn't known yet."""
        key = key_or_empty(sample_id)
        if not key:
            raise self._not_found([sample_id])

        def read(snapshot: Snapshot, transaction: lmdb.Transaction) -> npt.NDArray[Any] | None:
            self.num_read += 1
            if self.num_read > _SINGLES_BEFORE_LOOKUP:
                table = self.value_table(snapshot, transaction)
                if table is not None and table.remember_all():
                    row = table.known_rows.get(sample_id_of_key(key))
                    return None if row is None else table.copy(row)
            value = transaction.get(key)
            if value is None:
                return None
            metadata = snapshot.metadata
            return from_stored(sample_id, value, metadata.config.dtype, metadata.embedding_shape)

        embedding = self.read_pinned(read, lambda found: found is None)
        if embedding is None:
            raise self._not_found([sample_id])
        self._count_hits([sample_id])
        return embedding

    def __contains__(self, sample_id: object) -> bool:
        try:
            key = sample_key(sample_id)  # type: ignore[arg-type]
        except InvalidSampleIdError:
            return False
        return self.read_pinned(lambda snapshot, txn: self._has(snapshot, txn, key), operator.not_)

    def __len__(self) -> int:
        def count(snapshot: Snapshot, transaction: lmdb.Transaction) -> int:
            if self.verify != "never":
                return len(stored_keys(snapshot))
            num_values = int(transaction.stat()["entries"]) - NUM_RESERVED_KEYS
            num_checksums = int(transaction.stat(snapshot.environment.checksums)["entries"]) - 1
            # A damaged meta page may count to the stars; list() makes room for as many.
            if num_values != num_checksums and snapshot.is_protected:
                raise IntegrityError(
                    f"{self._store} is damaged ({num_values} embeddings, {num_checksums} "
                    f"checksums). {DAMAGE_REMEDY}"
                )
            return num_values

        return self.read_pinned(count)

    def __iter__(self) -> Iterator[str]:
        """Sample ids in the order of their UTF-8 bytes.

        Raises:
            IntegrityError: The pages give them in another order.
        """
        self.read_pinned(lambda snapshot, _: _ask_for_keys(snapshot))
        after = b""
        while keys := self._keys_after(after):
            if not after < keys[0] <= keys[-1]:  # or damaged pages lead round in a circle
                raise IntegrityError(
                    f"{self._store} is damaged (keys out of order). {DAMAGE_REMEDY}"
                )
            for key in keys:
                if b":" in key:
                    yield sample_id_of_key(key)
            after = keys[-1]

    def _keys_after(self, after: bytes, number: int = _KEYS_PER_STEP) -> list[bytes]:
        def read(snapshot: Snapshot, transaction: lmdb.Transaction) -> list[bytes]:
            if self.verify != "never":
                return stored_keys(snapshot, after, number)
            found: list[bytes] = _following(
                snapshot, transaction, after, number, with_checksums=False
            )
            return found

        return self.read_pinned(read)

    def __eq__(self, other: object) -> bool:
        """Whether both map the same sample ids to equal arrays."""
        if self is other:
            return True
        if not isinstance(other, Mapping):
            return NotImplemented
        if len(self) != len(other):
            return False
        return all(
            sample_id in other and np.array_equal(embedding, other[sample_id])
            for sample_id, embedding in self.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._store)!r})"

    # ---- more than one

    def get_batch(
        self, sample_ids: Sequence[str], out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Several embeddings, stacked in the order asked for, all from one snapshot.

        A training loop that reads the same samples in every epoch is faster with `select`.

        Args:
            sample_ids: Sample ids; repeats are fine.
            out: C-contiguous array of shape `(len(sample_ids), *embedding_shape)` and the stored
                dtype to fill instead of a new one.

        Returns:
            `(len(sample_ids), *embedding_shape)`, stored dtype.

        Raises:
            SampleNotFoundError: Names what the newest commit lacks.
            InvalidEmbeddingError: `out` doesn't fit, or the shapes of a ragged store differ.
            IntegrityError: See `verify`.
        """
        if self.verify != "never":
            found = self._verified(lambda snapshot, _: read_batch(snapshot, sample_ids, out))
            self._count_hits(sample_ids)
            return found
        keys: list[bytes] = []

        def read(snapshot: Snapshot, transaction: lmdb.Transaction) -> npt.NDArray[Any] | list[str]:
            table = self.value_table(snapshot, transaction)
            if table is not None and table.common_length:
                rows = table.rows_of(sample_ids)
                if rows is not None:
                    batch = table.gather(rows, out)
                    if table.counter is not None and self.counts_reads:
                        table.counter.count(rows)
                    return batch
            if not keys:
                keys.extend(map(key_or_empty, sample_ids))
            self.num_read += len(keys)
            values = [transaction.get(key) if key else None for key in keys]
            absent = [i for i, v in zip(sample_ids, values, strict=True) if v is None]
            if absent:
                return absent
            stacked = stack(values, sample_ids, snapshot.metadata, out)
            self._count_hits(sample_ids)
            return stacked

        batch = self.read_pinned(read, _is_list)
        if isinstance(batch, list):
            raise self._not_found(batch)
        return batch

    def select(self, sample_ids: Iterable[str] | None = None) -> Selection:
        """These samples by position, for a training loop: the fastest way to read batches.

        Args:
            sample_ids: Sample ids in the order of the positions; None takes all, sorted.
        """
        return Selection(self, sample_ids)

    def missing(self, sample_ids: Iterable[str]) -> list[str]:
        """The sample ids that the newest commit lacks, each once, in the order given.

        In a store of windows, the id of a recording is there if all of its windows are.
        """
        self.refresh()
        asked = list(dict.fromkeys(sample_ids))
        names = asked if self.config.window is None else list(map(first_window, asked))

        def read(snapshot: Snapshot, transaction: lmdb.Transaction) -> list[str]:
            if _MANY * len(asked) > int(transaction.stat()["entries"]):
                _ask_for_keys(snapshot)
            if self.verify != "never":
                stored = has_samples(snapshot, names)
            else:
                checksums = snapshot.environment.checksums
                keys = map(key_or_empty, names)
                stored = [
                    bool(key) and transaction.get(key, db=checksums) is not None for key in keys
                ]
            return [i for i, is_stored in zip(asked, stored, strict=True) if not is_stored]

        return self.read_pinned(read)

    def windows(self, recording_id: str) -> Windows:
        """The windows of one recording, in order, all from one snapshot.

        Args:
            recording_id: `file_id:class`, as the dataset has it.

        Raises:
            SampleNotFoundError: The newest commit doesn't hold the whole recording (a KeyError).
            ConfigError: The store's config has no `window`.
            IntegrityError: See `verify`.
        """
        sample_ids = self.windows_of(recording_id)
        rate = self.config.sample_rate
        starts = [(window_start(sample_id, rate) or 0) / rate for sample_id in sample_ids]
        return Windows(np.array(starts, np.float64), self.get_batch(sample_ids), sample_ids)

    def windows_of(self, recording_id: str) -> list[str]:
        """The sample ids of one recording's windows, in order.

        Raises:
            SampleNotFoundError, ConfigError: See `windows`.
        """
        sample_ids = self.window_ids(recording_id)
        if not sample_ids or not is_first_window(sample_ids[0]):
            raise self._not_found([recording_id])
        return sample_ids

    def window_ids(self, recording_id: str) -> list[str]:
        """The stored windows of one recording, in order; there are some of an unfinished one.

        Args:
            recording_id: `file_id:class`, as the dataset has it.

        Raises:
            ConfigError: The store's config has no `window`.
        """
        self._check_windows()
        if not (key := key_or_empty(recording_id)):
            return []
        _ = first_window(recording_id) in self  # moves to the newest commit if it isn't
        after, end = window_range(key)
        found: list[bytes] = []
        while keys := self._keys_after(after, _KEYS_OF_A_RECORDING):
            found += keys_of_windows(key, [each for each in keys if each < end])
            after = keys[-1]
            if after >= end:
                break
        return list(map(sample_id_of_key, found))

    def recordings(self) -> Iterator[str]:
        """Yield the recordings that are stored in full, by key.

        Raises:
            ConfigError: The store's config has no `window`.
        """
        self._check_windows()
        return (recording_of(sample_id) for sample_id in self if is_first_window(sample_id))

    @overload
    def nearest(self, query: str, k: int = 10, metric: str = "cosine") -> Nearest: ...
    @overload
    def nearest(
        self, query: npt.ArrayLike, k: int = 10, metric: str = "cosine"
    ) -> Nearest | list[Nearest]: ...
    def nearest(
        self, query: str | npt.ArrayLike, k: int = 10, metric: str = "cosine"
    ) -> Nearest | list[Nearest]:
        """Return the stored samples nearest to a query: see the function of this name.

        Args:
            query: One vector `(D,)`, several `(Q, D)`, or a stored sample's id.
            k: How many samples.
            metric: `"cosine"` similarity or `"l2"` distance.
        """
        return nearest([self], query, k, metric)

    def _check_windows(self) -> None:
        if self.config.window is None:
            raise ConfigError(f"{self._store} holds one embedding a clip: its config has no window")

    def checksums(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the key and the checksum of every embedding, by key; no value is read.

        A checksum is seeded with its key: under one key, equal values have equal ones, in every
        store.
        """
        after = b""
        while items := self.read_pinned(
            lambda snapshot, transaction, after=after: _following(  # type: ignore[misc]
                snapshot, transaction, after, with_checksums=True
            )
        ):
            yield from ((key, expected) for key, expected in items if b":" in key)
            after = items[-1][0]

    def checksums_of(self, keys: Collection[bytes]) -> dict[bytes, bytes]:
        """Return the checksums of those of these keys that are stored."""

        def read(snapshot: Snapshot, transaction: lmdb.Transaction) -> dict[bytes, bytes]:
            database = snapshot.environment.checksums
            found = {key: transaction.get(key, db=database) for key in keys}
            return {key: bytes(value) for key, value in found.items() if value is not None}

        return self.read_pinned(read)

    def _verified(
        self,
        read: Callable[[Snapshot, lmdb.Transaction], npt.NDArray[Any] | list[str] | Mismatch],
    ) -> npt.NDArray[Any]:
        found = self.read_pinned(read, _is_list)
        if isinstance(found, list):
            raise self._not_found(found)
        if isinstance(found, Mismatch):
            raise found.error(self._store)
        return found

    def _has(self, snapshot: Snapshot, transaction: lmdb.Transaction, key: bytes) -> bool:
        if self.verify != "never":
            return has_samples(snapshot, [sample_id_of_key(key)])[0]
        # The checksum is 8 bytes; fetching the embedding itself would touch all of its pages.
        return transaction.get(key, db=snapshot.environment.checksums) is not None

    def value_table(self, snapshot: Snapshot, transaction: lmdb.Transaction) -> ValueTable | None:
        """Return where the values of a pinned snapshot lie; None where LMDB has to be asked."""
        return value_table(snapshot, transaction, self.num_read, is_counted=self.counts_reads)

    def _not_found(self, sample_ids: Sequence[str]) -> SampleNotFoundError:
        # Never under a snapshot's lock: why a sample is missing is found by reading.
        self._count_misses(sample_ids)
        try:
            for sample_id in sample_ids:
                sample_key(sample_id)
        except InvalidSampleIdError as error:
            return SampleNotFoundError(str(error))
        names = few(list(map(repr, sample_ids)), 3)
        return SampleNotFoundError(
            f"{names}: not in {self._store} ({len(self)} embeddings, newest commit looked "
            "at). Extract what is missing, or check the file id and class"
        )

    def _count_hits(self, sample_ids: Sequence[str]) -> None:
        if self.counts_reads and (counts := counts_of(self._store)) is not None:
            counts.count(sample_ids, are_there=True)

    def _count_misses(self, sample_ids: Sequence[str]) -> None:
        if not self.counts_reads:
            return
        if (counts := counts_of(self._store)) is not None:
            counts.count(sample_ids, are_there=False)
        if self.on_miss is not None:
            self.on_miss(self, sample_ids)


def _reduce_for_child(reader: EmbeddingReader) -> tuple[Any, ...]:
    """How multiprocessing pickles a reader: with the place where the child's reads count."""
    return _in_child, (reader.__getstate__(), family())


def _in_child(state: dict[str, Any], folder: str | None) -> EmbeddingReader:
    join_family(folder)
    reader = EmbeddingReader.__new__(EmbeddingReader)
    reader.__setstate__(state)
    return reader


# What multiprocessing takes to a child says whose child that is: its hits count for both.
ForkingPickler.register(EmbeddingReader, _reduce_for_child)


class Selection:
    """Some samples of a reader in a given order, read by position.

    What is looked up is remembered for as long as the store doesn't change: a batch is one copy
    from the mapped file, without any sample id. Picklable; follows its reader through forks,
    refreshes and compactions.

    Args:
        reader: Where to read.
        sample_ids: Sample ids; None takes all that are stored now, sorted.
        part: Read these rows of each embedding only.
    """

    def __init__(
        self,
        reader: EmbeddingReader,
        sample_ids: Iterable[str] | None = None,
        part: RowPart | None = None,
    ) -> None:
        self.reader = reader
        self.part = part
        self.sample_ids: list[str] = list(reader if sample_ids is None else sample_ids)
        self._entries: EntryTable | None = None
        self._rows: Rows = np.empty(0, np.int64)
        self._is_complete = False

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getstate__(self) -> dict[str, Any]:
        # A sample id that is there twice is one object: else equal lists pickle differently.
        known: dict[str, str] = {}
        sample_ids = [known.setdefault(sample_id, sample_id) for sample_id in self.sample_ids]
        return {"reader": self.reader, "sample_ids": sample_ids, "part": self.part}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Selection.__init__(self, state["reader"], state["sample_ids"], state["part"])

    def get_batch(
        self, positions: Positions, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """The embeddings at these positions, all from one snapshot.

        Args:
            positions: Positions in `sample_ids`, `(n,)`.
            out: See `EmbeddingReader.get_batch`.

        Returns:
            `(n, *embedding_shape)`, stored dtype; with a part, its rows instead of all.

        Raises:
            SampleNotFoundError, InvalidEmbeddingError: See `EmbeddingReader.get_batch`.
        """
        if self.reader.verify != "never":
            return self._read_whole(positions, out)
        snapshot = self.reader.pinned()
        with snapshot.lock:
            table: ValueTable | None = snapshot.values
            if table is not None and snapshot.is_protected and self._knows_all(table):
                return self._gather(table, self._rows[_indices(positions)], out)
        found = self._look_up(positions, lambda table, rows: self._gather(table, rows, out))
        return self._read_whole(positions, out) if found is None else found

    def _read_whole(self, positions: Positions, out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        """Through the reader, which verifies, refreshes, and says what is missing."""
        wanted = [self.sample_ids[i] for i in positions]
        if self.part is None or not wanted:
            return self.reader.get_batch(wanted, out)
        parts = [self.part.of(self.reader[sample_id]) for sample_id in wanted]
        if len(shapes := {part.shape for part in parts}) > 1:
            raise InvalidEmbeddingError(
                f"these rows of the embeddings have different shapes ({sorted(shapes)[:3]}) and "
                "don't stack; read them one by one"
            )
        rows = np.stack(parts)
        if out is None:
            return rows
        batch_array(rows.shape, rows.dtype, out)[...] = rows
        return out

    def copy_with(
        self,
        positions: Positions,
        copy: Callable[[MappedFile, npt.NDArray[np.int64], int], _T],
    ) -> _T | None:
        """Have another routine copy these embeddings from the mapped file.

        Args:
            positions: Positions in `sample_ids`, `(n,)`.
            copy: Called with the file, the places of the values and their common length, while
                they are pinned; nothing of the file may outlive the call. With a part: the places
                and the length of its runs, `num_runs` for each sample.

        Returns:
            What `copy` returned; None where the values can't be copied in one go, and from a
            reader that verifies: `get_batch` does.
        """
        if self.reader.verify != "never":
            return None

        def read(table: ValueTable, rows: Rows) -> _T:
            places, length = table.places(rows, self.part)
            table.file.prepare(places, length)
            copied = copy(table.file, places, length)
            self._count(table, rows)
            return copied

        return self._look_up(positions, read)

    def will_need(self, positions: Positions) -> None:
        """Ask the kernel to read these embeddings from disk, in the background."""

        def read(table: ValueTable, rows: Rows) -> None:
            table.file.will_need(*table.places(rows, self.part))

        self._look_up(positions, read)

    def _gather(
        self, table: ValueTable, rows: Rows, out: npt.NDArray[Any] | None
    ) -> npt.NDArray[Any]:
        batch = table.gather(rows, out, self.part)
        self._count(table, rows)
        return batch

    def _count(self, table: ValueTable, rows: Rows) -> None:
        if table.counter is not None and self.reader.counts_reads:
            table.counter.count(rows)

    def _look_up(self, positions: Positions, read: Callable[[ValueTable, Rows], _T]) -> _T | None:
        """Call `read` with the rows of these samples; None if one isn't known."""

        def find(snapshot: Snapshot, transaction: lmdb.Transaction) -> _T | None:
            table = self.reader.value_table(snapshot, transaction)
            if table is None or table.common_length is None:
                return None
            if not self._knows_all(table) and self._entries is not table.entries:
                self._rows = find_rows(table.entries, self.sample_ids)
                self._is_complete = bool((self._rows >= 0).all())
                self._entries = table.entries
            rows = self._rows[_indices(positions)]
            if not self._is_complete and rows.size and rows.min() < 0:
                return None
            return read(table, rows)

        return self.reader.read_pinned(find)

    def _knows_all(self, table: ValueTable) -> bool:
        return self._entries is table.entries and self._is_complete


def _indices(positions: Positions) -> Any:
    if isinstance(positions, np.ndarray):
        return positions
    if isinstance(positions, list):  # of ints, from a sampler: faster than numpy's own look at it
        return np.fromiter(positions, np.int64, len(positions))
    return np.asarray(positions, np.int64)


def _is_list(found: object) -> bool:
    return isinstance(found, list)


def _ask_for_keys(snapshot: Snapshot) -> None:
    """Have the kernel read the checksums' pages, whose keys are those of all samples.

    Where the values are small, LMDB's pages of keys lie scattered among them, and each fault in its
    map reads megabytes around.
    """
    path = snapshot.environment.generation / "data.mdb"
    # Damaged, or moved on meanwhile: LMDB says so, or reads without.
    with contextlib.suppress(UnreadablePagesError, OSError, ValueError), PageFile(path) as file:
        file.meta = file.metas[snapshot.id & 1]
        tree, mapped = file.find_named(CHECKSUMS_NAME), MappedFile(path)
        if tree is not None and mapped.file_id == snapshot.environment.file:
            mapped.read_single_pages()
            pages = leaf_pages(mapped.data, snapshot.id, tree)
            mapped.will_need(pages * file.page_size, file.page_size)


def _following(
    snapshot: Snapshot,
    transaction: lmdb.Transaction,
    after: bytes,
    number: int = _KEYS_PER_STEP,
    *,
    with_checksums: bool,
) -> list[Any]:
    """Return the next keys that follow one, in order; or (key, checksum) of each."""
    # The checksums have the same keys as the embeddings; those of small values lie among them.
    with transaction.cursor(db=snapshot.environment.checksums) as cursor:
        found = cursor.set_range(after) if after else cursor.first()
        if found and after and cursor.key() == after:
            found = cursor.next()
        if not found:
            return []
        if with_checksums:
            items = zip(cursor.iternext(), range(number), strict=False)
            return [(bytes(key), bytes(expected)) for (key, expected), _ in items]
        keys = zip(cursor.iternext(values=False), range(number), strict=False)
        return [bytes(key) for key, _ in keys]

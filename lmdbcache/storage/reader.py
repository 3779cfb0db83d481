"""Reading one store: a Mapping of sample ids to embeddings."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import lmdb
import numpy as np
import numpy.typing as npt

from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheNotFoundError,
    IntegrityError,
    InvalidEmbeddingError,
    InvalidSampleIdError,
    SampleNotFoundError,
)
from lmdbcache.storage.engine_errors import translated_errors
from lmdbcache.storage.environment import (
    Holder,
    Snapshot,
    acquire_current,
    process_id,
    release,
)
from lmdbcache.storage.generations import current_generation
from lmdbcache.storage.layout import NUM_RESERVED_KEYS, sample_id_of_key, sample_key
from lmdbcache.storage.metadata import StoreMetadata
from lmdbcache.storage.values import NUMPY_DTYPES

__all__ = ["EmbeddingReader"]

_KEYS_PER_STEP: Final = 4096
_T = TypeVar("_T")


class EmbeddingReader(Mapping[str, npt.NDArray[Any]]):
    """The embeddings of one store, by sample id (`file_id:class`).

    Reads see one snapshot, the newest commit when it was pinned; `refresh` moves on to the newest.
    A sample that the snapshot lacks is looked up in the newest commit before it is called missing.
    While a reader is open, the pages of its snapshot can't be reused by writers: `refresh` or
    `close` what is kept for long.

    Threads may share a reader. It pickles as its path, opens when first read, and works in forked,
    spawned and forkserver processes alike. A reader used after `close` opens again.

    Args:
        store: The store's folder.
        config: Refuse the store if it was written for another config; None takes what is there.
    """

    def __init__(self, store: str | Path, config: CacheConfig | None = None) -> None:
        self._store = Path(store).absolute()
        self._config = config
        self._reset()

    def _reset(self) -> None:
        self._process_id = process_id()
        self._pin_lock = threading.RLock()
        self._snapshot: Snapshot | None = None
        self._holder = Holder(self)

    # ---- what is stored

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._store

    @property
    def metadata(self) -> StoreMetadata:
        """The store's metadata as of the snapshot."""
        return self._pinned().metadata

    @property
    def config(self) -> CacheConfig:
        """The config that the store was written for."""
        return self.metadata.config

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype; bfloat16 is ml_dtypes' numpy dtype."""
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
            IntegrityError: The stored value doesn't have the store's shape.
        """
        key = self._lookup_key(sample_id)

        def read(snapshot: Snapshot, transaction: lmdb.Transaction) -> npt.NDArray[Any] | None:
            value = transaction.get(key)
            return None if value is None else _decode(value, snapshot.metadata, sample_id)

        embedding = self._read(read, lambda found: found is None)
        if embedding is None:
            raise self._not_found([sample_id])
        return embedding

    def __contains__(self, sample_id: object) -> bool:
        try:
            key = sample_key(sample_id)  # type: ignore[arg-type]
        except InvalidSampleIdError:
            return False
        return self._read(lambda snapshot, txn: _has(snapshot, txn, key), lambda found: not found)

    def __len__(self) -> int:
        def count(_: Snapshot, transaction: lmdb.Transaction) -> int:
            return int(transaction.stat()["entries"]) - NUM_RESERVED_KEYS

        return self._read(count)

    def __iter__(self) -> Iterator[str]:
        """Sample ids in the order of their UTF-8 bytes."""
        after = b""
        while keys := self._read(lambda _, txn, after=after: _keys_after(txn, after)):  # type: ignore[misc]
            for key in keys:
                if b":" in key:
                    yield sample_id_of_key(key)
            after = keys[-1]

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

        Args:
            sample_ids: Sample ids; repeats are fine.
            out: C-contiguous array of shape `(len(sample_ids), *embedding_shape)` and the stored
                dtype to fill instead of a new one.

        Returns:
            `(len(sample_ids), *embedding_shape)`, stored dtype.

        Raises:
            SampleNotFoundError: Names what the newest commit lacks.
            InvalidEmbeddingError: `out` doesn't fit, or the shapes of a ragged store differ.
        """
        keys = [self._lookup_key(sample_id) for sample_id in sample_ids]

        def read(snapshot: Snapshot, transaction: lmdb.Transaction) -> npt.NDArray[Any] | list[str]:
            values = [transaction.get(key) for key in keys]
            absent = [i for i, v in zip(sample_ids, values, strict=True) if v is None]
            return absent or _stack(values, sample_ids, snapshot.metadata, out)

        batch = self._read(read, lambda found: isinstance(found, list))
        if isinstance(batch, list):
            raise self._not_found(batch)
        return batch

    def missing(self, sample_ids: Iterable[str]) -> list[str]:
        """The sample ids that the newest commit lacks, each once, in the order given."""
        self.refresh()
        asked = dict.fromkeys(sample_ids)

        def read(snapshot: Snapshot, transaction: lmdb.Transaction) -> list[str]:
            absent = []
            for sample_id in asked:
                try:
                    stored = _has(snapshot, transaction, sample_key(sample_id))
                except InvalidSampleIdError:
                    stored = False
                if not stored:
                    absent.append(sample_id)
            return absent

        return self._read(read)

    # ---- snapshots

    def refresh(self) -> bool:
        """Move to the newest commit.

        Returns:
            Whether there was a newer one.

        Raises:
            CacheNotFoundError: The store was cleared meanwhile.
        """
        snapshot = self._pinned()
        live = snapshot.environment.is_live(current_generation(self._store))
        if live and snapshot.is_newest():
            return False
        self._pin(instead_of=snapshot)
        return True

    def close(self) -> None:
        """Give back the snapshot and the environment. Reading again opens them again."""
        if self._process_id != process_id():
            self._reset()
        with self._pin_lock:
            if self._snapshot is not None:
                self._snapshot.end()
                self._snapshot = None
            self._holder.drop()

    def __enter__(self) -> EmbeddingReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self._store, "config": self._config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["store"], state["config"])  # type: ignore[misc]

    def _pinned(self) -> Snapshot:
        snapshot = self._snapshot
        if snapshot is not None and snapshot.transaction is not None:
            return snapshot
        return self._pin(instead_of=snapshot)

    def _pin(self, instead_of: Snapshot | None) -> Snapshot:
        if self._process_id != process_id():
            self._reset()  # a lock or snapshot inherited over a fork is the parent's
            instead_of = None
        with self._pin_lock:
            if self._snapshot is not None and self._snapshot is not instead_of:
                return self._snapshot  # another thread was faster
            environment = acquire_current(self._store)
            try:
                snapshot = Snapshot(environment)
                self._check_config(snapshot.metadata)
            except BaseException:
                release(environment)
                raise
            if self._snapshot is not None:
                self._snapshot.end()
            self._snapshot = snapshot
            self._holder.take(environment)
            return snapshot

    def _check_config(self, metadata: StoreMetadata) -> None:
        if self._config is not None and metadata.config != self._config:
            raise IntegrityError(
                f"{self._store} holds embeddings of another config "
                f"({self._config.differences(metadata.config)}, asked and stored): was the folder "
                "renamed by hand? Give it back its name"
            )

    def _read(
        self,
        read: Callable[[Snapshot, lmdb.Transaction], _T],
        is_miss: Callable[[_T], bool] | None = None,
    ) -> _T:
        """Call `read` under a pinned snapshot; after a miss, again under the newest."""
        while True:
            snapshot = self._pinned()
            with translated_errors(self._store), snapshot.lock:
                transaction = snapshot.transaction
                if transaction is None:  # ended between the two lines, by another thread
                    continue
                found = read(snapshot, transaction)
                transaction = None
            if is_miss is None or not is_miss(found) or not self._newer_than(snapshot):
                return found

    def _newer_than(self, snapshot: Snapshot) -> bool:
        if self._snapshot is not snapshot:
            return True
        # A store that was cleared is no reason to fail here: its samples are missing.
        with contextlib.suppress(CacheNotFoundError):
            return (
                self.refresh() and self._snapshot is not None and self._snapshot.id != snapshot.id
            )
        return False

    def _lookup_key(self, sample_id: str) -> bytes:
        try:
            return sample_key(sample_id)
        except InvalidSampleIdError as error:
            raise SampleNotFoundError(str(error)) from None

    def _not_found(self, sample_ids: Sequence[str]) -> SampleNotFoundError:
        names = ", ".join(repr(sample_id) for sample_id in sample_ids[:3])
        more = f" and {len(sample_ids) - 3} more" if len(sample_ids) > 3 else ""
        return SampleNotFoundError(
            f"{names}{more}: not in {self._store} ({len(self)} embeddings, newest commit looked "
            "at). Extract what is missing, or check the file id and class"
        )


def _has(snapshot: Snapshot, transaction: lmdb.Transaction, key: bytes) -> bool:
    # The checksum is 8 bytes; fetching the embedding itself would touch all of its pages.
    return transaction.get(key, db=snapshot.environment.checksums) is not None


def _keys_after(transaction: lmdb.Transaction, after: bytes) -> list[bytes]:
    with transaction.cursor() as cursor:
        found = cursor.set_range(after) if after else cursor.first()
        if found and after and cursor.key() == after:
            found = cursor.next()
        if not found:
            return []
        keys = cursor.iternext(keys=True, values=False)
        return [bytes(key) for key, _ in zip(keys, range(_KEYS_PER_STEP), strict=False)]


def _decode(value: Any, metadata: StoreMetadata, sample_id: str) -> npt.NDArray[Any]:
    flat = np.frombuffer(value, dtype=NUMPY_DTYPES[metadata.config.dtype])
    shape = metadata.embedding_shape or ()
    try:
        embedding: npt.NDArray[Any] = flat.reshape([-1 if n is None else n for n in shape]).copy()
    except ValueError:
        raise IntegrityError(
            f"{sample_id}: {len(value)} bytes are stored, which isn't an embedding of shape "
            f"{shape} in {metadata.config.dtype}. Run `lmdbcache verify` and extract again"
        ) from None
    return embedding


def _stack(
    values: Sequence[Any],
    sample_ids: Sequence[str],
    metadata: StoreMetadata,
    out: npt.NDArray[Any] | None,
) -> npt.NDArray[Any]:
    dtype = NUMPY_DTYPES[metadata.config.dtype]
    shape: tuple[int, ...]
    if values and None in (metadata.embedding_shape or ()):
        shape = _decode(values[0], metadata, sample_ids[0]).shape
    else:
        shape = tuple(size or 0 for size in metadata.embedding_shape or ())
    expected = (len(values), *shape)
    if out is None:
        out = np.empty(expected, dtype)
    elif out.shape != expected or out.dtype != dtype or not out.flags.c_contiguous:
        raise InvalidEmbeddingError(
            f"out has shape {out.shape} and dtype {out.dtype}; a C-contiguous array of shape "
            f"{expected} and dtype {dtype} is needed"
        )
    for row, value, sample_id in zip(out, values, sample_ids, strict=True):
        embedding = np.frombuffer(value, dtype=dtype)
        if embedding.size != row.size:
            # Says so if the value is damaged; else the store is ragged.
            found = _decode(value, metadata, sample_id).shape
            raise InvalidEmbeddingError(
                f"{sample_id} has shape {found}, {sample_ids[0]} has {shape}: embeddings of "
                "different lengths can't be stacked. Read them one by one"
            )
        row[...] = embedding.reshape(shape)
    return out

"""What goes into one commit of a writer, and how it is put into LMDB."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import lmdb
import numpy.typing as npt

from lmdbcache.storage.environment import Environment, last_key
from lmdbcache.storage.layout import METADATA_KEY
from lmdbcache.storage.metadata import StoreMetadata, checksum, checksums
from lmdbcache.storage.quantization import quantized_values

_logger: Final = logging.getLogger(__name__)


class Batch:
    """Embeddings that are committed together, maybe in a thread; as `as_stored` gives them."""

    def __init__(self) -> None:
        self.values: dict[bytes, npt.NDArray[Any]] = {}
        self.checksums: dict[bytes, bytes] = {}  # as far as they are known
        self.num_bytes = 0
        self.num_put = 0
        self.since = 0.0
        self.written = 0
        self.quantization_error: float | None = None
        self.error: BaseException | None = None
        self._is_taken = threading.Lock()
        self._is_done = threading.Event()

    def put(
        self,
        key: bytes,
        value: npt.NDArray[Any],
        *,
        replace: bool = True,
    ) -> None:
        """Add an embedding, or replace the one of this key if that is asked for."""
        values = self.values
        if not values:
            self.since = time.monotonic()
        if key in values:
            if not replace:
                return
            self.drop([key])
        values[key] = value
        self.num_bytes += value.nbytes
        self.num_put += 1

    def put_rows(
        self,
        keys: Sequence[bytes],
        rows: Sequence[npt.NDArray[Any]],
        *,
        replaced: Collection[bytes],
        checksums: Sequence[bytes] = (),
    ) -> int:
        """Add embeddings, those of `replaced` instead of what their keys have.

        Args:
            keys: `(n,)` keys.
            rows: One embedding for each.
            replaced: Keys.
            checksums: `(n,)` checksums, if they are known; then each key is there once.

        Returns:
            How many were added.
        """
        added = dict(zip(keys, rows, strict=True))
        if added and len(added) == len(keys) and self.values.keys().isdisjoint(added):
            self.since = self.since if self.values else time.monotonic()
            self.values.update(added)
            self.num_bytes += sum([row.nbytes for row in rows])
            self.num_put += len(rows)
            self.checksums.update(zip(keys, checksums, strict=False))
            return len(rows)
        before = self.num_put
        for key, row in zip(keys, rows, strict=True):
            self.put(key, row, replace=key in replaced)
        self.checksums.update(zip(keys, checksums, strict=False))
        return self.num_put - before

    def drop(self, keys: Iterable[bytes]) -> None:
        """Take some out."""
        for key in keys:
            if (value := self.values.pop(key, None)) is not None:
                self.num_bytes -= value.nbytes
                self.checksums.pop(key, None)

    def copied(self) -> Batch:
        """Return another batch of the same embeddings; their memory is shared."""
        batch = Batch()
        batch.values, batch.checksums = dict(self.values), dict(self.checksums)
        batch.num_bytes = self.num_bytes
        batch.num_put, batch.since = self.num_put, self.since
        return batch

    def own(self) -> None:
        """Copy what lies in the caller's memory."""
        self.values = {key: value.copy() for key, value in self.values.items()}

    def put_back(self, earlier: Batch) -> None:
        """Add what couldn't be written, except for samples that were put again since."""
        for key, value in earlier.values.items():
            if key not in self.values:
                self.values[key] = value
                self.num_bytes += value.nbytes
                if key in earlier.checksums:
                    self.checksums[key] = earlier.checksums[key]
        self.since = earlier.since

    def start(self, commit: Callable[[Batch], int]) -> None:
        """Commit in a thread; an interrupted start is made up for by `wait`.

        The interpreter waits for the thread at its end, and a fork until it is through (`no_fork`).

        Args:
            commit: Writes this batch, which doesn't change until `wait` has returned.
        """
        self._commit = commit
        self._thread = threading.Thread(target=self._run, name="lmdbcache-commit")
        self._thread.start()

    def _run(self) -> None:
        if not self._is_taken.acquire(blocking=False):
            return
        try:
            self.written = self._commit(self)
        except BaseException as error:  # noqa: BLE001 - raised again by the writer
            self.error = error
            _logger.debug("a commit in a thread has failed (%s)", str(error))
        finally:
            self._is_done.set()

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        return self._is_done.is_set()

    def wait(self) -> None:
        """Wait until the commit is through; then `written` or `error` says how it went."""
        if self._thread.ident is None:  # its start was interrupted
            self._run()
        self._is_done.wait()


@contextlib.contextmanager
def transaction_in(environment: Environment) -> Iterator[lmdb.Transaction]:
    """Commit what the block writes, or nothing of it.

    One thread begins and commits: LMDB's write lock belongs to the thread.
    """
    transaction = environment.begin_write()
    try:
        yield transaction
        transaction.commit()
    except BaseException:
        with contextlib.suppress(lmdb.Error):
            transaction.abort()
        raise


def put_embeddings(
    environment: Environment,
    transaction: lmdb.Transaction,
    batch: Batch,
    dtype: str,
    *,
    replaced: Collection[bytes],
) -> tuple[int, list[bytes]]:
    """Put embeddings in key order, each with its checksum.

    Args:
        environment: Where.
        transaction: Of it.
        batch: The embeddings; it gets their checksums, and the error of their quantization.
        dtype: The store's.
        replaced: Keys whose embeddings are replaced.

    Returns:
        How many were put, and the keys that were there already and were left alone.
    """
    known, keys = batch.checksums, sorted(batch.values)
    values = list(map(batch.values.__getitem__, keys))
    if dtype == "int8":
        values, batch.quantization_error = quantized_values(values)
    pairs = zip(keys, values, strict=True)
    sums = (
        [known.get(key) or checksum(key, value) for key, value in pairs]
        if known
        else checksums(keys, values)
    )
    batch.checksums = dict(zip(keys, sums, strict=True))
    last = max(last_key(transaction, None), last_key(transaction, environment.checksums))
    with transaction.cursor() as cursor:
        left_alone = {
            key
            for key in keys[: bisect_right(keys, last)]
            if key not in replaced and cursor.set_key(key)
        }
    written = [key not in left_alone for key in keys]
    keys = list(itertools.compress(keys, written))
    values, sums = (
        list(itertools.compress(values, written)),
        list(itertools.compress(sums, written)),
    )
    # A file that is cut loses what was put last. The first value brings the pages above the
    # metadata with it; then the checksums, as a value is nothing without one.
    turns: tuple[tuple[Any, list[Any], slice], ...] = (
        (None, values, slice(1)),
        (environment.checksums, sums, slice(None)),
        (None, values, slice(1, None)),
    )
    for database, column, part in turns:
        items = list(zip(keys[part], column[part], strict=True))
        num_inserted = bisect_right(keys[part], last)
        with transaction.cursor(db=database) as cursor:
            cursor.putmulti(items[:num_inserted])
            # Appended keys fill their pages; inserted ones leave them half empty.
            cursor.putmulti(items[num_inserted:], append=True)
    return len(keys), sorted(left_alone)


def put_metadata(
    environment: Environment, transaction: lmdb.Transaction, metadata: StoreMetadata
) -> None:
    """Put the metadata record with its checksum."""
    record = metadata.pack()
    transaction.put(METADATA_KEY, record)
    transaction.put(METADATA_KEY, checksum(METADATA_KEY, record), db=environment.checksums)


def checksums_in(
    environment: Environment, transaction: lmdb.Transaction, keys: Iterable[bytes]
) -> dict[bytes, bytes | None]:
    """Return the checksums that are stored of these keys."""
    last = last_key(transaction, environment.checksums)
    get = partial(transaction.get, db=environment.checksums)
    found = {key: get(key) if key <= last else None for key in keys}
    return {key: None if value is None else bytes(value) for key, value in found.items()}

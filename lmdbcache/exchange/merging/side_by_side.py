"""Several stores of one config, read side by side and merged key by key."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from heapq import merge as merge_sorted
from itertools import groupby
from operator import itemgetter
from typing import Final

from lmdbcache.cache import Origin, Source
from lmdbcache.errors import CacheError
from lmdbcache.exchange.merging.disputes import settle
from lmdbcache.exchange.merging.merger import Merger
from lmdbcache.exchange.merging.report import Refusal, store_refusal
from lmdbcache.exchange.merging.source_stores import SourceStore
from lmdbcache.exchange.merging.target import Incoming
from lmdbcache.storage import sample_id_of_key

__all__ = ["SideBySide"]

_KEYS_AT_ONCE: Final = 4096
_BATCH_BYTES: Final = 32 << 20
_BATCH_RECORDS: Final = 16384

# A key, with (number of the store, checksum) of each store that has it.
_Holders = tuple[bytes, list[tuple[int, bytes]]]


class SideBySide:
    """Stores of one config, read side by side by key, merged into their target.

    In the order of the keys, so that the pages of a new store are full; and so that what several
    sources have of a sample is decided on at once.

    Args:
        merger: Of the target.
        stores: Open, in the order given.
        provenance: The target's and that of all of them.
        detail: Of the origin of what has none of its own.
        advance: Called with how many embeddings more are done.
    """

    def __init__(
        self,
        merger: Merger,
        stores: list[SourceStore],
        provenance: Mapping[str, str],
        detail: Mapping[str, str],
        advance: Callable[[int], None],
    ) -> None:
        self._merger = merger
        self._report = merger.report
        self._stores = stores
        self._provenance = provenance
        self._origins = [store.origin._replace(detail=detail) for store in stores]
        self._advance = advance
        self._batch: list[Incoming] = []
        self._num_bytes = 0
        self._num_done = 0
        self._records: list[tuple[dict[str, Origin], dict[str, Source]]] = []

    def run(self) -> None:
        """Merge them."""
        chunk: list[_Holders] = []
        for key, group in groupby(self._by_key(), key=itemgetter(0)):
            chunk.append((key, [(number, expected) for _, number, expected in group]))
            if len(chunk) >= _KEYS_AT_ONCE:
                self._merge_chunk(chunk)
                chunk = []
        self._merge_chunk(chunk)
        self._flush()
        for store in self._stores:
            if store.records_problem is not None:
                self._report.notes.append(f"merged without its records: {store.records_problem}")

    def _by_key(self) -> Iterator[tuple[bytes, int, bytes]]:
        return merge_sorted(*(self._keys_of(number) for number in range(len(self._stores))))

    def _keys_of(self, number: int) -> Iterator[tuple[bytes, int, bytes]]:
        store = self._stores[number]
        try:
            for key, expected in store.checksums():
                yield key, number, expected
        except CacheError as error:
            # What came before is merged; `merge` goes on with the other stores.
            self._report.refused.append(store_refusal(store.path, error))

    def _merge_chunk(self, chunk: list[_Holders]) -> None:
        if not chunk:
            return
        stored = self._merger.stored([key for key, _ in chunk])
        self._read_records(chunk)
        for key, holders in chunk:
            self._merge_key(key, holders, stored.get(key))
            self._num_done += len(holders)
        self._tell()

    def _tell(self) -> None:
        number, self._num_done = self._num_done, 0
        self._advance(number)

    def _merge_key(
        self, key: bytes, holders: list[tuple[int, bytes]], stored: bytes | None
    ) -> None:
        """All that the sources have of one sample; equal ones are read once."""
        takes_last = self._report.on_conflict == "theirs"
        different: dict[bytes, list[int]] = {}
        for number, expected in holders:
            if takes_last:  # then it is the last source that counts, whatever others repeat
                different[expected] = [*different.pop(expected, ()), number]
            else:
                different.setdefault(expected, []).append(number)
        is_disputed = len(different) > 1 and (stored is None or takes_last)
        if not is_disputed:
            self._report.num_same += len(different.pop(stored or b"", ()))
            for candidate in self._candidates(key, different):
                self._add(candidate)
            return
        candidates = self._candidates(key, different)
        settled = settle(candidates, self._report.on_conflict, self._report.tolerance)
        self._report.note_close(settled.close)
        self._report.conflicts += settled.conflicts
        if settled.taken is not None:
            self._add(settled.taken)

    def _candidates(self, key: bytes, different: Mapping[bytes, list[int]]) -> Iterator[Incoming]:
        """One sound embedding for each checksum, in the order of the sources."""
        name = sample_id_of_key(key)
        for expected, numbers in different.items():
            found = False
            for number in numbers:
                store = self._stores[number]
                if found:
                    self._report.num_same += 1
                    continue
                try:
                    value = store.value(key, expected)
                except CacheError as error:
                    text = str(error).removeprefix(f"{name}: ")
                    refusal = Refusal(os.fspath(store.path), name, text)
                    self._report.refused.append(refusal)
                    continue
                found = True
                origins, sources = self._records[number]
                origin = origins.get(name, self._origins[number])
                yield Incoming(key, value, expected, origin, sources.get(name))

    def _read_records(self, chunk: list[_Holders]) -> None:
        of: list[dict[str, bytes]] = [{} for _ in self._stores]
        for key, holders in chunk:
            for number, expected in holders:
                of[number][sample_id_of_key(key)] = expected
        self._records = [
            (store.origins(asked), store.sources(asked))
            for store, asked in zip(self._stores, of, strict=True)
        ]

    def _add(self, incoming: Incoming) -> None:
        self._batch.append(incoming)
        self._num_bytes += incoming.value.nbytes
        if self._num_bytes >= _BATCH_BYTES or len(self._batch) >= _BATCH_RECORDS:
            self._flush()

    def _flush(self) -> None:
        batch, self._batch, self._num_bytes = self._batch, [], 0
        self._merger.add_incoming(batch, self._provenance)
        self._tell()

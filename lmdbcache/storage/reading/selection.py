"""Some samples of a reader by position: what a training loop reads batches with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import lmdb
import numpy as np
import numpy.typing as npt

from lmdbcache.errors import InvalidEmbeddingError
from lmdbcache.storage.environment import Snapshot
from lmdbcache.storage.gather import MappedFile
from lmdbcache.storage.pages.pages import ValueTable
from lmdbcache.storage.reading.batches import gather, key_or_empty
from lmdbcache.storage.reading.located import LocatedValues, locate
from lmdbcache.storage.row_parts import RowPart
from lmdbcache.storage.values import batch_array

if TYPE_CHECKING:
    from lmdbcache.storage.reader import EmbeddingReader

__all__ = ["Positions", "Selection"]

_T = TypeVar("_T")
Positions = Sequence[int] | npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]


class Selection:
    """Some samples of a reader in an order of their own, read by position.

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
        self._table: ValueTable | None = None
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
            located: LocatedValues | None = snapshot.located
            if located is not None and snapshot.is_protected and self._knows_all(located):
                return self._gather(located, self._rows[_indices(positions)], out)
        found = self._look_up(positions, lambda located, rows: self._gather(located, rows, out))
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

        def read(located: LocatedValues, rows: Rows) -> _T:
            places, length = self._places(located, rows)
            located.file.prepare(places, length)
            copied = copy(located.file, places, length)
            self._count(located, rows)
            return copied

        return self._look_up(positions, read)

    def will_need(self, positions: Positions) -> None:
        """Ask the kernel to read these embeddings from disk, in the background."""

        def read(located: LocatedValues, rows: Rows) -> None:
            located.file.will_need(*self._places(located, rows))

        self._look_up(positions, read)

    def _gather(
        self, located: LocatedValues, rows: Rows, out: npt.NDArray[Any] | None
    ) -> npt.NDArray[Any]:
        batch = gather(located, located.table.offsets[rows], out, self.part)
        self._count(located, rows)
        return batch

    def _count(self, located: LocatedValues, rows: Rows) -> None:
        if located.counter is not None and self.reader.counts_reads:
            located.counter.count(rows)

    def _places(self, located: LocatedValues, rows: Rows) -> tuple[npt.NDArray[np.int64], int]:
        offsets = located.table.offsets[rows]
        if self.part is None:
            return offsets, located.common_length or 0
        return self.part.places(offsets, located.shape, located.dtype.itemsize)

    def _look_up(
        self, positions: Positions, read: Callable[[LocatedValues, Rows], _T]
    ) -> _T | None:
        """Call `read` with the rows of these samples; None if one isn't known."""

        def find(snapshot: Snapshot, transaction: lmdb.Transaction) -> _T | None:
            reader = self.reader
            located = locate(snapshot, transaction, reader.num_read, is_counted=reader.counts_reads)
            if located is None or located.common_length is None:
                return None
            if not self._knows_all(located) and self._table is not located.table:
                self._rows = located.table.find([key_or_empty(i) for i in self.sample_ids])
                self._is_complete = bool((self._rows >= 0).all())
                self._table = located.table
            rows = self._rows[_indices(positions)]
            if not self._is_complete and rows.size and rows.min() < 0:
                return None
            return read(located, rows)

        return self.reader.read_pinned(find)

    def _knows_all(self, located: LocatedValues) -> bool:
        return self._table is located.table and self._is_complete


def _indices(positions: Positions) -> Any:
    if isinstance(positions, np.ndarray):
        return positions
    if isinstance(positions, list):  # of ints, from a sampler: faster than numpy's own look at it
        return np.fromiter(positions, np.int64, len(positions))
    return np.asarray(positions, np.int64)

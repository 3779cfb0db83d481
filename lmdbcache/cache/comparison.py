"""The differences of two stores: identity, provenance, samples, values."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from lmdbcache.storage import (
    EmbeddingReader,
    Progress,
    Report,
    portable,
    sample_id_of_key,
)

DEFAULT_TOLERANCE: Final = 1e-5
_FEW: Final = 10
_BYTES_AT_ONCE: Final = 4 << 20  # of float32 values, from each store
_ROWS_AT_ONCE: Final = 1024

# When and from which file the same embeddings were imported makes no difference between stores.
_OF_IMPORT: Final = re.compile(r"imported_(from|at)(_\d+)?")

_Differences = Mapping[str, tuple[Any, Any]]


class Difference(NamedTuple):
    """The distance of two embeddings.

    Args:
        max_abs: Largest difference of two elements; infinite if the shapes differ.
        cosine: 1 less the cosine of the angle between them: 0 is the same direction; 1 if the
            shapes differ or one of the two is zero.
        relative_l2: Length of the difference, relative to that of the first; infinite if the
            shapes differ.
    """

    max_abs: float
    cosine: float
    relative_l2: float


class SampleDifference(NamedTuple):
    """The distance of two embeddings of one sample, as in `Difference`."""

    sample_id: str
    max_abs: float
    cosine: float


@dataclass
class StoreComparison(Report):
    """The differences of two stores.

    Args:
        config: Fields of the identity that differ, each with both values.
        provenance: The same of the provenance, but for when and from which file they were imported
            and for folders of this machine.
        num_only_a: Samples that only the first has; `only_a` names a few.
        num_only_b: The same of the second.
        num_common: Samples that both have.
        num_equal: Of these, bit for bit equal.
        num_close: Not equal, and no element differs by more than the tolerance.
        num_different: Further apart, or, without values, not bit for bit equal.
        num_other_shape: Of different shapes.
        worst: The samples that are furthest apart, at most ten, the furthest first.
        tolerance: Of `num_close`.
        has_values: Whether values were looked at, or checksums alone.
    """

    derived: ClassVar = ("is_equal",)

    a: Path
    b: Path
    config: _Differences
    provenance: _Differences
    tolerance: float
    has_values: bool
    num_only_a: int = 0
    num_only_b: int = 0
    num_common: int = 0
    num_equal: int = 0
    num_close: int = 0
    num_different: int = 0
    num_other_shape: int = 0
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    worst: list[SampleDifference] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs; values within the tolerance don't."""
        found = (self.num_only_a, self.num_only_b, self.num_different, self.num_other_shape)
        return not (self.config or self.provenance or any(found))


def compare_stores(
    a: str | Path,
    b: str | Path,
    *,
    values: bool = True,
    tolerance: float = DEFAULT_TOLERANCE,
    progress: Progress | None = None,
) -> StoreComparison:
    """Compare two stores. Memory is bounded, whatever their size.

    Values of equal dtype are compared by their checksums first, and read where these differ; of
    different dtypes all are read and compared as float32.

    Args:
        a: A store's folder.
        b: Another's, of any root.
        values: Read values; without, checksums show only whether values are equal, and nothing for
            different dtypes.
        tolerance: Largest difference of two elements that counts as none.
        progress: Called with (samples done, samples in all).

    Raises:
        CacheNotFoundError: One isn't a store.
        IntegrityError: One is damaged.
    """
    with (
        EmbeddingReader(a, track_usage=False) as first,
        EmbeddingReader(b, track_usage=False) as second,
    ):
        found = StoreComparison(
            first.path,
            second.path,
            first.config.differences(second.config),
            _provenance_differences(first.metadata.provenance, second.metadata.provenance),
            tolerance,
            values,
        )
        _Comparer(first, second, found).run(progress or (lambda *_: None))
    return found


def difference_of(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Difference:
    """Return the distance of two embeddings."""
    if x.shape != y.shape:
        return Difference(math.inf, 1.0, math.inf)
    a, b = (value.reshape(1, -1).astype(np.float64) for value in (x, y))
    max_abs, cosine, relative_l2 = _differences(a, b)
    return Difference(float(max_abs[0]), float(cosine[0]), float(relative_l2[0]))


def largest_difference(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """Return the `max_abs` of `difference_of`, in a fifth of the time."""
    if x.shape != y.shape:
        return math.inf
    return float(np.abs(np.subtract(x, y, dtype=np.float64)).max())


def _provenance_differences(a: Mapping[str, str], b: Mapping[str, str]) -> _Differences:
    a, b = portable(a), portable(b)
    names = sorted(name for name in a.keys() | b.keys() if not _OF_IMPORT.fullmatch(name))
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


class _Comparer:
    """A walk through both stores by key, which reads values in batches."""

    def __init__(self, a: EmbeddingReader, b: EmbeddingReader, found: StoreComparison) -> None:
        self._readers = (a, b)
        self._found = found
        self._same_dtype = a.config.dtype == b.config.dtype
        self._pending: list[str] = []
        self._worst: list[tuple[float, float, str]] = []
        size = max(4 * int(np.prod([n or 1 for n in r.embedding_shape or ()])) for r in (a, b))
        self._rows = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // size))
        # One shape for all, the same in both: a batch is one array.
        self._is_stackable = a.embedding_shape == b.embedding_shape and None not in (
            a.embedding_shape or (None,)
        )

    def run(self, progress: Progress) -> None:
        a, b = self._readers
        found, total, most = self._found, len(a) + len(b), max(len(a), len(b))
        for done, (key, in_a, in_b) in enumerate(_merged(a, b)):
            if done % _ROWS_AT_ONCE == 0:
                both = found.num_only_a + found.num_only_b + 2 * found.num_common
                progress(both * most // total, most)
            if in_b is None:
                found.num_only_a += 1
                _name_a_few(found.only_a, key)
            elif in_a is None:
                found.num_only_b += 1
                _name_a_few(found.only_b, key)
            else:
                found.num_common += 1
                self._compare(key, is_equal=in_a == in_b)
        self._read_pending()
        progress(most, most)
        found.worst = [
            SampleDifference(sample_id, max_abs, cosine)
            for max_abs, cosine, sample_id in sorted(self._worst, reverse=True)
        ]

    def _compare(self, key: bytes, *, is_equal: bool) -> None:
        if self._same_dtype and is_equal and self._has_one_shape():
            self._found.num_equal += 1
        elif self._found.has_values:
            self._pending.append(sample_id_of_key(key))
            if len(self._pending) >= self._rows:
                self._read_pending()
        elif self._same_dtype:
            self._found.num_different += 1

    def _has_one_shape(self) -> bool:
        """Equal bytes are equal values, unless the stores fold them differently."""
        a, b = (reader.embedding_shape for reader in self._readers)
        return (a or ())[1:] == (b or ())[1:] and len(a or ()) == len(b or ())

    def _read_pending(self) -> None:
        names, self._pending = self._pending, []
        if not names:
            return
        if self._is_stackable:
            a, b = (_as_rows(reader.get_batch(names)) for reader in self._readers)
            self._judge(names, a, b)
            return
        for name in names:
            x, y = (reader[name] for reader in self._readers)
            if x.shape != y.shape:
                self._found.num_other_shape += 1
            else:
                self._judge([name], _as_rows(x[None]), _as_rows(y[None]))

    def _judge(
        self, names: list[str], a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]
    ) -> None:
        """Rows of the same samples: `(n, elements)`."""
        is_equal = (a.view(np.uint32) == b.view(np.uint32)).all(axis=1)
        self._found.num_equal += int(is_equal.sum())
        rest = np.flatnonzero(~is_equal)
        if not len(rest):
            return
        x, y = a[rest].astype(np.float64), b[rest].astype(np.float64)
        max_abs, cosine, _ = _differences(x, y)
        is_close = max_abs <= self._found.tolerance
        self._found.num_close += int(is_close.sum())
        self._found.num_different += int((~is_close).sum())
        for row, largest, angle in zip(rest, max_abs.tolist(), cosine.tolist(), strict=True):
            entry = (largest, angle, names[row])
            if len(self._worst) < _FEW:
                heapq.heappush(self._worst, entry)
            else:
                heapq.heappushpop(self._worst, entry)


def _as_rows(batch: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(batch.reshape(len(batch), -1).astype(np.float32, copy=False))


def _differences(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the three numbers of a `Difference`, for each row of `(n, elements)`."""
    differences = x - y
    lengths, others = (np.sqrt(np.einsum("ij,ij->i", rows, rows)) for rows in (x, y))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.where(
            lengths * others > 0, 1 - np.einsum("ij,ij->i", x, y) / (lengths * others), 1.0
        )
    cosine[(lengths == 0) & (others == 0)] = 0.0
    apart = np.sqrt(np.einsum("ij,ij->i", differences, differences))
    relative_l2 = apart / np.where(lengths > 0, lengths, 1.0)
    # Rounding doesn't bring two vectors closer than the same direction.
    return np.abs(differences, out=differences).max(axis=1), np.maximum(cosine, 0.0), relative_l2


def _name_a_few(names: list[str], key: bytes) -> None:
    if len(names) < _FEW:
        names.append(sample_id_of_key(key))


def _merged(
    a: EmbeddingReader, b: EmbeddingReader
) -> Iterator[tuple[bytes, bytes | None, bytes | None]]:
    """Yield (key, checksum in a, checksum in b) by key; None where it isn't stored."""
    end = (b"", b"")
    first, second = a.checksums(), b.checksums()
    x, y = next(first, end), next(second, end)
    while x != end or y != end:
        if y == end or (x != end and x[0] < y[0]):
            yield x[0], x[1], None
            x = next(first, end)
        elif x == end or y[0] < x[0]:
            yield y[0], None, y[1]
            y = next(second, end)
        else:
            yield x[0], x[1], y[1]
            x, y = next(first, end), next(second, end)

"""Exact search: the stored embeddings that are most like a query, over one or several stores.

A matrix product of float32 picks the candidates of each block of a store; float64 decides between
them. So the result is that of a search in float64, at the speed of the product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lmdbcache.config import CacheConfig
from lmdbcache.errors import ConfigError, InvalidEmbeddingError, SampleNotFoundError
from lmdbcache.storage.layout import canonical_sample_id
from lmdbcache.storage.windows import first_window

_METRICS: Final = ("cosine", "l2")
_BLOCK_BYTES: Final = 16 << 20  # of float32 values
_QUERIES_AT_ONCE: Final = 256

_Floats = npt.NDArray[np.float64]


class _Searchable(Protocol):
    """Where is searched: an `EmbeddingReader`, or a view of one."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> CacheConfig: ...
    @property
    def embedding_shape(self) -> tuple[int | None, ...] | None: ...
    def reopened(self) -> _Searchable: ...
    def close(self) -> None: ...
    def select(self) -> Any: ...
    def __contains__(self, sample_id: object, /) -> bool: ...
    def __getitem__(self, sample_id: str, /) -> npt.NDArray[Any]: ...


class Nearest(NamedTuple):
    """The stored samples that are nearest to a query, nearest first.

    Args:
        sample_ids: At most `k` of them; of equal scores in the order of the sample ids.
        scores: `(len(sample_ids),)`, float32: cosine similarities, or L2 distances.
    """

    sample_ids: list[str]
    scores: npt.NDArray[np.float32]


def nearest(
    readers: Sequence[_Searchable],
    query: str | npt.ArrayLike,
    k: int = 10,
    metric: str = "cosine",
) -> Nearest | list[Nearest]:
    """Search the newest commit of stores for the embeddings nearest to a query.

    Every embedding is compared, in blocks of 16 MiB: memory doesn't grow with the values. Reads are
    counted neither as use of the store nor as hits.

    Args:
        readers: Of stores with one config, such as those of several roots, or views that give one
            vector for each sample. A sample of several stores counts once, by its best score.
        query: One vector `(D,)`, several `(Q, D)`, or the id of a stored sample, which
            isn't in its result.
        k: How many samples; fewer if fewer are stored.
        metric: `"cosine"`: similarity, 1 is the same direction; a stored vector of zeros has 0.
            `"l2"`: Euclidean distance, in the model's own unit.

    Returns:
        One result for a sample id or one vector; a list of Q for `(Q, D)`.

    Raises:
        ConfigError: No reader, stores of different configs, hidden states, an unknown `metric`, or
            `k` below 1.
        InvalidEmbeddingError: The query has another width, holds NaN or Inf, or has no direction.
        SampleNotFoundError: No store holds the sample.
        InvalidSampleIdError: Not a sample id.
    """
    if metric not in _METRICS:
        raise ConfigError(f"metric: {metric!r}; known are {', '.join(map(repr, _METRICS))}")
    if k < 1:
        raise ConfigError(f"k: {k}; it must be 1 or more")
    if not readers:
        raise ConfigError("readers: none; give the reader of each store to search")
    with contextlib.ExitStack() as stack:
        sources = [reader.reopened() for reader in readers]
        for source in sources:
            stack.callback(source.close)
        width = _common_width(sources)
        left_out = None
        if isinstance(query, str):
            left_out = canonical_sample_id(query)
            holder = next((source for source in sources if left_out in source), sources[0])
            if left_out not in holder and (first := first_window(left_out)) in holder:
                raise SampleNotFoundError(
                    f"{left_out!r} is a recording; search by one of its windows, such as {first!r}"
                )
            query = holder[left_out]
        queries, is_one = _vectors(query, width, metric)
        most = k if left_out is None else k + 1
        found: list[Nearest] = []
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            some = queries[start : start + _QUERIES_AT_ONCE]
            of_each = zip(*(_search(source, some, most, metric) for source in sources), strict=True)
            found += [_merged(best, k, metric, left_out) for best in of_each]
    return found[0] if is_one else found


def _common_width(sources: Sequence[_Searchable]) -> int:
    first, widths = sources[0], set[int]()
    for other in sources[1:]:
        if differences := first.config.differences(other.config):
            raise ConfigError(
                f"{first.path} and {other.path} differ in {', '.join(differences)}: their "
                "embeddings can't be compared. Search stores of one config together"
            )
    for source in sources:
        width, *more = source.embedding_shape or (None,)
        if more or width is None:
            raise ConfigError(
                f"{source.path} holds {source.config.output} of shape {source.embedding_shape}; a "
                "search compares vectors of one length. Search a store of pooled embeddings, or a "
                "view of hidden states: `nearest([HiddenStateView(reader, 'mean')], query)`"
            )
        widths.add(width)
    if len(widths) > 1:
        raise ConfigError(f"readers: embeddings of {sorted(widths)} elements can't be compared")
    return widths.pop()


def _vectors(query: npt.ArrayLike, width: int, metric: str) -> tuple[_Floats, bool]:
    """Return the queries as `(Q, D)`, and whether it is one."""
    try:
        given = np.asarray(query).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidEmbeddingError(
            f"query: not an array of real numbers ({error}); give a vector on the CPU"
        ) from None
    if given.ndim not in (1, 2) or given.shape[-1] != width:
        raise InvalidEmbeddingError(
            f"query: shape {given.shape}; the stored embeddings have {width} elements: give "
            f"({width},) or (number of queries, {width})"
        )
    if not np.isfinite(given).all():
        raise InvalidEmbeddingError("query: holds NaN or Inf; compute it again")
    if metric == "cosine" and not given.any(axis=-1).all():
        raise InvalidEmbeddingError(
            "query: a vector of zeros has no direction; compare by distance: `metric='l2'`"
        )
    return np.atleast_2d(given), given.ndim == 1


_Best = tuple[list[str], npt.NDArray[np.float32]]  # sample ids, nearness


def _search(source: _Searchable, queries: _Floats, k: int, metric: str) -> list[_Best]:
    """Return the k nearest of one source for each query; the higher its nearness, the nearer."""
    samples = source.select()
    scorer = _Scorer(queries, metric)
    best = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
    step = max(1, _BLOCK_BYTES // (4 * queries.shape[1]))
    for start in range(0, len(samples), step):
        positions = np.arange(start, min(start + step, len(samples)))
        block = samples.get_batch(positions).astype(np.float32, copy=False)
        for number, (approximate, slack) in enumerate(scorer.approximate(block)):
            known, nearness = best[number]
            floor = scorer.comparable(nearness[-1]) if len(nearness) == k else -np.inf
            rows = _candidates(approximate, slack, k, floor)
            if not len(rows):
                continue
            known = np.concatenate([known, positions[rows]])
            nearness = np.concatenate([nearness, scorer.exact(number, block[rows])])
            order = np.lexsort((known, -nearness))[:k]
            best[number] = known[order], nearness[order]
    sample_ids = samples.sample_ids
    return [([sample_ids[row] for row in rows], nearness) for rows, nearness in best]


def _candidates(
    approximate: npt.NDArray[np.float32], slack: float, k: int, floor: float
) -> npt.NDArray[np.int64]:
    """Return the rows that can be among the k nearest; an overflow to NaN or Inf is one."""
    rows = np.flatnonzero(~(approximate < floor - slack))
    if len(rows) > k:
        of_rows = approximate[rows]
        rows = rows[~(of_rows < np.partition(of_rows, -k)[-k] - slack)]
    return rows


class _Scorer:
    """The nearness of a block's rows to some queries, approximately by a product and exactly.

    The nearness is the similarity, or the negative distance; the approximate one of `"l2"` is the
    negative square. The slack is twice the largest error of a product in float32.
    """

    def __init__(self, queries: _Floats, metric: str) -> None:
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        self._is_cosine = metric == "cosine"
        self._queries = queries / lengths if self._is_cosine else queries
        self._lengths = lengths[:, 0]
        self._error = 2 * (queries.shape[1] + 8) * float(np.finfo(np.float32).eps)
        with np.errstate(over="ignore"):
            self._rounded = self._queries.astype(np.float32)

    def approximate(self, block: npt.NDArray[np.float32]) -> Any:
        """Yield (nearness of each row, slack) for each query."""
        with np.errstate(all="ignore"):
            products = self._rounded @ block.T
            squares = np.einsum("ij,ij->i", block, block)
            lengths = np.sqrt(squares)
            if self._is_cosine:
                products /= np.where(lengths > 0, lengths, 1)
                slacks = np.full(len(products), self._error)
            else:
                products *= 2
                products -= squares
                products -= (self._lengths**2).astype(np.float32)[:, None]
                slacks = self._error * (self._lengths + float(lengths.max(initial=0))) ** 2
        return zip(products, slacks.tolist(), strict=True)

    def comparable(self, nearness: float) -> float:
        """Return an exact nearness on the scale of the approximate ones."""
        return float(nearness) if self._is_cosine else -(float(nearness) ** 2)

    def exact(self, number: int, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the nearness of rows to one query; NaN and Inf are farthest."""
        query, wide = self._queries[number], rows.astype(np.float64)
        with np.errstate(all="ignore"):
            # einsum, as the sum of a row in a product depends on where in the block it stands.
            if self._is_cosine:
                lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
                found = np.einsum("ij,j->i", wide, query) / np.where(lengths > 0, lengths, 1)
            else:
                wide -= query
                found = -np.sqrt(np.einsum("ij,ij->i", wide, wide))
            return np.where(np.isfinite(found), found, -np.inf).astype(np.float32)


def _merged(found: Sequence[_Best], k: int, metric: str, left_out: str | None) -> Nearest:
    best: dict[str, float] = {}
    for sample_ids, nearness in found:
        for sample_id, value in zip(sample_ids, nearness.tolist(), strict=True):
            best[sample_id] = max(value, best.get(sample_id, value))
    best.pop(left_out or "", None)
    ordered = sorted(best, key=lambda sample_id: (-best[sample_id], sample_id))[:k]
    scores = np.array([best[sample_id] for sample_id in ordered], np.float32)
    return Nearest(ordered, scores if metric == "cosine" else np.abs(scores))

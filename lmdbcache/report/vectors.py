"""The embeddings that are looked at: which ones, reduced to vectors, their spread and their map."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from lmdbcache.errors import CacheError, IntegrityError, InvalidEmbeddingError, SampleNotFoundError
from lmdbcache.storage import EmbeddingReader, Progress, class_of, value_bytes

_BATCH_BYTES: Final = 64 << 20
_READ_BYTES: Final = 2 << 30  # of one store: some seconds from a disk, 550 hidden states of AST
_POOLED_BYTES: Final = 512 << 20  # what the vectors may take in memory
_NUM_VALUES: Final = 1_000_000  # kept for the histogram of values
_NUM_PROBED: Final = 16
_NUM_STACKED: Final = 2_000  # whose layers are kept apart: 80 MB of 13 layers of 768
_MAX_UNREADABLE: Final = 1_000  # of a store in ruins; each is looked for by itself
_NUM_BINS: Final = 60
_PERCENTS: Final = (0, 1, 50, 99, 100)
MAX_POINTS: Final = 5_000  # what a phone still draws and moves as SVG


# ---- which ones


def in_stratified_order(sample_ids: Iterable[str]) -> list[str]:
    """Return the sample ids in an order whose every beginning is a fair sample.

    The first n hold each class in its proportion, at least once if n allows, and within a class
    the choice is by hash: the same on every machine, and stable while other samples come and go.
    """
    hashed = sorted((_hash(sample_id), sample_id) for sample_id in sample_ids)
    sizes = Counter(class_of(sample_id) for _, sample_id in hashed)
    seen: Counter[str] = Counter()
    ranked = []
    for number, sample_id in hashed:
        name = class_of(sample_id)
        ranked.append((seen[name] / sizes[name], number, sample_id))
        seen[name] += 1
    return [sample_id for _, _, sample_id in sorted(ranked)]


def _hash(sample_id: str) -> int:
    return xxhash.xxh3_64_intdigest(sample_id.encode("utf-8", "surrogatepass"))


# ---- reading


@dataclass
class Vectors:
    """The embeddings that were read of one store; row i belongs to `sample_ids[i]`.

    Args:
        sample_ids: In the order given, less what couldn't be read.
        pooled: `(n, hidden_size)`, float32: a vector as it is, the mean over all but the last
            dimension of anything larger. None if the last dimensions differ.
        norms: `(n,)`, float64: Euclidean norms of the pooled vectors.
        digests: `(n,)`: equal for embeddings of equal shape and bits.
        values: Up to a million of the stored numbers, float32, evenly from all embeddings.
        layers: `(m, layers, hidden_size)`, float32: the first rows of a store of all layers, each
            layer's mean over its tokens; None of other outputs.
        mean_bytes: Mean size of a stored embedding, in bytes.
        is_mean: Whether `pooled` holds means over tokens.
        unreadable: Why samples couldn't be read: sample id → reason.
        not_finite: Samples whose values hold NaN or Inf; they are left out.
    """

    sample_ids: list[str]
    pooled: npt.NDArray[np.float32] | None
    norms: npt.NDArray[np.float64]
    digests: list[int]
    values: npt.NDArray[np.float32]
    layers: npt.NDArray[np.float32] | None
    mean_bytes: float
    is_mean: bool
    unreadable: dict[str, str]
    not_finite: list[str]

    @cached_property
    def classes(self) -> list[str]:
        """The class of each row."""
        return list(map(class_of, self.sample_ids))


def read_vectors(
    reader: EmbeddingReader,
    sample_ids: Sequence[str],
    progress: Progress | None = None,
) -> Vectors:
    """Read embeddings: of the list's beginning what 2 GiB, or 512 MiB of vectors, can hold.

    Each value is compared with its checksum if the reader verifies.

    Args:
        reader: The store.
        sample_ids: What to read, in an order whose beginning is a fair sample.
        progress: Called with the embeddings read and those to read.

    Raises:
        IntegrityError: More than 1,000 embeddings can't be read.
    """
    unreadable: dict[str, str] = {}
    mean_bytes = _mean_bytes(reader, sample_ids[:_NUM_PROBED])
    chosen = sample_ids[: _affordable(reader, mean_bytes)]
    per_embedding = max(1, _NUM_VALUES // max(1, len(chosen)))
    step = max(1, min(1024, int(_BATCH_BYTES // mean_bytes)))
    rows: dict[str, tuple[npt.NDArray[np.float32], int]] = {}
    values: list[npt.NDArray[np.float32]] = []
    with_layers = set(chosen[:_NUM_STACKED]) if reader.config.output.startswith("layers") else set()
    stacks: dict[str, npt.NDArray[np.float32]] = {}
    not_finite: list[str] = []
    num_bytes = 0
    in_key_order = sorted(chosen)  # neighbours on disk
    for start in range(0, len(chosen), step):
        for sample_id, embedding in _read(reader, in_key_order[start : start + step], unreadable):
            wide = embedding.astype(np.float32, copy=False)
            if not np.isfinite(wide).all():
                not_finite.append(sample_id)
                continue
            num_bytes += value_bytes(embedding.shape, reader.config.dtype)
            rows[sample_id] = (_pooled(wide), _digest(embedding))
            if sample_id in with_layers:
                each = wide.reshape(len(wide), -1, wide.shape[-1])
                stacks[sample_id] = each.mean(axis=1, dtype=np.float32)
            flat = wide.reshape(-1)
            values.append(flat[:: math.ceil(flat.size / per_embedding)].copy())
        if progress is not None:
            progress(min(start + step, len(chosen)), len(chosen))
    kept = [sample_id for sample_id in chosen if sample_id in rows]
    vectors = [rows[sample_id][0] for sample_id in kept]
    norms = [float(np.linalg.norm(vector.astype(np.float64))) for vector in vectors]
    return Vectors(
        sample_ids=kept,
        pooled=np.stack(vectors) if len({v.shape for v in vectors}) == 1 else None,
        norms=np.array(norms, np.float64),
        digests=[rows[sample_id][1] for sample_id in kept],
        values=np.concatenate(values) if values else np.empty(0, np.float32),
        layers=np.stack([stacks[name] for name in kept if name in stacks]) if stacks else None,
        mean_bytes=num_bytes / len(kept) if kept else mean_bytes,
        is_mean=len(reader.embedding_shape or ()) > 1,
        unreadable=unreadable,
        not_finite=not_finite,
    )


def _affordable(reader: EmbeddingReader, mean_bytes: float) -> int:
    *tokens, last = reader.embedding_shape or (1,)
    hidden_size = last if tokens and last else mean_bytes / reader.dtype.itemsize
    return max(1, int(min(_READ_BYTES / mean_bytes, _POOLED_BYTES / (4 * hidden_size))))


def _mean_bytes(reader: EmbeddingReader, sample_ids: Sequence[str]) -> float:
    shape = reader.embedding_shape or ()
    known = [size for size in shape if size is not None]
    if len(known) == len(shape):
        return max(1.0, float(math.prod(known) * reader.dtype.itemsize))
    sizes = [embedding.nbytes for _, embedding in _read(reader, sample_ids, {})]
    return max(1.0, sum(sizes) / len(sizes)) if sizes else 1.0


def _read(
    reader: EmbeddingReader, sample_ids: Sequence[str], unreadable: dict[str, str]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield (sample id, embedding) of what can be read; add the reasons of the others."""
    shape = reader.embedding_shape or ()
    try:
        if sample_ids and None not in shape:
            yield from zip(sample_ids, reader.get_batch(sample_ids), strict=True)
            return
    except (IntegrityError, InvalidEmbeddingError, SampleNotFoundError):
        pass  # one by one, it can be said which
    for sample_id in sample_ids:
        if len(unreadable) >= _MAX_UNREADABLE:
            raise IntegrityError(
                f"{_MAX_UNREADABLE} embeddings and maybe more can't be read, the first of them: "
                f"{next(iter(unreadable.values()))}"
            )
        try:
            embedding = reader[sample_id]
        except SampleNotFoundError:
            continue  # removed in the meantime
        except CacheError as error:
            unreadable[sample_id] = str(error)
            continue
        yield sample_id, embedding


def _pooled(embedding: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if embedding.ndim < 2:
        return np.array(embedding, np.float32).reshape(-1)
    tokens = embedding.reshape(-1, embedding.shape[-1])
    mean = tokens.mean(axis=0, dtype=np.float64)
    return np.asarray(mean, np.float32)


def _digest(embedding: npt.NDArray[Any]) -> int:
    raw = np.ascontiguousarray(embedding).reshape(-1).view(np.uint8)
    return xxhash.xxh3_128_intdigest(raw.data, seed=embedding.shape[0] if embedding.ndim else 0)


# ---- what is shown of them


@dataclass(frozen=True)
class Distribution:
    """The spread of some numbers, ready to be drawn.

    Args:
        count: How many there are.
        mean: Their mean.
        standard_deviation: Of all of them.
        percentiles: Percent → value.
        edges: Of the bins; one more than there are bins.
        counts: Numbers in each bin. What lies beyond the edges is in the outermost bins.
    """

    count: int
    mean: float
    standard_deviation: float
    percentiles: dict[str, float]
    edges: list[float]
    counts: list[int]


def distribution_of(numbers: npt.NDArray[Any], *, trim: float = 0.0) -> Distribution | None:
    """Return the distribution of some finite numbers; None of no numbers.

    Args:
        numbers: Of any shape.
        trim: Percent at either end that needn't be within the edges, so that a few far values
            don't press all others into one bar.
    """
    flat = np.asarray(numbers, np.float64).reshape(-1)
    if not flat.size:
        return None
    percentiles = np.percentile(flat, _PERCENTS)
    low, high = np.percentile(flat, (trim, 100 - trim))
    # Equal numbers, or nearly so, still get a bar of some width.
    least = max(abs(low), abs(high), 1e-30) * 1e-6
    if high - low < least:
        low, high = low - least, high + least
    counts, edges = np.histogram(flat.clip(low, high), bins=_NUM_BINS, range=(low, high))
    return Distribution(
        count=int(flat.size),
        mean=float(flat.mean()),
        standard_deviation=float(flat.std()),
        percentiles={
            f"{percent} %": float(value)
            for percent, value in zip(_PERCENTS, percentiles, strict=True)
        },
        edges=edges.tolist(),
        counts=counts.tolist(),
    )


@dataclass(frozen=True)
class EmbeddingMap:
    """Two principal components.

    Args:
        sample_ids: One for each point.
        x: First component.
        y: Second component.
        explained_variance: Share of the variance along each, 0 to 1.
    """

    sample_ids: list[str]
    x: list[float]
    y: list[float]
    explained_variance: list[float]


def map_of(vectors: Vectors) -> EmbeddingMap | str:
    """Return the map of the first 5,000 vectors, or why none can be drawn."""
    from sklearn.decomposition import PCA

    if vectors.pooled is None or not vectors.sample_ids:
        return (
            "The embeddings have different lengths." if vectors.sample_ids else "Nothing to show."
        )
    points = vectors.pooled[:MAX_POINTS].astype(np.float64)
    if len(points) == 1:
        return "One embedding alone has no map."
    largest = np.abs(points).max()
    points /= largest or 1.0
    if np.ptp(points, axis=0).max() == 0:
        return "All embeddings that were looked at are equal."
    num_components = min(2, *points.shape)
    pca = PCA(
        num_components,
        svd_solver="covariance_eigh" if points.shape[1] < 4096 else "auto",
        random_state=0,
    )
    coordinates = pca.fit_transform(points)
    coordinates = np.pad(coordinates, ((0, 0), (0, 2 - num_components))) * (largest or 1.0)
    shares = [float(share) for share in pca.explained_variance_ratio_]
    return EmbeddingMap(
        sample_ids=vectors.sample_ids[:MAX_POINTS],
        x=coordinates[:, 0].tolist(),
        y=coordinates[:, 1].tolist(),
        explained_variance=[*shares, 0.0][:2],
    )

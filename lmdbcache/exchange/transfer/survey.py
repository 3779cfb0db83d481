"""What a source holds, counted before anything is read."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmdbcache.errors import CacheError, InvalidEmbeddingError
from lmdbcache.exchange.transfer.entries import Entry, Refusal, Source
from lmdbcache.storage import check_shape, split_sample_id

__all__ = ["Shape", "Survey", "misfit", "squeezed", "survey"]

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Survey:
    """What a source holds.

    Args:
        source: Where it comes from.
        classes: Class → number of samples.
        shapes: Shape → number of embeddings, of those that tell without being read.
        dtypes: numpy's name → number of embeddings.
        shape: The shape that a new store would have: most have it; None if only reading tells.
    """

    source: Source
    classes: Counter[str]
    shapes: Counter[tuple[int, ...]]
    dtypes: Counter[str | None]
    shape: Shape | None

    @property
    def entries(self) -> list[Entry]:
        """The embeddings, each sample once."""
        return list(self.source.listing.entries.values())


def survey(source: Source, *, squeeze: bool = False, ragged: bool = False) -> Survey:
    """Count what a source holds.

    Args:
        source: An opened source.
        squeeze: Take off a leading dimension of size 1.
        ragged: The first dimension may differ between embeddings.
    """
    entries = source.listing.entries.values()
    if squeeze:
        for entry in (*entries, *source.listing.repeated):
            entry.shape = None if entry.shape is None else squeezed(entry.shape)
    shapes = Counter(entry.shape for entry in entries if entry.shape is not None)
    told = source.description.embedding_shape
    if told is None and not shapes:
        told = _first_shape(entries, squeeze=squeeze, ragged=ragged)
    return Survey(
        source,
        Counter(split_sample_id(entry.sample_id)[1] for entry in entries),
        shapes,
        Counter(entry.dtype for entry in entries),
        told if told is not None else _usual(shapes, ragged=ragged),
    )


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the leading dimension of a batch of one; one dimension stays."""
    return tuple(shape[1:] if len(shape) > 1 and shape[0] == 1 else shape)


def misfit(entry: Entry, shape: Shape | None) -> Refusal | None:
    """Why an embedding doesn't go with the others, as far as its shape tells."""
    if entry.shape is None:
        return None
    try:
        check_shape(entry.sample_id, entry.shape, shape)
    except InvalidEmbeddingError:
        hint = ""
        if shape and len(shape) == len(entry.shape) > 1 and shape[1:] == entry.shape[1:]:
            hint = "; --ragged lets the first dimension differ"
        return Refusal(
            entry.name, f"shape {entry.shape}, where {_written(shape)} is expected{hint}"
        )
    return None


def _first_shape(entries: Iterable[Entry], *, squeeze: bool, ragged: bool) -> Shape | None:
    """The shape of the first that can be read, where only reading tells."""
    for entry in entries:
        # What is wrong with it is told when it is imported.
        with contextlib.suppress(CacheError, OSError, ValueError, IndexError):
            value = entry.load()
            if value is not None:
                shape = squeezed(value.shape) if squeeze else tuple(value.shape)
                return (None, *shape[1:]) if ragged else shape
    return None


def _usual(shapes: Counter[tuple[int, ...]], *, ragged: bool) -> Shape | None:
    if not shapes:
        return None
    if not ragged:
        return shapes.most_common(1)[0][0]
    rests: Counter[tuple[int, ...]] = Counter()
    for shape, number in shapes.items():
        rests[shape[1:]] += number
    return (None, *rests.most_common(1)[0][0])


def _written(shape: Shape | None) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape or ()) + ")"

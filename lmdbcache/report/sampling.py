"""Which embeddings of a large store are looked at: the same ones every time, from every class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import xxhash

from lmdbcache.errors import InvalidSampleIdError
from lmdbcache.storage import split_sample_id

__all__ = ["class_of", "in_stratified_order"]


def class_of(sample_id: str) -> str:
    """The class of a sample id, also of one that couldn't be stored."""
    try:
        return split_sample_id(sample_id)[1]
    except InvalidSampleIdError:
        return "(no class)"


def in_stratified_order(sample_ids: Iterable[str]) -> list[str]:
    """The sample ids in an order whose every beginning is a fair sample.

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

"""Which embeddings of a store are exported."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lmdbcache.config import CacheConfig
from lmdbcache.errors import SampleNotFoundError, TransferError
from lmdbcache.exchange.transfer.descriptions import export_description
from lmdbcache.exchange.transfer.parts import Embeddings
from lmdbcache.files import few
from lmdbcache.storage import EmbeddingReader, canonical_sample_id, portable, split_sample_id

__all__ = ["Chosen", "choose"]


@dataclass(frozen=True)
class Chosen:
    """What is exported.

    Args:
        reader: Where the embeddings are.
        sample_ids: Which ones, in order.
        description: For the files' metadata.
        lengths: First dimension of each embedding, where that differs.
    """

    reader: EmbeddingReader
    sample_ids: list[str]
    description: dict[str, Any]
    lengths: list[int] | None

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of one embedding; None in front if the first dimension differs."""
        return tuple(self.description["embedding_shape"])

    @property
    def num_bytes(self) -> int:
        """Of all values."""
        rows = len(self.sample_ids) if self.lengths is None else sum(self.lengths)
        return rows * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return math.prod(n for n in self.shape if n is not None) * self.reader.dtype.itemsize

    def cut(self, number: int) -> Iterator[Chosen]:
        """So many pieces, one behind the other, whose lengths differ by one at most."""
        for piece in range(number):
            first, last = (len(self.sample_ids) * n // number for n in (piece, piece + 1))
            lengths = None if self.lengths is None else self.lengths[first:last]
            yield replace(self, sample_ids=self.sample_ids[first:last], lengths=lengths)

    def batches(self, most_bytes: int) -> Iterator[tuple[list[str], Embeddings]]:
        """Sample ids and embeddings in steps of about so many bytes."""
        if self.lengths is None:
            step = max(1, most_bytes // self._row_bytes)
            for first in range(0, len(self.sample_ids), step):
                ids = self.sample_ids[first : first + step]
                yield ids, self.reader.get_batch(ids)
            return
        ids, arrays, held = [], [], 0
        for sample_id in self.sample_ids:
            ids.append(sample_id)
            arrays.append(self.reader[sample_id])
            held += arrays[-1].nbytes
            if held >= most_bytes:
                yield ids, arrays
                ids, arrays, held = [], [], 0
        if ids:
            yield ids, arrays


def choose(
    reader: EmbeddingReader,
    config: CacheConfig,
    classes: Iterable[str] | None,
    sample_ids: Iterable[str] | None,
    shuffle: int | None = None,
) -> Chosen:
    """Some samples of a store, or all; with a seed to shuffle by, in random order.

    Raises:
        SampleNotFoundError: One isn't stored.
        TransferError: A class that has no sample, or nothing is left.
    """
    if sample_ids is None:
        ids = list(reader)
    else:
        ids = list(dict.fromkeys(canonical_sample_id(one) for one in sample_ids))
        if missing := reader.missing(ids):
            raise SampleNotFoundError(
                f"{len(missing)} of {len(ids)} samples aren't stored in {reader.path}: "
                f"{few(missing, 3)}"
            )
    if classes is not None:
        wanted = {name.lower() for name in classes}
        there = {split_sample_id(one)[1] for one in ids}
        if unknown := sorted(wanted - there):
            raise TransferError(
                f"class {', '.join(unknown)}: no such sample; there are {', '.join(sorted(there))}"
            )
        ids = [one for one in ids if split_sample_id(one)[1] in wanted]
    shape = reader.embedding_shape
    if not ids or shape is None:
        raise TransferError(f"{reader.path}: no samples to export")
    if shuffle is not None:
        random.Random(shuffle).shuffle(ids)
    lengths = [len(reader[one]) for one in ids] if None in shape else None
    description = export_description(config, shape, len(ids), portable(reader.metadata.provenance))
    return Chosen(reader, ids, description, lengths)

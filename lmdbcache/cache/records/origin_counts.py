"""How many of a store's embeddings came from where."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

from lmdbcache.cache.records.database import SourceRecords
from lmdbcache.cache.records.origins import THIS_STORE, Origin
from lmdbcache.storage import EmbeddingReader, sample_id_of_key, stored_checksums

__all__ = ["count_origins"]

_AT_ONCE = 4096


def count_origins(store: Path) -> list[tuple[Origin, int]]:
    """Who computed the embeddings of a store, and how many; the most first.

    What was computed in the store itself counts for `THIS_STORE`; if that is all, the list is
    empty.

    Args:
        store: Its folder.

    Raises:
        IntegrityError: The store or its records are damaged.
    """
    counts: Counter[str] = Counter()
    with SourceRecords(store) as records, EmbeddingReader(store, track_usage=False) as reader:
        if not records.has_origins:
            return []
        rest = len(reader)
        pairs = ((sample_id_of_key(key), value) for key, value in stored_checksums(reader))
        while chunk := dict(islice(pairs, _AT_ONCE)):
            found = records.origins(chunk)
            rest -= len(found)
            # Few objects stand for many samples.
            alike = Counter(map(id, found.values()))
            by_id = {id(origin): origin for origin in found.values()}
            for number, origin in by_id.items():
                counts[json.dumps(origin.to_dict(), sort_keys=True)] += alike[number]
    if not counts:
        return []
    origins = [(Origin(**json.loads(record)), number) for record, number in counts.items()]
    if rest > 0:
        origins.append((THIS_STORE, rest))
    return sorted(origins, key=lambda pair: -pair[1])

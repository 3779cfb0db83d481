"""What a store of imported embeddings knows of where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Final

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import ProvenanceMismatchError
from lmdbcache.exchange.transfer.entries import Source, identity

__all__ = ["origin_of"]

_FROM, _AT = "imported_from", "imported_at"
_DIGEST: Final = "weights_digest"


def origin_of(
    source: Source, cache: EmbeddingCache, config: CacheConfig, weights_digest: str | None
) -> tuple[dict[str, str], list[str]]:
    """The provenance to store with a source's embeddings, and notes.

    Raises:
        ProvenanceMismatchError: The store was filled with known weights, and nothing tells
            whether these embeddings were computed with them.
    """
    told = dict(source.description.provenance)
    if weights_digest is not None:
        if told.get(_DIGEST, weights_digest) != weights_digest:
            raise ProvenanceMismatchError(
                f"weights_digest: {source.path.name} says {told[_DIGEST]!r}, {weights_digest!r} "
                "is given. Leave the option out"
            )
        told[_DIGEST] = weights_digest
    stored = dict(cache.info(config).provenance) if config in cache else {}
    name = identity(source.path, source.files)
    number = _number_of(stored, name)
    known = stored.get(f"{_FROM}{number}") == name
    if _DIGEST in stored and _DIGEST not in told and not known:
        raise ProvenanceMismatchError(
            f"{cache.path(config)} was filled with the weights {stored[_DIGEST]!r}, and "
            f"{source.path.name} doesn't say which weights computed its embeddings. If they are "
            f"the same, give --weights-digest {stored[_DIGEST]}; else give --model-name or "
            "--front-end a name of its own, which makes another store"
        )
    notes = []
    if _DIGEST not in told and not known:
        notes.append(
            "nothing tells which weights computed these: an extraction that adds to the store "
            "warns, and the store then counts as filled with its weights"
        )
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**told, f"{_FROM}{number}": name, f"{_AT}{number}": now}, notes


def _number_of(stored: Mapping[str, str], name: str) -> str:
    """What is put behind the names of a source: nothing for the first, then `_2`, `_3`."""
    number, suffix = 1, ""
    while stored.get(f"{_FROM}{suffix}", name) != name:
        number += 1
        suffix = f"_{number}"
    return suffix

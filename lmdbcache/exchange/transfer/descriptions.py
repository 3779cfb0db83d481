"""What a file says about its embeddings: read in others' words, written in ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lmdbcache.config import CacheConfig

__all__ = ["Description", "describe", "description_of_json", "export_description"]

# In a file's metadata: it was written by an export, in this version of its form.
_MARK: Final = "lmdbcache_export"
_VERSION: Final = 1
_CONFIG_FIELDS: Final = tuple(CacheConfig().to_dict())
# The first of these that a file has counts.
_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "sample_rate": ("sample_rate", "sampling_rate", "audio_sample_rate", "sr"),
    "duration": ("duration", "audio_duration", "clip_duration", "duration_seconds"),
    "model_name": ("model_name", "model", "ast_model_name", "model_id"),
    "output": ("output",),
    "dataset": ("dataset",),
    "front_end": ("front_end",),
    "compute_dtype": ("compute_dtype",),
}
_NUMBERS: Final = ("sample_rate", "duration")


@dataclass(frozen=True)
class Description:
    """What a file says about its embeddings.

    Args:
        facts: Fields of a `CacheConfig`, as far as they are told; not checked yet.
        embedding_shape: Of an export: shape of one embedding, None in front if it may differ.
        num_embeddings: How many there should be.
        provenance: Of an export: what the store knew of its embeddings.
        is_export: Written by `export_embeddings`: names are sample ids, and nothing is guessed.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    embedding_shape: tuple[int | None, ...] | None = None
    num_embeddings: int | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    is_export: bool = False


def export_description(
    config: CacheConfig,
    embedding_shape: Sequence[int | None],
    num_embeddings: int,
    provenance: Mapping[str, str],
) -> dict[str, Any]:
    """What an export writes into its files' metadata: plain values, ready for JSON."""
    return {
        _MARK: _VERSION,
        **config.to_dict(),
        "embedding_shape": list(embedding_shape),
        "num_embeddings": num_embeddings,
        "provenance": dict(provenance),
    }


def describe(metadata: Mapping[Any, Any]) -> Description:
    """Read a file's metadata; what isn't known here is left alone."""
    is_export = metadata.get(_MARK) == _VERSION
    facts = {}
    for name, words in _WORDS.items():
        for word in words:
            value = _plain(metadata.get(word))
            if value is not None and (is_export or value != ""):
                facts[name] = _number(value) if name in _NUMBERS else value
                break
    count = _plain(metadata.get("num_embeddings"))
    count = count if type(count) is int else None
    if not is_export:
        return Description(facts, num_embeddings=count)
    facts["dtype"] = metadata.get("dtype")
    provenance = metadata.get("provenance")
    return Description(
        {name: value for name, value in facts.items() if name in _CONFIG_FIELDS},
        embedding_shape=_shape(metadata.get("embedding_shape")),
        num_embeddings=count,
        provenance={str(k): str(v) for k, v in provenance.items()}
        if isinstance(provenance, Mapping)
        else {},
        is_export=True,
    )


def description_of_json(text: str | bytes | None) -> Description:
    """Read metadata that is kept as JSON; anything else says nothing."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return Description()
    return describe(values) if isinstance(values, dict) else Description()


def _plain(value: Any) -> Any:
    """The Python value of a numpy or torch scalar."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    return value


def _number(value: Any) -> Any:
    """Numbers in metadata that can only hold text."""
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        try:
            return float(value)
        except ValueError:
            return value


def _shape(value: Any) -> tuple[int | None, ...] | None:
    if not isinstance(value, (list, tuple)):
        return None
    return tuple(None if size is None else int(size) for size in value)

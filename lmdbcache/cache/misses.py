"""Why something isn't found in a cache: an object for programs, a sentence for people."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lmdbcache.cache.failures import read_failures
from lmdbcache.cache.records import Origin, SourceRecords
from lmdbcache.cache.store_info import StoreInfo
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError
from lmdbcache.storage import (
    EmbeddingReader,
    canonical_sample_id,
    checksums_of,
    explain_sample_absence,
    sample_id_of_key,
    sample_key,
)

__all__ = ["Explanation", "explain_config", "explain_sample", "nearest_store"]

_logger: Final = logging.getLogger("lmdbcache")
_LITTLE: Final = 2  # fields; with more it is another model or dataset, and no slip


@dataclass(frozen=True)
class Explanation:
    """Why a config, or a sample of it, isn't found; or that it is. `str()` is the sentence.

    Args:
        reason: `"stored"`; of a config: `"nothing_stored"` (under the root), `"config_absent"` or
            `"damaged"`; of a sample besides: `"failed"` (its clip gave no embedding),
            `"invalid_sample_id"`, `"other_class"`, `"class_absent"` or `"file_absent"`.
        text: The sentence.
        config: What was asked for.
        sample_id: What was asked for, or None.
        nearest: The stored config with the fewest differing fields, if this one isn't stored.
        differences: Field → (asked, stored), against `nearest`.
        nearest_names: Sample ids, or for `"class_absent"` classes, that are stored instead.
        stored_elsewhere: Other configs that have the sample.
        failure: Why the clip gave no embedding.
        origin: Who computed the sample, if it came from another store.
        damaged: Stores under the root that can't be read.
    """

    reason: str
    text: str
    config: CacheConfig
    sample_id: str | None = None
    nearest: StoreInfo | None = None
    differences: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    nearest_names: tuple[str, ...] = ()
    stored_elsewhere: tuple[CacheConfig, ...] = ()
    failure: str | None = None
    damaged: tuple[Path, ...] = ()
    origin: Origin | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def is_stored(self) -> bool:
        """Whether what was asked for is there."""
        return self.reason == "stored"

    def log(self) -> None:
        """One line in the log `lmdbcache`: a warning if something else is stored."""
        level = logging.INFO if self.reason == "nothing_stored" else logging.WARNING
        _logger.log(level, "miss: %s", self.text)

    def log_new_store(self) -> None:
        """For who is about to make this store: a hint if one that differs little is there."""
        if self.is_stored or self.reason == "nothing_stored":
            return
        if self.damaged:
            self.log()  # perhaps it is the one that is asked for
        elif self.nearest is not None and len(self.differences) <= _LITTLE:
            told = ", ".join(
                f"{name}: {mine!r} here, {theirs!r} there"
                for name, (mine, theirs) in self.differences.items()
            )
            _logger.warning(
                "new store; the nearest stored is %s (%s)", self.nearest.path.name, told
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "reason": self.reason,
            "text": self.text,
            "is_stored": self.is_stored,
            "fingerprint": self.config.fingerprint,
            "sample_id": self.sample_id,
            "nearest": self.nearest.to_dict() if self.nearest else None,
            "differences": {name: list(pair) for name, pair in self.differences.items()},
            "nearest_names": list(self.nearest_names),
            "stored_elsewhere": [config.fingerprint for config in self.stored_elsewhere],
            "failure": self.failure,
            "origin": self.origin.to_dict() if self.origin else None,
            "damaged": [str(path) for path in self.damaged],
        }


def nearest_store(config: CacheConfig, stores: Iterable[StoreInfo]) -> StoreInfo | None:
    """The stored config with the fewest differing fields; the fullest of several."""
    return min(
        [store for store in stores if store.config and store.num_embeddings],
        key=lambda store: (
            len(config.differences(store.config)) if store.config else 0,
            -store.num_embeddings,
        ),
        default=None,
    )


def explain_config(config: CacheConfig, path: Path, stores: Sequence[StoreInfo]) -> Explanation:
    """Why nothing is found for this config, or that something is.

    Args:
        config: What is asked for.
        path: Its store's folder.
        stores: All that are under the root.
    """
    for store in stores:
        if store.path == path:
            if store.damage:
                return Explanation(
                    "damaged",
                    f"the store of this config is damaged: {store.damage}",
                    config,
                    damaged=(path,),
                )
            count = f"{store.num_embeddings:,} embeddings"
            return Explanation("stored", f"{path.name} has {count}", config)
    damaged = tuple(store.path for store in stores if store.damage)
    broken = ", ".join(folder.name for folder in damaged[:3])
    note = f". Damaged, it may be one of these: {broken}" if damaged else ""
    nearest = nearest_store(config, stores)
    if nearest is None or nearest.config is None:
        return Explanation(
            "config_absent" if damaged else "nothing_stored",
            f"nothing is stored under {path.parent} yet (asked for {config.slug}){note}",
            config,
            damaged=damaged,
        )
    differences = config.differences(nearest.config)
    told = ", ".join(f"{name}: {a!r} asked, {b!r} stored" for name, (a, b) in differences.items())
    return Explanation(
        "config_absent",
        f"nothing is stored under {path.parent} for this config. Nearest is {nearest.path.name}; "
        f"{told}; {nearest.num_embeddings:,} embeddings there{note}",
        config,
        nearest=nearest,
        differences=differences,
        damaged=damaged,
    )


def explain_sample(
    found: Explanation, path: Path, stores: Sequence[StoreInfo], sample_id: str
) -> Explanation:
    """Why this sample isn't found, or that it is.

    Args:
        found: What `explain_config` says of the config.
        path: The config's store.
        stores: All that are under the root.
        sample_id: `file_id:class`.
    """
    reason, text, failure = found.reason, found.text, None
    near: tuple[str, ...] = ()
    if found.is_stored:
        with EmbeddingReader(path, found.config, track_usage=False) as reader:
            if sample_id in reader:
                text = f"{sample_id!r} is stored in {path.name}"
                origin = _origin_of(reader, sample_id)
                if origin is not None:
                    text += f". It came from {origin}"
                return Explanation("stored", text, found.config, sample_id, origin=origin)
            failure = _failure_of(path, sample_id)
            absence = explain_sample_absence(sample_id, reader)
        reason, text, near = absence.reason, absence.text, absence.nearest
    if failure is not None:
        reason, near = "failed", ()
        text = f"{sample_id!r} gave no embedding when it was last tried: {failure}"
    others = [store for store in stores if store.config and store.path != path]
    elsewhere = tuple(store.config for store in others if store.config and _has(store, sample_id))
    if elsewhere:
        count = f" and {len(elsewhere) - 1} more" if len(elsewhere) > 1 else ""
        told = ", ".join(
            f"{name}: {b!r}" for name, (_, b) in found.config.differences(elsewhere[0]).items()
        )
        text += f". It is stored for another config ({told}){count}"
    return Explanation(
        reason,
        text,
        found.config,
        sample_id,
        found.nearest,
        found.differences,
        near,
        elsewhere,
        failure,
        found.damaged,
    )


def _origin_of(reader: EmbeddingReader, sample_id: str) -> Origin | None:
    with contextlib.suppress(CacheError):  # damaged records concern nothing else
        key = sample_key(sample_id)
        found = {sample_id_of_key(key): value for value in checksums_of(reader, [key]).values()}
        with SourceRecords(reader.path) as records:
            return next(iter(records.origins(found).values()), None)
    return None


def _failure_of(store: Path, sample_id: str) -> str | None:
    failures = {failure.sample_id: failure.reason for failure in read_failures(store)}
    try:
        return failures.get(sample_id) or failures.get(canonical_sample_id(sample_id))
    except CacheError:
        return None


def _has(store: StoreInfo, sample_id: str) -> bool:
    try:
        with EmbeddingReader(store.path, track_usage=False) as reader:
            return sample_id in reader
    except (CacheError, OSError):
        return False

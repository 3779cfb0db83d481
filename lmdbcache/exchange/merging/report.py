"""What a merge did, and what it left alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lmdbcache.cache import Origin
from lmdbcache.config import CacheConfig

__all__ = [
    "Conflict",
    "MergeReport",
    "MergeReports",
    "OnConflict",
    "Refusal",
    "refusal",
    "store_refusal",
]

OnConflict = Literal["error", "ours", "theirs"]


class Conflict(NamedTuple):
    """Two embeddings of one sample that are further apart than the tolerance.

    Args:
        sample_id: Whose.
        ours: Who computed the one that was stored, or that came first.
        theirs: Who computed the other.
        max_abs: Largest difference of two elements; infinite if their shapes differ.
        cosine: 1 less the cosine of the angle between them; 0 is the same direction.
        kept: Which of them is stored now; `"none"`: two sources differ, and neither was taken.
    """

    sample_id: str
    ours: Origin
    theirs: Origin
    max_abs: float
    cosine: float
    kept: Literal["ours", "theirs", "none"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        origins = {"ours": self.ours.to_dict(), "theirs": self.theirs.to_dict()}
        # Embeddings of different shapes are infinitely far apart, which JSON has no number for.
        max_abs = self.max_abs if math.isfinite(self.max_abs) else None
        return {**self._asdict(), "max_abs": max_abs, **origins}


class Refusal(NamedTuple):
    """What couldn't be merged: one sample, or a source as a whole.

    Args:
        where: The source.
        sample_id: None if it concerns more than one sample.
        reason: Why.
    """

    where: str
    sample_id: str | None
    reason: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, self.sample_id, self.reason)))


def refusal(origin: Origin, sample_id: str, error: object) -> Refusal:
    """Why one sample of this origin can't be merged."""
    return Refusal(origin.writer, sample_id, str(error).removeprefix(f"{sample_id}: "))


def store_refusal(store: Path, error: object) -> Refusal:
    """Why a store as a whole can't be merged, or be merged into."""
    where = os.fspath(store)
    # The path isn't said twice; that of a file in the store is another one.
    return Refusal(where, None, str(error).removeprefix(f"{where}: ").removeprefix(f"{where} "))


@dataclass
class MergeReport:
    """What came into one store.

    Args:
        path: The store's folder.
        config: Its identity.
        on_conflict: What was to be done about conflicts.
        tolerance: Largest difference of two elements that counts as none.
        is_dry_run: Whether nothing was written.
        num_new: Embeddings that weren't there.
        num_bytes: Bytes of these.
        num_same: Bit for bit what was there.
        num_close: Within the tolerance; what was there is kept.
        largest_close: The largest difference among those.
        conflicts: Those further apart.
        refused: What can't be stored here, or is damaged.
        notes: What else is worth knowing.
    """

    path: Path
    config: CacheConfig
    on_conflict: OnConflict = "error"
    tolerance: float = 0.0
    is_dry_run: bool = False
    num_new: int = 0
    num_bytes: int = 0
    num_same: int = 0
    num_close: int = 0
    largest_close: float = 0.0
    conflicts: list[Conflict] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note_close(self, differences: Iterable[float]) -> None:
        """Count embeddings within the tolerance, by how far they are from what is kept."""
        for difference in differences:
            self.num_close += 1
            self.largest_close = max(self.largest_close, difference)

    @property
    def unresolved(self) -> list[Conflict]:
        """The conflicts that nobody has decided."""
        return self.conflicts if self.on_conflict == "error" else []

    @property
    def exit_code(self) -> int:
        """1 if something was left out."""
        return 1 if self.unresolved or self.refused else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": os.fspath(self.path),
            "fingerprint": self.config.fingerprint,
            "on_conflict": self.on_conflict,
            "tolerance": self.tolerance,
            "is_dry_run": self.is_dry_run,
            "num_new": self.num_new,
            "num_bytes": self.num_bytes,
            "num_same": self.num_same,
            "num_close": self.num_close,
            "largest_close": self.largest_close,
            "conflicts": [conflict.to_dict() for conflict in self.conflicts],
            "refused": [refusal._asdict() for refusal in self.refused],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        would = "would be " if self.is_dry_run else ""
        parts = [f"{self.num_new} {would}new", f"{self.num_same} there already"]
        if self.num_close:
            parts.append(f"{self.num_close} within {self.tolerance:g} of what is kept")
        if self.conflicts:
            choice = "left as they are" if self.on_conflict == "error" else self.on_conflict
            parts.append(f"{len(self.conflicts)} in conflict ({choice})")
        if self.refused:
            parts.append(f"{len(self.refused)} refused")
        return f"{self.path.name}: {', '.join(parts)}"


@dataclass
class MergeReports:
    """What came into the stores of one root.

    Args:
        stores: One report for each store.
        refused: Sources that tell no config.
        notes: What else is worth knowing.
    """

    stores: list[MergeReport] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 if something was left out."""
        return 1 if self.refused or any(store.exit_code for store in self.stores) else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "stores": [store.to_dict() for store in self.stores],
            "refused": [refusal._asdict() for refusal in self.refused],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.stores, *self.refused, *self.notes)))

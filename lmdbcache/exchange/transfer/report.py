"""What an import did, or would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdbcache.config import CacheConfig
from lmdbcache.exchange.transfer.entries import Refusal

__all__ = ["ImportReport"]


@dataclass
class ImportReport:
    """What an import did, or would do.

    Args:
        source: Where the embeddings come from.
        kind: What that is, in words.
        store: The store's folder; None if it doesn't exist, for nothing was imported.
        config: Its identity.
        is_dry_run: Everything was read and checked, nothing was stored.
        classes: Class → number of samples of the source.
        embedding_shape: Of the store; None in front if the first dimension may differ.
        dtypes: dtype → number of embeddings of the source.
        num_imported: Stored by this run, or to be stored.
        num_present: Stored before, with the same bits.
        num_repeated: In the source a second time, with the same bits.
        num_verified: Read back from the store and equal to the source, bit for bit.
        num_bytes: Of the imported values.
        differing: Samples that are stored with other bits, and were kept.
        zeros: Samples of the source whose embedding is all zeros; they are imported, too.
        refused: What wasn't imported, and why.
        notes: What was assumed or left out.
    """

    source: Path
    kind: str
    store: Path | None
    config: CacheConfig
    is_dry_run: bool
    classes: Mapping[str, int]
    embedding_shape: tuple[int | None, ...] | None = None
    dtypes: Mapping[str, int] = field(default_factory=dict)
    num_imported: int = 0
    num_present: int = 0
    num_repeated: int = 0
    num_verified: int = 0
    num_bytes: int = 0
    differing: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if every embedding of the source is in the store as it is there, else 1."""
        return 1 if self.refused or self.differing else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": str(self.source),
            "kind": self.kind,
            "store": None if self.store is None else str(self.store),
            "fingerprint": self.config.fingerprint,
            "config": self.config.to_dict(),
            "is_dry_run": self.is_dry_run,
            "classes": dict(self.classes),
            "embedding_shape": self.embedding_shape,
            "dtypes": dict(self.dtypes),
            "num_imported": self.num_imported,
            "num_present": self.num_present,
            "num_repeated": self.num_repeated,
            "num_verified": self.num_verified,
            "num_bytes": self.num_bytes,
            "differing": list(self.differing),
            "num_zeros": len(self.zeros),
            "zeros": list(self.zeros),
            "refused": [{"name": one.name, "reason": one.reason} for one in self.refused],
            "notes": list(self.notes),
        }

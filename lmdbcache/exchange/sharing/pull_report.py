"""What a pull brought into a store, and what it didn't."""

from __future__ import annotations

import os
from collections.abc import Mapping, Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lmdbcache.config import CacheConfig
from lmdbcache.exchange.intake import IntakeReport

__all__ = ["Problem", "PullReport"]


class Problem(NamedTuple):
    """A file at the place that can't be used.

    Args:
        path: Below the fingerprint's folder.
        reason: Why.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return self.reason if self.path in self.reason else f"{self.path}: {self.reason}"


@dataclass
class PullReport:
    """What came into one store.

    Args:
        path: The store's folder.
        config: Its identity.
        url: The place, without what is secret in it.
        is_dry_run: Whether nothing was fetched.
        merged: What became of the embeddings that were fetched.
        commit: Id of the commit that was asked for; None: all that was there.
        heads: Ids of the newest commits that were seen; if it is one, it pins this state.
        num_samples: Samples that are shared and were asked for.
        num_present: Of these, stored before, with the same bytes.
        num_settled: Of these, shared with other bytes, too, which an earlier pull has compared.
        num_shards: Shards that hold the others.
        bytes_to_fetch: Of these shards, less what an earlier pull had fetched.
        bytes_fetched: Bytes of shards that came over the network.
        problems: Commits and shards that can't be used.
        made_up_for: Damaged shards whose samples other shards had.
        lost: Sample ids that only damaged shards have, sorted.
        absent: Sample ids that were asked for and that nobody shares, sorted.
        outcomes: Number of samples by what became of them, each counted once: `"new"`, `"same"`,
            `"close"`, `"settled"`, `"conflict"`, `"refused"`, `"lost"`; none of a dry run.
    """

    path: Path
    config: CacheConfig
    url: str
    is_dry_run: bool
    merged: IntakeReport
    commit: str | None = None
    heads: tuple[str, ...] = ()
    num_samples: int = 0
    num_present: int = 0
    num_settled: int = 0
    num_shards: int = 0
    bytes_to_fetch: int = 0
    bytes_fetched: int = 0
    problems: list[Problem] = field(default_factory=list)
    made_up_for: list[Problem] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)

    def count(self, outcomes: Mapping[str, AbstractSet[str]]) -> None:
        """Note what became of the samples.

        Args:
            outcomes: Name → sample ids; one that is in several counts for the first of them.
        """
        counted: set[str] = set()
        for name, sample_ids in outcomes.items():
            self.outcomes[name] = len(sample_ids - counted)
            counted |= sample_ids

    @property
    def exit_code(self) -> int:
        """0 if all that was asked for is in the store, or was decided for what is; else 1."""
        return 1 if self.problems or self.lost or self.absent or self.merged.exit_code else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": os.fspath(self.path),
            "fingerprint": self.config.fingerprint,
            "config": self.config.to_dict(),
            "url": self.url,
            "is_dry_run": self.is_dry_run,
            "commit": self.commit,
            "heads": list(self.heads),
            "num_samples": self.num_samples,
            "num_present": self.num_present,
            "num_settled": self.num_settled,
            "num_shards": self.num_shards,
            "bytes_to_fetch": self.bytes_to_fetch,
            "bytes_fetched": self.bytes_fetched,
            "problems": [problem._asdict() for problem in self.problems],
            "made_up_for": [problem._asdict() for problem in self.made_up_for],
            "lost": self.lost,
            "absent": self.absent,
            "outcomes": self.outcomes,
            "merged": self.merged.to_dict(),
        }

    def __str__(self) -> str:
        if self.is_dry_run:
            return (
                f"{self.num_samples} samples are shared, {self.num_present} are stored with the "
                f"same bytes; {self.num_shards} shards, {self.bytes_to_fetch} bytes, to fetch"
            )
        parts = [
            f"{self.outcomes.get('new', 0)} of {self.num_samples} samples are new",
            f"{self.outcomes.get('same', 0)} were stored with the same bytes",
        ]
        names = {
            f"within {self.merged.tolerance:g} of what is stored": "close",
            "kept as compared before": "settled",
            "in conflict": "conflict",
            "refused": "refused",
            "lost in damaged files": "lost",
        }
        counts = {text: self.outcomes.get(name, 0) for text, name in names.items()}
        counts["asked for and not shared"] = len(self.absent)
        parts += [f"{number} {what}" for what, number in counts.items() if number]
        return "; ".join([*parts, *map(str, self.problems[:3])])

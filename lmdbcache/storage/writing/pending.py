"""What a writer has collected and not committed yet."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

__all__ = ["CommitLimits", "PendingEmbeddings"]


@dataclass(frozen=True)
class CommitLimits:
    """When enough is collected: whichever comes first."""

    num_bytes: int
    num_records: int
    seconds: float


@dataclass
class PendingEmbeddings:
    """Stored-form embeddings by key, with their size and age."""

    values: dict[bytes, npt.NDArray[Any]] = field(default_factory=dict)
    num_bytes: int = 0
    num_put: int = 0
    since: float = 0.0

    def put(self, key: bytes, value: npt.NDArray[Any], *, replace: bool = True) -> None:
        """Add one, or replace the one of this key if that is asked for."""
        values = self.values
        if not values:
            self.since = time.monotonic()
        if key in values:
            if not replace:
                return
            self.drop([key])
        values[key] = value
        self.num_bytes += value.nbytes
        self.num_put += 1

    def drop(self, keys: Iterable[bytes]) -> None:
        """Take some out."""
        for key in keys:
            if (value := self.values.pop(key, None)) is not None:
                self.num_bytes -= value.nbytes

    def copied(self) -> PendingEmbeddings:
        """The same collection, which goes on by itself; the values are shared."""
        return replace(self, values=dict(self.values))

    def own(self) -> None:
        """Copy what lies in somebody else's memory."""
        self.values = {key: value.copy() for key, value in self.values.items()}

    def put_back(self, earlier: PendingEmbeddings) -> None:
        """Add what couldn't be written, but for what was collected anew meanwhile."""
        for key, value in earlier.values.items():
            if key not in self.values:
                self.values[key] = value
                self.num_bytes += value.nbytes
        self.since = earlier.since

    def clear(self) -> None:
        """Take all out."""
        self.values.clear()
        self.num_bytes = 0

    def is_due(self, limits: CommitLimits) -> bool:
        """Whether they should be committed now."""
        return (
            self.num_bytes >= limits.num_bytes
            or len(self.values) >= limits.num_records
            or time.monotonic() - self.since >= limits.seconds
        )

"""What a push did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["PushReport"]


@dataclass
class PushReport:
    """What a push did.

    Args:
        url: The place.
        fingerprint: Of the store.
        writer: Under whose name.
        num_chosen: Samples that were asked for.
        num_there: Of these, there already with the same value.
        num_pushed: Of these, pushed.
        num_different: Of those pushed, there already with another value: a pull finds a conflict,
            unless they replaced it.
        damaged: Sample id → why its stored value can't be pushed.
        num_shards: Shards that were committed.
        num_uploaded: Of these, uploaded; a push that was interrupted had uploaded the others.
        num_bytes: Uploaded, in shards and commits.
        commits: Ids of the commits that were made; the last pins the state after this push.
        heads: Ids of the commits that nobody had built on when it began.
        problems: Commit files that can't be used and shards that aren't whole: path → why. What
            they hold is pushed again by who has it.
        dry_run: Nothing was pushed, only looked at.
    """

    url: str
    fingerprint: str
    writer: str
    num_chosen: int = 0
    num_there: int = 0
    num_pushed: int = 0
    num_different: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    num_shards: int = 0
    num_uploaded: int = 0
    num_bytes: int = 0
    commits: list[str] = field(default_factory=list)
    heads: tuple[str, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False

    @property
    def commit(self) -> str | None:
        """The id that pins what is shared now; None if several writers pushed side by side."""
        if self.commits:
            return self.commits[-1]
        return self.heads[0] if len(self.heads) == 1 else None

    @property
    def is_complete(self) -> bool:
        """Whether all that was chosen is there now."""
        return not self.damaged and not self.dry_run

    @property
    def exit_code(self) -> int:
        """0; 1 if a stored value is damaged."""
        return 1 if self.damaged else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "heads": list(self.heads),
            "commit": self.commit,
        }

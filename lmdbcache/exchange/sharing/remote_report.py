"""What a look at a shared place found, and what a repair did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Finding", "RemoteReport", "SharedStoreReport", "State"]

State = Literal["damaged", "missing", "unreadable"]


@dataclass(frozen=True)
class Finding:
    """A file that isn't as it should be.

    Args:
        path: Below the fingerprint's folder.
        state: `"unreadable"` if the place refuses it, or it is of a newer release: a repair leaves
            it as it is.
        reason: What is wrong.
    """

    path: str
    state: State
    reason: str


@dataclass
class SharedStoreReport:
    """What is shared of one store.

    Args:
        fingerprint: Of its config.
        num_commits: Commit files that are sound.
        num_shards: Shards that commits list and that are sound.
        num_samples: Samples that are shared, by the sound commits.
        num_bytes: Of all shards that are there.
        findings: What is wrong.
        num_unlisted: Sound shards that no commit lists: of a push that is under way, or that was
            interrupted and would use them.
        leftovers: Files that interrupted uploads have left.
        repaired: Path → what was done about it.
        lost: Samples of damaged shards that nobody here has: to be pushed by who has them, or
            extracted again.
        given_up: Of those repaired, what may have held more than could be kept.
        commits: Ids of the commits that the repair made.
    """

    fingerprint: str
    num_commits: int = 0
    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    num_unlisted: int = 0
    leftovers: list[str] = field(default_factory=list)
    repaired: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether all is as it should be, now, and nothing was given up for that."""
        is_whole = not self.lost and not self.given_up
        return is_whole and all(found.path in self.repaired for found in self.findings)


@dataclass
class RemoteReport:
    """What a look at a shared place found.

    Args:
        url: The place, without a password.
        stores: What is shared there.
    """

    url: str
    stores: list[SharedStoreReport] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether all is as it should be, now."""
        return all(store.is_sound for store in self.stores)

    @property
    def lost(self) -> list[str]:
        """Samples that nobody here has any more."""
        return [sample_id for store in self.stores for sample_id in store.lost]

    @property
    def exit_code(self) -> int:
        """0 if all is sound, or was repaired; else 1."""
        return 0 if self.is_sound else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stores = [{**asdict(store), "is_sound": store.is_sound} for store in self.stores]
        return {"url": self.url, "is_sound": self.is_sound, "stores": stores}

"""What the processes of a Ray run have to know of each other. No torch: it has its own process."""

from __future__ import annotations

__all__ = ["Ledger"]


class Ledger:
    """The one actor that all others ask: how often a unit was begun, and who may stage.

    Args:
        most_staged: Units that may wait at the staging place.
    """

    def __init__(self, most_staged: int) -> None:
        self._most_staged = most_staged
        self._begun: dict[tuple[str, int], int] = {}
        self._staged: set[int] = set()

    def begin(self, step: str, unit: int) -> int:
        """How often this has been begun now."""
        self._begun[step, unit] = self._begun.get((step, unit), 0) + 1
        return self._begun[step, unit]

    def may_stage(self, unit: int) -> bool:
        """Whether there is room for a unit; then it has a place."""
        if unit not in self._staged and len(self._staged) >= self._most_staged:
            return False
        self._staged.add(unit)
        return True

    def finish(self, unit: int) -> None:
        """The driver has dealt with a unit."""
        self._staged.discard(unit)
        for step in ("decoding", "embedding"):
            self._begun.pop((step, unit), None)

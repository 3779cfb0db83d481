"""Which embeddings that differ from what is shared were compared already, and left as they are.

Two nodes that computed the same samples differ in the last bits: without this, every pull would
fetch all of them again, only to find that once more. The file may be removed at any time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

__all__ = ["Settled"]

_OURS: Final = -1.0  # in the place of a tolerance: the stored one was chosen


class Settled:
    """The comparisons of one store.

    Args:
        path: The file; none there is fine, and lines that can't be read don't count.
        tolerance: Largest difference that counts as none for this pull.
        keeps_ours: Whether a conflict is decided for what is stored.
    """

    def __init__(self, path: Path, tolerance: float, *, keeps_ours: bool) -> None:
        self._path = path
        self._tolerance = tolerance
        self._keeps_ours = keeps_ours
        self._limits: dict[tuple[str, str, str], float] = {}
        with contextlib.suppress(OSError):
            for line in path.read_text("utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    sample_id, ours, theirs, limit = json.loads(line)
                    self._limits[sample_id, ours, theirs] = float(limit)

    def __call__(self, sample_id: str, ours: bytes, theirs: bytes) -> bool:
        """Whether these two were compared, with what counts today."""
        limit = self._limits.get((sample_id, ours.hex(), theirs.hex()))
        if limit is None:
            return False
        return self._keeps_ours if limit == _OURS else limit <= self._tolerance

    def add(self, pairs: Iterable[tuple[str, bytes, bytes]], conflicts: frozenset[str]) -> None:
        """Note (sample id, checksum stored, checksum shared) of what was compared and kept.

        Args:
            pairs: What was compared.
            conflicts: The sample ids of those that were further apart than the tolerance.
        """
        lines = []
        for sample_id, ours, theirs in pairs:
            limit = _OURS if sample_id in conflicts else self._tolerance
            lines.append(json.dumps([sample_id, ours.hex(), theirs.hex(), limit]) + "\n")
        if not lines:
            return
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

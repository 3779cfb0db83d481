"""How much of a list of samples a store holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lmdbcache.storage import EmbeddingReader, class_of

__all__ = ["Coverage", "coverage_of"]


@dataclass(frozen=True)
class Coverage:
    """How much of a list of samples a store holds.

    Args:
        num_asked: Distinct samples asked for.
        missing: The sample ids that aren't stored, in the order asked.
        by_class: Class → (stored, asked).
    """

    num_asked: int
    missing: tuple[str, ...]
    by_class: Mapping[str, tuple[int, int]]

    @property
    def num_present(self) -> int:
        """Samples that are stored."""
        return self.num_asked - len(self.missing)

    @property
    def fraction(self) -> float:
        """Share that is stored, 0 to 1; 1.0 if nothing was asked."""
        return self.num_present / self.num_asked if self.num_asked else 1.0


def coverage_of(sample_ids: Iterable[str], reader: EmbeddingReader | None) -> Coverage:
    """How much of these samples the reader has; None has nothing."""
    asked = list(dict.fromkeys(sample_ids))
    missing = asked if reader is None else reader.missing(asked)
    absent = Counter(map(class_of, missing))
    return Coverage(
        num_asked=len(asked),
        missing=tuple(missing),
        by_class={
            name: (total - absent[name], total)
            for name, total in Counter(map(class_of, asked)).items()
        },
    )

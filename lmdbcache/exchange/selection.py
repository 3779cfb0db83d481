"""Some samples of a store, by class or id."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lmdbcache.errors import ConfigError
from lmdbcache.files import few
from lmdbcache.storage import (
    canonical_class,
    canonical_sample_id,
    class_of,
    first_window,
    recording_of,
)


class Selection:
    """Some samples, or all.

    Args:
        classes: Only samples of these.
        sample_ids: Only these; the id of a recording means its windows.

    Raises:
        InvalidSampleIdError: One can't be a sample id.
    """

    def __init__(
        self, classes: Iterable[str] | None = None, sample_ids: Iterable[str] | None = None
    ) -> None:
        self.classes = None if classes is None else frozenset(map(canonical_class, classes))
        self.sample_ids = (
            None if sample_ids is None else frozenset(map(canonical_sample_id, sample_ids))
        )
        self._met: set[str] = set()

    def __contains__(self, sample_id: str) -> bool:
        if self.classes is not None:
            name = class_of(sample_id)
            self._met.add(name)
            if name not in self.classes:
                return False
        ids = self.sample_ids
        return ids is None or sample_id in ids or recording_of(sample_id) in ids

    def meets(self, first: str, last: str) -> bool:
        """Return whether one of these may be from the first to the last sample id."""
        return self.sample_ids is None or any(
            first <= one <= last or (first <= _last_of(one) and first_window(one) <= last)
            for one in self.sample_ids
        )

    def absent(self, found: Collection[str]) -> list[str]:
        """Return those that aren't among these samples, nor recordings of which windows are."""
        ids = self.sample_ids or frozenset()
        return sorted(ids.difference(found, map(recording_of, found)))

    def check_classes(self, where: str) -> None:
        """Refuse a class that none of the samples has that were looked at.

        Raises:
            ConfigError: There is one; names those that there are.
        """
        if unknown := sorted((self.classes or frozenset()) - self._met):
            raise ConfigError(
                f"class {', '.join(unknown)}: no sample of it is in {where}; there: "
                f"{few(sorted(self._met))}"
            )


def _last_of(recording_id: str) -> str:
    """What sorts behind all windows of a recording."""
    return f"{recording_id.rpartition(':')[0]}@:"

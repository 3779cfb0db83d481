"""Embeddings of one run that are equal although their clips sound different."""

from __future__ import annotations

from typing import Any, Final

import xxhash

from lmdbcache.storage import as_stored

__all__ = ["EqualEmbeddings"]


class EqualEmbeddings:
    """Finds equal embeddings by checksum; silent clips and copies of a clip don't count."""

    def __init__(self) -> None:
        self._first: Final[dict[int, tuple[str, int]]] = {}
        self._groups: Final[dict[int, list[str]]] = {}

    def note(self, sample_id: str, embedding: Any, audio: int | None) -> None:
        """Take down one embedding that is stored.

        Args:
            sample_id: The clip.
            embedding: Its embedding.
            audio: Checksum of its waveform; None if it is silent.
        """
        if audio is None:
            return
        values = as_stored(sample_id, embedding, "float32", copy=False)
        checksum = xxhash.xxh3_64_intdigest(values.data)
        first, heard = self._first.setdefault(checksum, (sample_id, audio))
        if heard != audio:
            self._groups.setdefault(checksum, [first]).append(sample_id)

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Return the sample ids that share one embedding, for each such embedding."""
        return tuple(sorted(tuple(sorted(group)) for group in self._groups.values()))

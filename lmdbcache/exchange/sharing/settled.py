"""Which embeddings that differ from what is shared were compared already, and left as they are.

Two nodes that computed the same samples differ in the last bits: without this, every pull would
fetch all of them again, only to find that once more. The file may be removed at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np

from lmdbcache.files import open_file, read_file

__all__ = ["Settled"]

_OURS: Final = -1.0  # in the place of a tolerance: the stored one was chosen
_RECORD: Final = np.dtype([("pair", "V16"), ("limit", "<f8")])


class Settled:
    """The comparisons of one store.

    Args:
        path: The file; none there is fine.
        tolerance: Largest difference that counts as none for this pull.
        keeps_ours: Whether a conflict is decided for what is stored.
    """

    def __init__(self, path: Path, tolerance: float, *, keeps_ours: bool) -> None:
        self._path = path
        self._tolerance = tolerance
        self._keeps_ours = keeps_ours
        self._limits: dict[bytes, float] = {}
        with contextlib.suppress(OSError):
            data = read_file(path)
            whole = np.frombuffer(data[: len(data) // _RECORD.itemsize * _RECORD.itemsize], _RECORD)
            pairs = (pair.tobytes() for pair in whole["pair"])
            self._limits = dict(zip(pairs, whole["limit"].tolist(), strict=True))

    def __call__(self, sample_id: str, ours: bytes, theirs: bytes) -> bool:
        """Whether these two were compared, with what counts today."""
        if not self._limits:
            return False
        limit = self._limits.get(_pair(sample_id, ours, theirs))
        if limit is None:
            return False
        return self._keeps_ours if limit == _OURS else limit <= self._tolerance

    def add(self, pairs: Iterable[tuple[str, bytes, bytes]], conflicts: frozenset[str]) -> None:
        """Note (sample id, checksum stored, checksum shared) of what was compared and kept.

        Args:
            pairs: What was compared.
            conflicts: The sample ids of those that were further apart than the tolerance.
        """
        found = {_pair(*pair): _OURS if pair[0] in conflicts else self._tolerance for pair in pairs}
        new = {pair: limit for pair, limit in found.items() if self._limits.get(pair) != limit}
        if not new:
            return
        self._limits |= new
        records = np.array(list(new.items()), _RECORD)
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            with os.fdopen(open_file(self._path, flags), "ab") as file:
                # A record that was cut by a kill would put all after it out of step.
                file.truncate(file.tell() // _RECORD.itemsize * _RECORD.itemsize)
                file.write(records.tobytes())


def _pair(sample_id: str, ours: bytes, theirs: bytes) -> bytes:
    text = b"\0".join((ours.hex().encode(), theirs.hex().encode(), sample_id.encode()))
    return hashlib.blake2b(text, digest_size=16).digest()

"""`Merger`: embeddings from elsewhere into one store, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import numpy.typing as npt

from lmdbcache.cache import (
    DEFAULT_TOLERANCE,
    THIS_STORE,
    EmbeddingCache,
    Origin,
    Source,
    difference_of,
)
from lmdbcache.config import CacheConfig
from lmdbcache.errors import ConfigError, InvalidEmbeddingError, InvalidSampleIdError
from lmdbcache.exchange.merging.report import Conflict, MergeReport, OnConflict, Refusal, refusal
from lmdbcache.exchange.merging.target import (
    Change,
    ConcurrentWriteError,
    Incoming,
    Ours,
    StoredNow,
    Target,
)
from lmdbcache.storage import StoreMetadata, as_stored, check_shape, checksum, sample_key

__all__ = ["Merger"]

_CHOICES: Final = ("error", "ours", "theirs")


class Merger:
    """Brings embeddings that were computed elsewhere into one store.

    What is stored already is never written again: the same bytes are counted, others are compared.
    Within the tolerance the stored one is kept; further apart it is a conflict. Every `add` is one
    transaction, so a merge that is killed goes on where it was when it is started again.

    Args:
        cache: The cache.
        config: Identity of the store; made with the first embedding.
        tolerance: Largest difference of two elements that counts as none.
        on_conflict: `"error"` leaves the stored one as it is and lists both; `"ours"` and
            `"theirs"` choose.
        ragged: Let the first dimension differ between embeddings, if the store is new.
        dry_run: Only tell what would be done.
        dataset_root: Kept in the metadata of a new store.

    Raises:
        IntegrityError: The store is damaged.
        ReadOnlyCacheError: It can't be written.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        config: CacheConfig,
        *,
        tolerance: float = DEFAULT_TOLERANCE,
        on_conflict: OnConflict = "error",
        ragged: bool = False,
        dry_run: bool = False,
        dataset_root: str = "",
    ) -> None:
        if on_conflict not in _CHOICES:
            raise ConfigError(f"on_conflict: {on_conflict!r}; known are {', '.join(_CHOICES)}")
        if not tolerance >= 0:
            raise ConfigError(f"tolerance: {tolerance!r}; it is 0 or more")
        if not dry_run:
            cache.check_writable(config)
        self._target = Target(cache, config, ragged=ragged, dataset_root=dataset_root)
        self.report: Final = MergeReport(
            self._target.path, config, on_conflict, float(tolerance), dry_run
        )
        # Of a dry run: what would be stored by now.
        self._would_be: dict[bytes, bytes] = {}

    def __enter__(self) -> Merger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; every `add` was durable when it returned."""

    def needed(self, checksums: Mapping[str, bytes]) -> list[str]:
        """Those of these samples that aren't stored with the same bytes.

        Args:
            checksums: Sample id → the checksum that a store keeps of its embedding.

        Raises:
            InvalidSampleIdError: A sample id can't be stored.
        """
        keys = {sample_id: sample_key(sample_id) for sample_id in checksums}
        stored = self.stored(list(keys.values()))
        return [name for name, key in keys.items() if stored.get(key) != bytes(checksums[name])]

    def stored(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The checksums of those that are stored, or by a dry run would be."""
        with self._target.now() as now:
            stored = now.checksums(keys)
        would_be = {key: self._would_be[key] for key in keys if key in self._would_be}
        return {**would_be, **stored} if would_be else stored

    def metadata(self) -> StoreMetadata | None:
        """The store's metadata; None while there is no store."""
        with self._target.now() as now:
            return now.metadata

    def add(
        self,
        sample_ids: Sequence[str],
        embeddings: npt.NDArray[Any] | Sequence[Any],
        origin: Origin,
        *,
        checksums: Sequence[bytes] | None = None,
        sources: Mapping[str, Source] | None = None,
    ) -> None:
        """Merge these in one transaction; durable when this returns.

        Args:
            sample_ids: `(n,)` sample ids.
            embeddings: One for each, in the stored dtype: `(n, *embedding_shape)`, or a sequence.
            origin: Who computed them. Its provenance is compared with the store's.
            checksums: The checksum that each had where it comes from; one that doesn't match is
                refused.
            sources: Sample id → the file it was computed from, where known.

        Raises:
            ProvenanceMismatchError: The store was filled with other weights; nothing was merged.
            CacheFullError: The disk is full; nothing of this call was merged.
            InvalidEmbeddingError: Not as many embeddings as sample ids.
        """
        if len(sample_ids) != len(embeddings) or len(checksums or sample_ids) != len(sample_ids):
            raise InvalidEmbeddingError(
                f"{len(embeddings)} embeddings and {len(checksums or sample_ids)} checksums for "
                f"{len(sample_ids)} sample ids"
            )
        given = []
        for index, (sample_id, embedding) in enumerate(zip(sample_ids, embeddings, strict=True)):
            expected = None if checksums is None else checksums[index]
            source = (sources or {}).get(sample_id)
            try:
                given.append(self._incoming(sample_id, embedding, origin, expected, source))
            except (InvalidSampleIdError, InvalidEmbeddingError) as error:
                self.report.refused.append(refusal(origin, sample_id, error))
        self.add_incoming(given, origin.provenance)

    def add_incoming(self, given: Iterable[Incoming], provenance: Mapping[str, str]) -> None:
        """`add`, of several origins, in the stored form."""
        first: dict[bytes, Incoming] = {}
        again = [one for one in given if first.setdefault(one.key, one) is not one]
        self._merge(list(first.values()), provenance)
        if again:
            self.add_incoming(again, provenance)

    # ---- one transaction

    def _incoming(
        self,
        sample_id: str,
        embedding: Any,
        origin: Origin,
        expected: bytes | None,
        source: Source | None,
    ) -> Incoming:
        key = sample_key(sample_id)
        value = as_stored(sample_id, embedding, self._target.config.dtype, copy=False)
        found = checksum(key, value.reshape(-1).view("u1").data)
        if expected is not None and found != bytes(expected):
            raise InvalidEmbeddingError(f"{sample_id}: the value doesn't match its checksum")
        return Incoming(key, value, found, origin, source)

    def _merge(self, given: list[Incoming], provenance: Mapping[str, str]) -> None:
        while given:
            outcome = _Outcome()
            with self._target.now() as now:
                self._judge(given, now, outcome)
            try:
                if outcome.changes and not self.report.is_dry_run:
                    self._target.write(outcome.changes, provenance)
            except ConcurrentWriteError:
                continue  # others write to this store, too: look again
            self._note(outcome)
            return

    def _judge(self, given: list[Incoming], now: StoredNow, outcome: _Outcome) -> None:
        shape = now.metadata.embedding_shape if now.metadata is not None else None
        stored = now.checksums([incoming.key for incoming in given])
        for incoming in given:
            if shape is None:
                shape = self._target.shape_of_new(incoming.value)
            try:
                check_shape(incoming.sample_id, incoming.value.shape, shape)
            except InvalidEmbeddingError as error:
                outcome.refused.append(refusal(incoming.origin, incoming.sample_id, error))
                continue
            ours = stored.get(incoming.key, self._would_be.get(incoming.key))
            if ours is None:
                outcome.num_new += 1
                outcome.num_bytes += incoming.value.nbytes
                outcome.changes.append(Change(incoming, None))
            elif ours == incoming.checksum:
                outcome.num_same += 1
            else:
                self._compare(incoming, now.value(incoming.key), outcome)
        if outcome.conflicts:
            found = self._target.origins(outcome.ours)
            outcome.conflicts = [
                conflict._replace(ours=found.get(conflict.sample_id, THIS_STORE))
                for conflict in outcome.conflicts
            ]

    def _compare(self, incoming: Incoming, ours: Ours | None, outcome: _Outcome) -> None:
        name, takes_theirs = incoming.sample_id, self.report.on_conflict == "theirs"
        if ours is None:
            outcome.notes.append(f"{name}: this dry run met two embeddings, and compared neither")
            return
        if ours.value is None and takes_theirs:
            outcome.notes.append(f"the stored value of {name} was damaged, and was replaced")
            outcome.replace(incoming, ours)
            return
        if ours.value is None:
            reason = "the value that is stored is damaged: run `lmdbcache repair`, and merge again"
            outcome.refused.append(Refusal(str(self._target.path), name, reason))
            return
        if ours.value.shape == incoming.value.shape:
            max_abs, cosine, _ = difference_of(ours.value, incoming.value)
        else:  # of a ragged store
            max_abs, cosine = math.inf, 1.0
        if max_abs <= self.report.tolerance:
            outcome.close.append(max_abs)
            return
        kept: Literal["ours", "theirs"] = "theirs" if takes_theirs else "ours"
        if takes_theirs:
            outcome.replace(incoming, ours)
        conflict = Conflict(name, THIS_STORE, incoming.origin, max_abs, cosine, kept)
        outcome.conflicts.append(conflict)
        outcome.ours[name] = ours.checksum

    def _note(self, outcome: _Outcome) -> None:
        report = self.report
        report.num_new += outcome.num_new
        report.num_bytes += outcome.num_bytes
        report.num_same += outcome.num_same
        report.note_close(outcome.close)
        report.conflicts += outcome.conflicts
        report.refused += outcome.refused
        report.notes += outcome.notes
        if report.is_dry_run:
            for change in outcome.changes:
                self._would_be[change.incoming.key] = change.incoming.checksum


class _Outcome:
    """What one look at the store says about some embeddings."""

    def __init__(self) -> None:
        self.num_new = 0
        self.num_bytes = 0
        self.num_same = 0
        self.close: list[float] = []
        self.conflicts: list[Conflict] = []
        self.ours: dict[str, bytes] = {}  # checksums of what is stored, of the conflicts
        self.refused: list[Refusal] = []
        self.notes: list[str] = []
        self.changes: list[Change] = []

    def replace(self, incoming: Incoming, ours: Ours) -> None:
        """Take it instead of what is stored."""
        self.changes.append(Change(incoming, ours.checksum))

"""What became of a run's clips, and what the run reports."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import xxhash

from lmdbcache.cache import FAILURES_NAME, ClipFailure, update_failures
from lmdbcache.errors import CacheError, ExtractionError
from lmdbcache.files import few
from lmdbcache.storage import Report, as_stored

if TYPE_CHECKING:
    from lmdbcache.extraction.decoding import FeatureBatch

_logger: Final = logging.getLogger(__name__)

_FRONT_END_TRIALS: Final = 32  # a front end that fails on so many first clips fails on all
_NUM_NAMED: Final = 5
_NUM_FAILED_SHOWN: Final = 20


@dataclass(frozen=True)
class ExtractionSummary(Report):
    """What one run did.

    Args:
        store: The store's folder; None if nothing is stored.
        num_samples: Distinct samples asked for.
        num_cached: Of these, stored before the run, or by another process in the meantime.
        num_extracted: Embeddings added by the run; with windows, recordings.
        num_windows: Embeddings added by the run, those of unfinished recordings included; None
            without windows.
        silent: The sample ids of digital silence among them.
        cancelled: Those whose channels cancel when they are mixed to mono: the mix has less than a
            thousandth (-30 dB) of the channels' mean energy.
        equal: Sample ids of extracted clips that have one and the same embedding although they
            sound different, a group for each such embedding.
        failures: Clips without an embedding, with reasons.
        seconds: Wall time of the run.
        compute_seconds: Wall time of the model's forward passes.
        built_model: Whether the model had to be loaded.
        moved_model: How the weights of the model's Hub name differ now from those that filled the
            store; empty if it doesn't, or something had to be computed.
        num_suspects: Cached clips whose file has another size or time than when it was embedded.
        rank: Which of the processes that share the clips, from 0; the counts are of this rank.
        world_size: How many there are.
        left_out: How much of the dataset isn't a clip though it looks like one: `count`, and
            `by_kind`, `by_suffix`, `by_class`; empty for clips that aren't a dataset.
    """

    derived: ClassVar = ("num_silent", "num_equal")

    store: Path | None
    num_samples: int
    num_cached: int
    num_extracted: int = 0
    num_windows: int | None = None
    silent: tuple[str, ...] = ()
    cancelled: tuple[str, ...] = ()
    equal: tuple[tuple[str, ...], ...] = ()
    failures: tuple[ClipFailure, ...] = ()
    seconds: float = 0.0
    compute_seconds: float = 0.0
    built_model: bool = False
    moved_model: str = ""
    num_suspects: int = 0
    rank: int = 0
    world_size: int = 1
    left_out: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_silent(self) -> int:
        """Number of extracted clips that are digital silence."""
        return len(self.silent)

    @property
    def num_equal(self) -> int:
        """Number of clips in `equal`."""
        return sum(map(len, self.equal))

    @property
    def exit_code(self) -> int:
        """0, or 1 if a clip failed."""
        return 1 if self.failures else 0

    def __str__(self) -> str:
        return "\n".join([self.counts, *self.remarks])

    @property
    def counts(self) -> str:
        """The first line of the text."""
        rate = f", {self.num_extracted / self.seconds:.1f} clips/s" if self.num_extracted else ""
        counts = f"{self.num_cached} were cached, {self.num_extracted} extracted"
        if self.num_windows is not None:
            counts += f" ({self.num_windows} windows)"
        failed = f"{len(self.failures)} failed ({self.seconds:.1f} s{rate})"
        who = f"rank {self.rank} of {self.world_size}: " if self.world_size > 1 else ""
        return f"{who}{self.num_samples} samples: {counts}, {failed}"

    @property
    def remarks(self) -> list[str]:
        """The other lines of the text."""
        lines = []
        for sample_ids, what in (
            (self.silent, "digital silence"),
            (self.cancelled, "channels that cancel when they are mixed to mono"),
            (sum(self.equal, ()), "the embedding of another clip that sounds different"),
        ):
            if sample_ids:
                named = few(sample_ids, _NUM_NAMED)
                lines.append(f"{what} in {len(sample_ids)} of the extracted clips: {named}")
        if self.left_out.get("count"):
            lines.append(f"{self.left_out['count']} files or rows of the dataset are left out")
        if self.moved_model:
            lines.append(self.moved_model)
        if self.num_suspects:
            lines.append(
                f"{self.num_suspects} cached clips have files of another size or time than when "
                "they were embedded: verify the sources of the store"
            )
        lines += [
            f"failed: {failure.sample_id}: {failure.reason}"
            for failure in self.failures[:_NUM_FAILED_SHOWN]
        ]
        if len(self.failures) > _NUM_FAILED_SHOWN:
            has_list = self.store and (self.num_cached or self.num_extracted)
            where = self.store / FAILURES_NAME if self.store and has_list else "`failures`"
            lines.append(f"… and {len(self.failures) - _NUM_FAILED_SHOWN} more in {where}")
        return lines


class Outcomes:
    """What became of the clips of one run, for one store.

    Args:
        failures: Of clips that are in no batch.
    """

    def __init__(self, failures: Iterable[ClipFailure] = ()) -> None:
        self.failures = list(failures)
        self.silent: Final[list[str]] = []
        self.cancelled: Final[list[str]] = []
        self.settled: set[str] = set()
        # Checksum of an embedding → its first clip and the checksum of that one's waveform.
        self._first: Final[dict[int, tuple[str, int]]] = {}
        self._equal: Final[dict[int, list[str]]] = {}

    @property
    def num_failed(self) -> int:
        """Number of clips that failed."""
        return len({failure.sample_id for failure in self.failures})

    def note_stored(self, sample_id: str, embedding: Any, audio: int | None) -> None:
        """Record an embedding that is stored, with the checksum of its waveform if it has one."""
        if audio is None:  # silent clips and copies of a clip may have equal embeddings
            return
        values = as_stored(sample_id, embedding, "float32", copy=False)
        checksum = xxhash.xxh3_64_intdigest(values.data)
        first, heard = self._first.setdefault(checksum, (sample_id, audio))
        if heard != audio:
            self._equal.setdefault(checksum, [first]).append(sample_id)

    def note_finished(self, clips: Collection[str], unit: FeatureBatch) -> None:
        """Record clips that are stored, see `FeatureBatch.finished`."""
        self.silent.extend(clip for clip in unit.silent if clip in clips)
        self.cancelled.extend(clip for clip in unit.cancelled if clip in clips)
        self.settled.update(clips)

    def equal_embeddings(self) -> tuple[tuple[str, ...], ...]:
        """Return the sample ids that share one embedding although their clips sound different."""
        return tuple(sorted(tuple(sorted(group)) for group in self._equal.values()))

    def note_failed(self, failure: ClipFailure) -> None:
        """Record a clip that failed."""
        self.failures.append(failure)
        self.settled.add(failure.sample_id)

    def record_failures(self, store: Path) -> None:
        """Keep the list of failed clips with a store."""
        try:
            update_failures(store, self.settled, self.failures)
        except (OSError, CacheError) as error:
            # A full disk, say. The list is a convenience, and must not hide the error itself.
            _logger.error("%s can't be written: %s", FAILURES_NAME, str(error))


class FrontEndTrials:
    """Ends a run whose front end fails on every clip, instead of trying all of them.

    Args:
        is_proven: Whether it has given features before.
    """

    def __init__(self, *, is_proven: bool) -> None:
        self._is_proven = is_proven
        self._num_errors = 0
        self._reason = ""

    def note(self, unit: FeatureBatch) -> None:
        """Count what a unit shows.

        Raises:
            ExtractionError: See `check`.
        """
        self._is_proven |= unit.num_features > 0
        self._num_errors += unit.num_front_end_errors
        if unit.failures:
            self._reason = unit.failures[-1].reason
        self.check()

    def check(self, *, is_last: bool = False) -> None:
        """End the run if it should end.

        Raises:
            ExtractionError: It has failed on all so far, which are enough or all there are.
        """
        enough = 2 if is_last else _FRONT_END_TRIALS
        if not self._is_proven and self._num_errors >= enough:
            raise ExtractionError(
                f"the front end fails on each of {self._num_errors} clips, and nothing "
                f"is stored yet: {self._reason}"
            )


def warn_of_failures(failures: Sequence[ClipFailure]) -> None:
    """Log how many clips failed, if any did."""
    if failures:
        _logger.warning(
            "%d %s no embedding and will be tried again by the next run (%s%s)",
            len(failures),
            "clip has" if len(failures) == 1 else "clips have",
            failures[0].reason,
            "" if len(failures) == 1 else "; all are in the summary's failures",
        )

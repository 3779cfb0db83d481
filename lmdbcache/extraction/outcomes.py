"""What became of a run's clips: failed, silent, cancelled, equal to others."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.cache import FAILURES_NAME, ClipFailure, update_failures
from lmdbcache.errors import CacheError, ExtractionError
from lmdbcache.extraction.equal_embeddings import EqualEmbeddings

if TYPE_CHECKING:
    from lmdbcache.extraction.feature_batch import FeatureBatch

__all__ = ["Outcomes"]

_logger: Final = logging.getLogger(__name__)

_FRONT_END_TRIALS: Final = 32  # a front end that fails on so many first clips fails on all


class Outcomes:
    """What became of the clips of one run.

    Args:
        failures: Of clips that are in no batch.
    """

    def __init__(self, failures: Iterable[ClipFailure] = ()) -> None:
        self.failures = list(failures)
        self.silent: Final[list[str]] = []
        self.cancelled: Final[list[str]] = []
        self.equal: Final = EqualEmbeddings()
        self.settled: set[str] = set()
        self.is_front_end_proven = False
        self._num_front_end_errors = 0

    @property
    def num_failed(self) -> int:
        """Number of clips that failed."""
        return len({failure.sample_id for failure in self.failures})

    def note_stored(self, sample_id: str, embedding: Any, batch: FeatureBatch) -> None:
        """Take down a clip of a batch whose embedding is stored."""
        if sample_id in batch.silent:
            self.silent.append(sample_id)
        if sample_id in batch.cancelled:
            self.cancelled.append(sample_id)
        self.equal.note(sample_id, embedding, batch.audio.get(sample_id))

    def note_batch(self, batch: FeatureBatch) -> None:
        """Take down the failures of a batch, and which of its clips are done with.

        Raises:
            ExtractionError: See `check_front_end`.
        """
        self.failures += batch.failures
        self.settled.update(batch.sample_ids, [failure.sample_id for failure in batch.failures])
        for failure in batch.failures:
            _logger.info("%s: %s", failure.sample_id, failure.reason)
        self.is_front_end_proven |= batch.num_features > 0
        self._num_front_end_errors += batch.num_front_end_errors
        self.check_front_end()

    def check_front_end(self, *, is_last: bool = False) -> None:
        """End a run whose front end fails on every clip, instead of trying all of them.

        Raises:
            ExtractionError: It has failed on all so far, which are enough or all there are.
        """
        enough = 2 if is_last else _FRONT_END_TRIALS
        if not self.is_front_end_proven and self._num_front_end_errors >= enough:
            raise ExtractionError(
                f"the front end fails on each of {self._num_front_end_errors} clips, and nothing "
                f"is stored yet: {self.failures[-1].reason}"
            )

    def record_failures(self, store: Path) -> None:
        """Keep the list of failed clips beside a store, and say so."""
        if self.failures:
            _logger.warning(
                "%d %s no embedding and will be tried again by the next run (%s%s)",
                len(self.failures),
                "clip has" if len(self.failures) == 1 else "clips have",
                self.failures[0].reason,
                "" if len(self.failures) == 1 else "; all are in the summary's failures",
            )
        try:
            update_failures(store, self.settled, self.failures)
        except (OSError, CacheError) as error:
            # A full disk, say. The list is a convenience, and must not hide what went wrong.
            _logger.error("%s can't be written: %s", FAILURES_NAME, str(error))

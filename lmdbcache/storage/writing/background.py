"""A commit that goes on while its writer collects more."""

from __future__ import annotations

import logging
import threading
from typing import Final

from lmdbcache.storage.writing.committing import Committer, Shape
from lmdbcache.storage.writing.pending import PendingEmbeddings

__all__ = ["BackgroundCommit"]

_logger: Final = logging.getLogger(__name__)


class BackgroundCommit:
    """One commit in a thread of its own.

    The interpreter waits for it at its end, and a fork until it is through (`no_fork`).

    Args:
        committer: Nobody else commits with it until `wait` has returned.
        pending: What to write; not changed meanwhile.
        shape: See `Committer.commit`.
    """

    def __init__(
        self, committer: Committer, pending: PendingEmbeddings, shape: Shape | None
    ) -> None:
        self.pending = pending
        self.written = 0
        self.error: BaseException | None = None
        self._committer = committer
        self._shape = shape
        self._is_taken = threading.Lock()
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._commit, name="lmdbcache-commit")

    def start(self) -> None:
        """Begin; an interrupted start is made up for by `wait`."""
        self._thread.start()

    def _commit(self) -> None:
        if not self._is_taken.acquire(blocking=False):
            return
        try:
            self.written = self._committer.commit(self.pending, self._shape)
        except BaseException as error:  # noqa: BLE001 - raised again by the writer
            self.error = error
            _logger.debug("%s: a commit has failed (%s)", self._committer.store, str(error))
        finally:
            self._is_done.set()

    def __len__(self) -> int:
        return len(self.pending.values)

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        return self._is_done.is_set()

    def wait(self) -> None:
        """Wait until it is through: `written` or `error` tells how."""
        if self._thread.ident is None:  # its start was interrupted
            self._commit()
        self._is_done.wait()

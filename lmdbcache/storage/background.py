"""A commit that goes on while its writer collects more."""

from __future__ import annotations

import threading

from lmdbcache.storage.committing import Committer, Shape
from lmdbcache.storage.pending import PendingEmbeddings

__all__ = ["BackgroundCommit"]


class BackgroundCommit:
    """One commit in a thread of its own, begun at once.

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

        def commit() -> None:
            try:
                self.written = committer.commit(pending, shape)
            except BaseException as error:  # noqa: BLE001 - raised again by the writer
                self.error = error

        self._thread = threading.Thread(target=commit, name="lmdbcache-commit")
        self._thread.start()

    def __len__(self) -> int:
        return len(self.pending.values)

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it is through: `written` or `error` tells how."""
        self._thread.join()

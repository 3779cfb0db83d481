"""Forks and LMDB: which process this is, and the gate that keeps a fork out of LMDB's calls.

A fork while another thread is inside LMDB leaves the child with locks that are never released.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


class ForkGate:
    """Held by a thread that is inside LMDB; a fork waits until none is. Reentrant, shared.

    Attributes:
        is_forking: Whether a fork waits for others to leave, or goes on.
    """

    def __init__(self) -> None:
        # Called by a thread that has left; what couldn't be done inside.
        self.on_leave: Callable[[], None] = lambda: None
        self.reset()

    def reset(self) -> None:
        """As new, in a child where no other thread is left."""
        self._condition = threading.Condition()
        self._thread = threading.local()
        self._num_inside = 0
        self.is_forking = False

    def __enter__(self) -> None:
        self.enter(wait=True)

    def __exit__(self, *_: object) -> None:
        self.leave()
        self.on_leave()

    def enter(self, *, wait: bool) -> bool:
        """Enter, if need be after a fork; or return False in place of waiting."""
        self._thread.depth = self.depth + 1
        if self.depth == 1:
            with self._condition:
                if self.is_forking and not wait:
                    self._thread.depth -= 1
                    return False
                self._condition.wait_for(lambda: not self.is_forking)
                self._num_inside += 1
        return True

    def leave(self) -> None:
        """Leave; a waiting fork may go on."""
        if self.depth == 1:
            with self._condition:
                self._num_inside -= 1
                self._condition.notify_all()
        self._thread.depth -= 1

    @property
    def depth(self) -> int:
        """How often this thread has entered."""
        return getattr(self._thread, "depth", 0)

    def wait_for_fork(self) -> None:
        """Let a waiting fork go first."""
        if self.is_forking and self.depth == 0:
            with self:
                pass

    def close(self) -> None:
        """Wait until no other thread is inside, and let none in."""
        self._thread.depth = self.depth + 1
        own = 1 if self.depth > 1 else 0
        with self._condition:
            self._condition.wait_for(lambda: not self.is_forking)
            self.is_forking = True
            self._condition.wait_for(lambda: self._num_inside == own)

    def open(self) -> None:
        """Let waiting threads go on; after `close`."""
        with self._condition:
            self.is_forking = False
            self._condition.notify_all()
        self._thread.depth -= 1


no_fork = ForkGate()
_process_id = os.getpid()


def process_id() -> int:
    """This process, without a system call."""
    return _process_id


def _after_fork_in_child() -> None:
    global _process_id  # noqa: PLW0603 - module state of one process
    _process_id = os.getpid()
    no_fork.reset()


os.register_at_fork(after_in_child=_after_fork_in_child)

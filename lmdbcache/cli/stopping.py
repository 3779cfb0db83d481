"""Ctrl-C and SIGTERM: the first stops what is going on cleanly, a second Ctrl-C ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from types import FrameType
from typing import Any, Final

# `timeout` and many wrappers signal the process and its group: the same news twice.
_SAME_NEWS_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 0.05
# KeyboardInterrupt is lost in a finalizer or at a fork, and C modules garble it in an import.
_NOT_INSIDE_FILES: Final = ("<frozen importlib._bootstrap", weakref.__file__)
_NOT_INSIDE_FUNCTIONS: Final = ("__del__", "_start_workers", "_shutdown_workers", "_launch")


class Stopped(Exception):  # noqa: N818 - an answer to a signal, not an error
    """A command was stopped by a signal; the message says what is kept."""


class _StopRequested(KeyboardInterrupt):
    # Python ends by SIGINT, whatever is asked of sys.exit, once a plain KeyboardInterrupt has
    # come out of an exec.
    pass


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a KeyboardInterrupt, at a moment when that is safe.

    Further ones are ignored, so that the stop can be clean; but Ctrl-C a second time, a second
    later or more, ends the process at once. A signal that is ignored already (nohup) stays so.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._is_over = False
        self._since = 0.0
        self._report = sys.unraisablehook

    @property
    def exit_code(self) -> int:
        """As a shell shows a process that this signal ended: 130 or 143."""
        return 128 + (self.number or signal.SIGINT)

    def install(self) -> None:
        """Take the signals, for the rest of this process."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)
        signal.signal(signal.SIGALRM, self._raise)
        self._report = sys.unraisablehook
        sys.unraisablehook = self._try_again

    def finish(self) -> None:
        """Nothing is left to be stopped; the process is about to end."""
        self._is_over = True
        # Python takes its handlers away before it ends: a signal then would change the exit code.
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            if signal.getsignal(number) in (self._receive, self._raise):
                signal.signal(number, signal.SIG_IGN)

    def _try_again(self, unraisable: Any) -> None:
        # Python drops what is raised in a finalizer; the frames don't always show one.
        if unraisable.exc_type is _StopRequested:
            signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
        else:
            self._report(unraisable)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            self._raise(number, frame)
        elif number == signal.SIGINT and time.monotonic() - self._since > _SAME_NEWS_SECONDS:
            _end_at_once(self.exit_code)

    def _raise(self, _: int, frame: FrameType | None) -> None:
        if self._is_over:
            return
        if _is_inside_what_loses_it(frame):
            signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
        else:
            raise _StopRequested


def _is_inside_what_loses_it(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_NOT_INSIDE_FILES) or code.co_name in _NOT_INSIDE_FUNCTIONS:
            return True
        frame = frame.f_back
    return False


def _end_at_once(exit_code: int) -> None:
    # Not through sys.exit, which would wait for worker processes.
    if "multiprocessing" in sys.modules:
        import multiprocessing

        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.kill()
    os._exit(exit_code)

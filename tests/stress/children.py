"""Children forked from a light parent: started, listened to, killed, and how they ended.

The parent of all faults is a spawned process without torch, so that a fork takes a millisecond.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import select
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any

from stress.figures import Figures

CHILD_SECONDS = 600  # a guard against what hangs, on any machine
_LENGTH = struct.Struct("<I")


class Child:
    """A forked process that runs `function(send, *args)` and sends messages to its parent."""

    def __init__(
        self, function: Callable[..., Any], *args: Any, seconds: int = CHILD_SECONDS
    ) -> None:
        self._received = b""
        self._pipe, writing = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            _run(function, writing, args, seconds)
        os.close(writing)
        os.set_blocking(self._pipe, False)
        self.status: int | None = None

    def messages(self) -> list[Any]:
        """What came since the last call; a message cut off by a kill is none."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._pipe, 1 << 20):
                self._received += chunk
        found, at = [], 0
        while at + _LENGTH.size <= len(self._received):
            end = at + _LENGTH.size + _LENGTH.unpack_from(self._received, at)[0]
            if end > len(self._received):
                break
            found.append(pickle.loads(self._received[at + _LENGTH.size : end]))
            at = end
        self._received = self._received[at:]
        return found

    def is_alive(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def kill(self) -> list[Any]:
        """SIGKILL; returns the last messages."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        return self.end()

    def end(self) -> list[Any]:
        """Wait for the end; returns the last messages. `status` is negative for a signal."""
        found: list[Any] = []
        while True:
            select.select([self._pipe], [], [])
            found += self.messages()
            with contextlib.suppress(BlockingIOError):
                if not (chunk := os.read(self._pipe, 1 << 16)):
                    break
                self._received += chunk
        os.close(self._pipe)
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return found

    def report_end(self, figures: Figures, what: str) -> None:
        """Count an end that is neither success nor our own kill."""
        if self.status in (0, -signal.SIGKILL):
            return
        kind = "hung" if self.status == -signal.SIGALRM else "crashed"
        figures.problem(kind, f"{what} ended with {self.status}")


def _run(function: Callable[..., Any], writing: int, args: tuple[Any, ...], seconds: int) -> None:
    def send(message: Any) -> None:
        content = pickle.dumps(message)
        whole = memoryview(_LENGTH.pack(len(content)) + content)
        while whole:
            whole = whole[os.write(writing, whole) :]

    status = 1
    try:
        signal.alarm(seconds)
        function(send, *args)
        status = 0
    except BaseException:  # noqa: BLE001 - the parent counts it
        traceback.print_exc()
    finally:
        os._exit(status)


def checked(figures: Figures, function: Callable[..., Any], *args: Any) -> Any:
    """What `function(figures, *args)` returns in a child of its own, whose figures are added.

    None if the child crashed or hung, which is counted.
    """

    def run(send: Callable[[Any], None]) -> None:
        own = Figures()
        value = function(own, *args)
        send((own, value))

    child = Child(run)
    answers = child.end()
    child.report_end(figures, function.__name__)
    if not answers:
        return None
    own, value = answers[0]
    figures.merge(own)
    return value


def in_light_process(function: Callable[..., Figures], *args: Any) -> Figures:
    """Call in a spawned process, which imports no torch, and return what it counted."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, function, args))
    process.start()
    sending.close()
    try:
        figures, failure = receiving.recv()
    except EOFError:
        process.join()
        figures, failure = None, f"the process of the faults ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        process.close()
        receiving.close()
    assert failure is None, failure
    return figures


def _answer(sending: Any, function: Callable[..., Figures], args: tuple[Any, ...]) -> None:
    try:
        answer = (function(*args), None)
    except BaseException:  # noqa: BLE001 - raised again in the test
        answer = (None, traceback.format_exc())
    sending.send(answer)

"""The command line in processes that tests start, interrupt and kill.

They are forked from a server that has transformers imported, which saves each of them seconds.
How fast a run is decides nothing: one that is to be interrupted stands still before its end.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver, popen_forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# The server that `multiprocessing` itself has may be running without these.
_server = forkserver.ForkServer()
_server.set_forkserver_preload(
    [
        "lmdbcache.cli.main",
        "lmdbcache.extraction.decoding",
        "torchaudio.compliance.kaldi",
        "transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer",
        "transformers.models.audio_spectrogram_transformer.feature_extraction_audio_spectrogram_transformer",
    ]
)
PATIENCE = 240.0  # seconds; a guard against what hangs, on any machine
HELD = "held"


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: Any) -> None:
        connect = _server.connect_to_new_process
        with mock.patch.object(forkserver, "connect_to_new_process", connect):
            super()._launch(process_obj)


class Process(multiprocessing.context.ForkServerProcess):
    """A process that is forked from the server."""

    _Popen = staticmethod(_Popen)


class Command:
    """One run of `lmdbcache …` in a session of its own."""

    def __init__(
        self,
        folder: Path,
        arguments: Iterable[object],
        prepare: Callable[[Path], object] | None = None,
    ) -> None:
        """`prepare` is called in the process before the command, with the folder."""
        folder.mkdir()
        self.folder = folder
        self.process = Process(target=_main, args=(folder, list(map(str, arguments)), prepare))
        self.process.start()

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text("utf-8")

    @property
    def err(self) -> str:
        path = self.folder / "err"
        return path.read_text("utf-8") if path.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """The exit code; negative if a signal ended it."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"still running: {self.err}"
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for something that it does while it runs."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.is_alive(), f"ended early: {self.out} {self.err}"
            assert time.monotonic() < deadline, f"still waiting: {self.err}"
            time.sleep(0.005)

    def is_held(self) -> bool:
        """Whether `hold_after` or `call_after` has done what it does."""
        return (self.folder / HELD).exists()

    def waits_for_a_lock(self) -> bool:
        """Whether it hangs in a `flock` that another process holds."""
        waiting = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return any(words[1] == "->" and int(words[5]) == self.process.pid for words in waiting)

    def members(self) -> list[int]:
        """The living processes of its session: itself and its workers."""
        return session_members(self.process.pid)

    def end(self) -> None:
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.join(PATIENCE)


def session_members(session: int) -> list[int]:
    """Living processes of a session, zombies left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(folder.name))
    return found


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (number - 1) & 1)


def call_after(number: int, function: Callable[[], object], folder: Path) -> None:
    """In this process: call a function once so many batches have been embedded."""
    from lmdbcache.embedders.transformers_family import TransformersEmbedder

    plain = TransformersEmbedder.embed_outputs
    seen = set()  # of the first batch one clip comes again, to be compared

    def embed(self: Any, features: Any, *others: Any, **named: Any) -> Any:
        before = len(seen)
        seen.add(features[-1].numpy().tobytes())
        if before == number < len(seen):
            (folder / HELD).touch()
            function()
        return plain(self, features, *others, **named)

    TransformersEmbedder.embed_outputs = embed  # type: ignore[method-assign]


def hold_after(number: int, folder: Path) -> None:
    """In this process: embed so many batches, then wait to be stopped."""
    call_after(number, _wait_for_ever, folder)


def hold_after_puts(number: int, folder: Path) -> None:
    """In this process: add so many batches to stores, then wait to be stopped."""
    from lmdbcache.extraction.store_to_fill import StoreToFill

    plain = StoreToFill.put
    left = itertools.count(number, -1)

    def put(self: Any, *arguments: Any) -> None:
        if next(left) == 0:
            (folder / HELD).touch()
            _wait_for_ever()
        plain(self, *arguments)

    StoreToFill.put = put  # type: ignore[method-assign]


def signal_workers(number: int, most: int | None = None) -> None:
    """Send a signal to the processes that this one has started with multiprocessing, or to some."""
    for worker in multiprocessing.active_children()[:most]:
        os.kill(worker.pid or 0, number)


def _wait_for_ever() -> None:
    while True:
        time.sleep(60)


def _main(
    folder: Path, arguments: list[str], prepare: Callable[[Path], object] | None = None
) -> None:
    os.setsid()
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    # As in a process that a shell started; here it would be the server's own method.
    multiprocessing.set_start_method(None, force=True)
    import torch

    from lmdbcache.cli import main

    torch.set_num_threads(1)  # two runs at once would spend their time waiting for each other
    if prepare is not None:
        prepare(folder)

    sys.argv = ["lmdbcache", *arguments]
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()

"""Running pieces of a test in processes of their own. Imports no torch: spawning would wait."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmdbcache.cache import EmbeddingCache

TIMEOUT_SECONDS = 240  # a guard against what hangs, on any machine
NOBODY = 65534

# For `Peer` and for the workers of a DataLoader: each would take two seconds to import torch.
multiprocessing.set_forkserver_preload(["lmdbcache.cache.embedding_cache", "torch"])


def in_fork(function: Callable[[], Any], *, user: int | None = None) -> Any:
    """What `function` returns in a forked child, under another user id if asked."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        signal.alarm(TIMEOUT_SECONDS)
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            answer = pickle.dumps((function(), None))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the parent
            answer = pickle.dumps((None, f"{type(error).__name__}: {traceback.format_exc()}"))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the forked child ended with status {status}"
    value, failure = pickle.loads(answer)
    assert failure is None, failure
    return value


class Peer:
    """A new process that calls functions, one after the other, in one interpreter.

    Forked from a server that has imported what they need: that is as good as a process that was
    started anew, and takes milliseconds.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.call(_take_over, dict(os.environ), str(Path.cwd()))

    def start(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._connection.send((function, args, options))

    def answer(self) -> Any:
        assert self._connection.poll(TIMEOUT_SECONDS), "the other process doesn't answer"
        value, failure = self._connection.recv()
        assert failure is None, failure
        return value

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.start(function, *args, **options)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self.process.join(TIMEOUT_SECONDS)
        if self.process.is_alive():
            self.kill()
        self._connection.close()
        self.process.close()


@contextlib.contextmanager
def peer_process() -> Iterator[Peer]:
    peer = Peer()
    try:
        yield peer
    finally:
        peer.end()


def _take_over(environment: dict[str, str], folder: str) -> None:
    """Be as a child of the test's process would: the server has those of its start."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


def _serve(connection: Any) -> None:
    while (request := connection.recv()) is not None:
        function, args, options = request
        try:
            connection.send((function(*args, **options), None))
        except BaseException:  # noqa: BLE001 - it is raised again in the parent
            connection.send((None, traceback.format_exc()))


def open_database_files() -> list[str]:
    """The *.mdb files that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if ".mdb" in target:
            found.append(target)
    return found


# ---- what peers do

_held: list[Any] = []


def hold(root: Any, config: Any, sample_ids: Iterable[str] = ()) -> int:
    """Open a store until `let_go`, and read some of its samples; returns how many it has."""
    _held.append(reader := EmbeddingCache(root).reader(config))
    for sample_id in sample_ids:
        reader[sample_id]
    return len(reader)


def hold_writer(root: Any, config: Any) -> None:
    """Open a store's writer until `let_go`."""
    _held.append(EmbeddingCache(root).writer(config))


def let_go() -> None:
    """Close what is held."""
    _held.pop().close()


def write(root: Any, config: Any, items: dict[str, Any], **options: Any) -> int:
    """Write and commit; returns how many were written."""
    with EmbeddingCache(root).writer(config, **options) as writer:
        writer.put_batch(items, items.values())
    return writer.num_written


def rewrite(root: Any, config: Any, sample_ids: list[str], rounds: int, size: int = 768) -> None:
    """Overwrite every sample in each round, one commit a round; the value is the round."""
    with EmbeddingCache(root).writer(config, on_duplicate="overwrite") as writer:
        for number in range(1, rounds + 1):
            value = np.full(size, number, np.float32)
            for sample_id in sample_ids:
                writer.put(sample_id, value)
            writer.commit()


def read(root: Any, config: Any, sample_ids: list[str]) -> Any:
    with EmbeddingCache(root).reader(config) as reader:
        return reader.get_batch(sample_ids)


def numbered(first: int, last: int, size: int = 64) -> dict[str, Any]:
    """Embeddings that hold their number."""
    return {f"clip_{n:06d}:x": np.full(size, n, np.float32) for n in range(first, last)}


def write_in_turns(root: Any, config: Any, first: int, last: int, per_commit: int) -> None:
    with EmbeddingCache(root).writer(config, commit_records=per_commit) as writer:
        for sample_id, embedding in numbered(first, last).items():
            writer.put(sample_id, embedding)


def write_until_killed(root: Any, config: Any, acknowledgements: str, first: int) -> None:
    """Commit 16 embeddings after another and write down each number that is safe."""
    descriptor = os.open(acknowledgements, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with EmbeddingCache(root).writer(config) as writer:
        while True:
            items = numbered(first, first + 16)
            writer.put_batch(items, items.values())
            writer.commit()
            first += 16
            os.write(descriptor, f"{first}\n".encode())


def compact_until_killed(root: Any, config: Any) -> None:
    cache = EmbeddingCache(root)
    while True:
        cache.compact(config)

"""One disk that is filled again and again while stores on it are written, compacted and read."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from small_disks import empty, fill
from storage.child_processes import peer_process

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.errors import CacheFullError

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 2048
BATCH = 400  # 3 MiB
MOST = 1600

_writers: dict[Any, Any] = {}


def commit(root: Any, config: Any, first: int) -> str:
    """With the same writer as before, in the same process."""
    if root not in _writers:
        _writers[root] = EmbeddingCache(root).writer(config)
    writer = _writers[root]
    try:
        for n in range(first, first + BATCH):
            writer.put(f"clip_{n:06d}:x", np.full(SIZE, n, np.float32))
        writer.commit()
    except CacheFullError as error:
        writer.discard()
        return _told(error)
    return "done"


def _told(error: CacheFullError) -> str:
    return "full" if "ree space" in str(error) and "\n" not in str(error) else f"bad: {error}"


def create(root: Any, config: Any, number: int) -> str:
    other = config.replace(namespace=f"other{number}")
    cache = EmbeddingCache(root)
    try:
        with cache.writer(other) as writer:
            writer.put_batch(["a:x", "b:x"], np.ones((2, 1 << 18), np.float32))
    except CacheFullError as error:
        if other in cache:
            assert len(list(cache.reader(other))) == 0
        return _told(error)
    finally:
        cache.clear(other)
    return "done"


def compact(root: Any, config: Any, _: int) -> str:
    try:
        EmbeddingCache(root).compact(config)
    except CacheFullError as error:
        return _told(error)
    return "done"


def check(root: Any, config: Any, count: int) -> tuple[int, bool]:
    """Every committed value, by single reads and by a table of offsets, in a new reader."""
    try:
        with EmbeddingCache(root).reader(config) as reader:
            ids = [f"clip_{n:06d}:x" for n in range(count)]
            for start in range(0, count, 100):
                batch = reader.get_batch(ids[start : start + 100])
                assert (batch == np.arange(start, start + len(batch))[:, None]).all()
            return len(reader), True
    except CacheFullError:
        return count, False  # no room for a lock file


def close(root: Any) -> None:
    _writers.pop(root).close()


OPERATIONS = [commit, commit, compact, create]


def fill_at_random(disk: Path, rounds: int, seed: int) -> Counter[str]:
    """Fill the disk before or amid an operation, look at everything, free it, and go on.

    Returns:
        How often each operation was done, found the disk full, was refused to read.
    """
    chance, figures = random.Random(seed), Counter()
    root, config, stored = disk / "cache", CacheConfig(), 0
    with peer_process() as writer, peer_process() as reader:
        assert writer.call(commit, root, config, 0) == "done"
        stored = BATCH
        for number in range(rounds):
            operation = chance.choice(OPERATIONS)
            leave = int(2 ** chance.uniform(0, 24))
            amid = chance.random() < 0.7
            if not amid:
                fill(disk, leave)
            writer.start(operation, root, config, stored if operation is commit else number)
            if amid:
                time.sleep(chance.uniform(0, 0.04))
                fill(disk, leave)
            outcome = writer.answer()
            assert outcome in ("done", "full"), outcome
            figures[f"{operation.__name__} {outcome}"] += 1
            stored += BATCH * (operation is commit and outcome == "done")
            # On the full disk: what was committed is there, in this process and another.
            for peer in (writer, reader):
                found, could_read = peer.call(check, root, config, stored)
                assert found == stored
                figures["read on the full disk" if could_read else "reader refused"] += 1
            empty(disk)
            if outcome == "full":
                # The same process and the same writer go on.
                assert writer.call(operation, root, config, stored) == "done"
                stored += BATCH * (operation is commit)
            cache = EmbeddingCache(root)
            assert cache.verify(config).is_sound
            assert len(list(cache.path(config).glob("gen-*"))) == 1
            assert not list(cache.path(config).glob(".*.tmp"))
            if stored > MOST:
                writer.call(close, root)
                cache.clear(config)
                stored = 0
                assert writer.call(commit, root, config, 0) == "done"
                stored = BATCH
        writer.call(close, root)
    return figures

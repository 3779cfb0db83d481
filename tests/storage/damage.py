"""Damaging a store's data.mdb and looking at it in a child process: signals are counted."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmdbcache import EmbeddingCache
from lmdbcache.errors import CacheError

SECONDS_PER_FILE = 120  # a guard against what hangs, on any machine


def data_file(cache: EmbeddingCache, config: Any) -> Path:
    """data.mdb of the live generation."""
    store = cache.path(config)
    return store / (store / "CURRENT").read_text().strip() / "data.mdb"


def flip_value(path: Path, value: npt.NDArray[Any], after: int = 0, bits: int = 1) -> int:
    """Change bits of a value's last copy, so many bytes after its beginning; returns where."""
    at = path.read_bytes().rindex(value.tobytes()) + after
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bits]))
    return at


def flips(content: bytes, count: int, seed: int, *, reach: int | None = None) -> Iterator[bytes]:
    """Copies with 1 to 8 changed bytes each.

    Args:
        content: The intact file.
        count: How many copies.
        seed: Of the places.
        reach: Change only this many bytes at the beginning of a page: headers and pointers.
    """
    dice = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(dice.randint(1, 8)):
            at = dice.randrange(len(content))
            if reach is not None:
                at = at // 4096 * 4096 + dice.randrange(reach)
            damaged[at] ^= 1 << dice.randrange(8)
        yield bytes(damaged)


def cuts(content: bytes, odd: int, seed: int) -> Iterator[bytes]:
    """The file cut at every page's beginning, and at some other places."""
    dice = random.Random(seed)
    places = [*range(0, len(content), 4096), *(dice.randrange(len(content)) for _ in range(odd))]
    for place in places:
        yield content[:place]


def look(cache: EmbeddingCache, config: Any, expected: dict[str, Any]) -> str:
    """Read with verification, then verify: `sound`, `damaged`, `refused` or `WRONG …`."""
    refused = False
    for mode in ("always", "first_read"):
        try:
            with cache.reader(config, verify=mode) as reader:
                for sample_id, value in expected.items():
                    try:
                        read = reader[sample_id]
                    except CacheError:
                        refused = True
                        continue
                    if not np.array_equal(read, value):
                        return f"WRONG {sample_id}"
                try:
                    batch = reader.get_batch(list(expected))
                    if not np.array_equal(batch, np.stack(list(expected.values()))):
                        return "WRONG batch"
                except CacheError:
                    refused = True
        except CacheError:
            refused = True
    try:
        report = cache.verify(config)
    except CacheError:
        return "refused"
    if report.is_sound:
        return "WRONG: called sound" if refused else "sound"
    return "damaged"


def mend(cache: EmbeddingCache, config: Any, expected: dict[str, Any]) -> str:
    """Repair a copy: `kept N`, `refused`, or `WRONG …`. What is kept is right, and sound."""
    copy = EmbeddingCache(cache.root.parent / f"{cache.root.name}-copy-{os.getpid()}")
    shutil.copytree(cache.root, copy.root)
    try:
        try:
            report = copy.repair(config)
        except CacheError:
            return "refused"
        if not copy.verify(config).is_sound:
            return "WRONG: repaired and not sound"
        with copy.reader(config) as reader:
            if len(reader) != report.num_kept:
                return "WRONG number kept"
            for sample_id, value in reader.items():
                if not np.array_equal(value, expected[sample_id]):
                    return f"WRONG {sample_id}"
        return f"kept {report.num_kept}"
    finally:
        shutil.rmtree(copy.root)


def outcomes(
    cache: EmbeddingCache,
    config: Any,
    expected: dict[str, Any],
    files: Iterator[bytes],
    examine: Callable[..., str] = look,
) -> Counter[str]:
    """How often each outcome came about; a child that a signal ends counts as `SIGNAL n`."""
    path = data_file(cache, config)
    intact, contents = path.read_bytes(), list(files)
    counted: Counter[str] = Counter()
    first = 0
    while first < len(contents):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            with os.fdopen(writing, "wb") as pipe:
                for content in contents[first:]:
                    signal.alarm(SECONDS_PER_FILE)
                    path.write_bytes(content)
                    try:
                        outcome = examine(cache, config, expected)
                    except BaseException as error:  # noqa: BLE001 - an outcome like any other
                        outcome = f"WRONG {type(error).__name__}: {error}"
                    pickle.dump(outcome, pipe)
                    pipe.flush()
            os._exit(0)
        os.close(writing)
        done = []
        with os.fdopen(reading, "rb") as pipe:
            while True:
                try:
                    done.append(pickle.load(pipe))
                except EOFError:
                    break
        _, status = os.waitpid(pid, 0)
        counted.update(done)
        first += len(done)
        if status != 0:
            counted[f"SIGNAL {os.WTERMSIG(status)} at file {first}"] += 1
            first += 1
    path.write_bytes(intact)
    return counted

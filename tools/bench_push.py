"""How long push and pull take, against a copy: `python tools/bench_push.py URL` (an empty place).

A store of 28,109 pooled embeddings (82 MiB) is pushed, pushed again, and pushed with 100 more, and
pulled in the same steps; then what is there is verified. The copy is `shutil.copyfile` of as many
bytes, with fsync.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.exchange import pull, push, verify_remote


def put(cache: EmbeddingCache, config: CacheConfig, first: int, number: int) -> None:
    names = [f"video_{index:05d}:dog" for index in range(first, first + number)]
    values = np.random.default_rng(first).normal(size=(number, 768)).astype(np.float32)
    with cache.writer(config) as writer:
        writer.put_batch(names, values)


def timed(what: str, action) -> object:
    before = time.perf_counter()
    result = action()
    print(f"{what:<24} {time.perf_counter() - before:6.2f} s")
    return result


def copied(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--quick", action="store_true", help="Few: only tries the code.")
    arguments = parser.parse_args()
    url, config, number = arguments.url, CacheConfig(), 200 if arguments.quick else 28_109
    with tempfile.TemporaryDirectory() as folder:
        cache = EmbeddingCache(folder)
        put(cache, config, 0, number)
        raw = Path(folder) / "raw"
        raw.write_bytes(os.urandom(1 << 20) * 83)
        timed("copy of 83 MiB", lambda: copied(raw, raw.with_name("copy")))
        first = timed(f"push {number:,}", lambda: push(cache, config, url))
        timed("push again", lambda: push(cache, config, url))
        other = EmbeddingCache(Path(folder) / "other")
        timed(f"pull {number:,}", lambda: pull(other, config, url))
        timed("pull again", lambda: pull(other, config, url))
        put(cache, config, number, 100)
        second = timed("push 100 more", lambda: push(cache, config, url))
        timed("pull 100 more", lambda: pull(other, config, url))
        report = timed("verify", lambda: verify_remote(url))
    print(f"{first.num_shards} shards, {first.num_bytes} bytes; then {second.num_bytes} bytes")
    print("sound" if report.is_sound else "DAMAGED")


if __name__ == "__main__":
    main()

"""SIGKILL for merges, at any moment, one or two into the same store at once."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from exchange.conftest import contents, numbered, same

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.cache import count_origins
from lmdbcache.exchange import intake as intake_module, merge_stores

SAMPLES = 600
BATCH = 40
PARTS = ((0, 300), (200, 500), (450, SAMPLES))


def merge_in_child(target: EmbeddingCache, sources: list[Path], **options: Any) -> int:
    """Start a merge in small batches in a forked child; gives its process id."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(240)
        intake_module._BATCH_RECORDS = BATCH
        code = 1
        try:
            code = merge_stores(target, sources, **options).exit_code
        finally:
            os._exit(code)
    return pid


def kill_merges(seed: int, folder: Path, num_kills: int) -> Counter[str]:
    """Kill merges; after each the store is sound, and holds what sources hold with an origin."""
    dice, figures, number = random.Random(seed), Counter[str](), 0
    config, values = CacheConfig(), numbered(0, SAMPLES)
    sources = []
    for first, last in PARTS:
        cache = EmbeddingCache(folder / f"source-{first}")
        with cache.writer(config) as writer:
            writer.put_batch(numbered(first, last), list(numbered(first, last).values()))
        sources.append(cache.root)
    life = 0.05
    while figures["kills"] < num_kills:
        number += 1
        target = EmbeddingCache(folder / f"target-{number}")
        for _ in range(8):
            children = [merge_in_child(target, sources) for _ in range(dice.choice((1, 1, 2)))]
            time.sleep(dice.uniform(0, life))
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                figures["kills" if os.WIFSIGNALED(status) else "ended"] += 1
                life *= 1.05 if os.WIFSIGNALED(status) else 0.9
            found = contents(target, config) if config in target else {}
            if not same(found, {name: values[name] for name in found}):
                figures["wrong"] += 1
            told = sum(n for _, n in count_origins(target.path(config))) if found else 0
            figures["without origin"] += told != len(found)
            figures["partly"] += 0 < len(found) < SAMPLES
        children = [merge_in_child(target, sources) for _ in range(2)]
        figures["failed"] += sum(os.waitpid(pid, 0)[1] != 0 for pid in children)
        figures["incomplete"] += not same(contents(target, config), values)
    return figures

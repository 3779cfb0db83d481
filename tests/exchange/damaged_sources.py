"""Merging a damaged store into a new one and into one that has half of it, in child processes."""

from __future__ import annotations

import os
import shutil
from typing import Any

import numpy as np

from lmdbcache import EmbeddingCache
from lmdbcache.exchange import merge_stores


def merge_damaged(cache: EmbeddingCache, config: Any, expected: dict[str, Any]) -> str:
    """`complete`, `partly` or `WRONG …`: what is merged is right, what isn't merged is told."""
    target = EmbeddingCache(cache.root.parent / f"target-{os.getpid()}")
    half = dict(list(expected.items())[::2])
    with target.writer(config) as writer:
        writer.put_batch(half, half.values())
    try:
        reports = merge_stores(target, [cache.root])
        told = {refusal.sample_id for report in reports.stores for refusal in report.refused}
        is_told = bool(reports.refused) or None in told
        with target.reader(config) as reader:
            for sample_id, value in reader.items():
                if sample_id not in expected or not np.array_equal(value, expected[sample_id]):
                    return f"WRONG {sample_id}"
            missing = set(expected) - set(reader)
        if missing and not (is_told or missing <= told):
            return f"WRONG: not told {missing - told}"
        if missing and not reports.exit_code:
            return "WRONG exit code"
        if not target.verify(config).is_sound:
            return "WRONG: the target isn't sound"
        return "partly" if reports.exit_code else "complete"
    finally:
        shutil.rmtree(target.root)

"""The samples of tools/bench_scaling.py.

Embedding number n holds n in its first place and the rest of row n % 1024 of a fixed random block:
every read can be checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmdbcache import CacheConfig, EmbeddingCache

HIDDEN_SHAPE = (1214, 768)
_EXACT = 1 << 24  # float32 holds the numbers below


def name_of(number: int) -> str:
    return f"clip_{number:09d}:{number % 309}"


def names_of(numbers: Any) -> list[str]:
    return [name_of(number) for number in np.asarray(numbers).tolist()]


def config_of(width: int = 768) -> CacheConfig:
    return CacheConfig(namespace="" if width == 768 else f"width-{width}")


def block_of(width: int) -> np.ndarray:
    return np.random.default_rng(0).random((1024, width), dtype=np.float32)


def embeddings_of(numbers: np.ndarray, block: np.ndarray) -> np.ndarray:
    rows = block[numbers % len(block)]
    rows[:, 0] = numbers % _EXACT
    return rows


def check(batch: np.ndarray, numbers: np.ndarray) -> None:
    rows = batch.reshape(len(numbers), -1)
    assert (rows[:, 0] == numbers % _EXACT).all()
    if batch.ndim == 2:
        assert (rows[:, 1:] == block_of(rows.shape[1])[numbers % 1024, 1:]).all()


def store_in(root: str) -> tuple[EmbeddingCache, CacheConfig]:
    """The only store under this root."""
    cache = EmbeddingCache(root)
    [config] = cache
    return cache, config

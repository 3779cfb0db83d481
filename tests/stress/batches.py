"""Batches whose content follows from seed, writer and number, and what a store must hold of them.

A batch has new samples and, if `overwrites`, some of its writer's own that are written again and
again: those hold the batch's number, so that a reader can tell an older value from a wrong one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig

NUM_OVERWRITTEN = 24
# Many in a leaf, three in a leaf, a page of its own, several pages.
SHAPES = [(4,), (300,), (900,), (3, 700)]


@dataclass
class Plan:
    """Everything that decides the batches of one store."""

    root: str
    seed: int
    shape: tuple[int, ...]
    overwrites: bool
    config: CacheConfig = field(default_factory=CacheConfig)

    @property
    def cache(self) -> EmbeddingCache:
        return EmbeddingCache(self.root)

    def batch(self, writer: int, number: int) -> dict[str, npt.NDArray[np.float32]]:
        dice = np.random.default_rng([self.seed, writer, number])
        num_new = int(dice.integers(1, 13))
        rows = dice.normal(size=(num_new, *self.shape)).astype(np.float32)
        items = {f"w{writer}_{number:06d}_{i:02d}:x": row for i, row in enumerate(rows)}
        if self.overwrites:
            for i in dice.choice(NUM_OVERWRITTEN, size=int(dice.integers(0, 6)), replace=False):
                items[f"again{writer}_{i:02d}:x"] = np.full(self.shape, number, np.float32)
        return items

    def first_sample(self, writer: int, number: int) -> str:
        """A sample that only this batch has."""
        return f"w{writer}_{number:06d}_00:x"


@dataclass
class Written:
    """The acknowledged content of a store: the number of batches of each writer, and the rows."""

    plan: Plan
    num_batches: dict[int, int] = field(default_factory=dict)
    rows: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def acknowledge(self, writer: int, number: int) -> None:
        assert number == self.num_batches.get(writer, 0)
        self.rows.update(self.plan.batch(writer, number))
        self.num_batches[writer] = number + 1

    def is_bit_equal(self, sample_ids: list[str], found: npt.NDArray[Any]) -> list[str]:
        """The sample ids whose value differs from what was written."""
        expected = np.stack([self.rows[sample_id] for sample_id in sample_ids])
        if found.tobytes() == expected.tobytes():
            return []
        length = 4 * math.prod(self.plan.shape)
        a, b = found.tobytes(), expected.tobytes()
        return [
            name
            for i, name in enumerate(sample_ids)
            if a[i * length : (i + 1) * length] != b[i * length : (i + 1) * length]
        ]


def write_batches(send: Any, plan: Plan, writer_number: int, number: int, stop: Any = None) -> None:
    """Commit one batch after another; each is acknowledged when `commit` has returned."""
    on_duplicate = "overwrite" if plan.overwrites else "skip"
    with plan.cache.writer(plan.config, on_duplicate=on_duplicate) as writer:
        while stop is None or not stop[0]:
            items = plan.batch(writer_number, number)
            if number % 3:
                writer.put_batch(list(items), np.stack(list(items.values())))
            else:
                for sample_id, row in items.items():
                    writer.put(sample_id, row)
            writer.commit()
            send(number)
            number += 1

"""SIGKILL for a writer that puts units of ragged embeddings and removes some of them again.

What holds after a kill: all that was committed or removed before the last answer; of what was
collected since, the units from the first to any later one, each wholly. A `put_batch` outside of
`together` is no unit: it may be committed in pieces.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from stress.children import Child, checked
from stress.figures import Figures

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig

KILLS_PER_STORE = 20
LONGEST_LIFE = 0.05
Rows = dict[str, npt.NDArray[np.float32]]


@dataclass
class Steps:
    """What the writer does, step by step; all of it follows from the seed."""

    root: str
    seed: int
    row: int  # float32 numbers in a row
    config: CacheConfig = field(default_factory=CacheConfig)

    def kind(self, number: int) -> str:
        return random.Random(f"{self.seed} {number}").choice(
            ["unit", "unit", "unit", "commit", "remove"]
        )

    def unit(self, number: int) -> Rows:
        dice = random.Random(f"{self.seed} {number} unit")
        return {
            f"{number:06d}_{i}:x": np.full((dice.randint(1, 4), self.row), 16 * number + i)
            for i in range(dice.randint(2, 6))
        }

    def removed(self, number: int) -> list[str]:
        """Of units before: one as a whole, single samples of others."""
        dice = random.Random(f"{self.seed} {number} remove")
        before = [n for n in range(max(0, number - 25), number) if self.kind(n) == "unit"]
        chosen = dice.sample(before, min(4, len(before)))
        whole = list(self.unit(chosen[0])) if chosen else []
        return whole + [dice.choice(list(self.unit(n))) for n in chosen[1:]]


@dataclass
class Model:
    """What must be stored, and the units that may be."""

    stored: Rows = field(default_factory=dict)
    collected: list[Rows] = field(default_factory=list)

    def after(self, steps: Steps, number: int) -> Model:
        """The model when this step is done."""
        kind = steps.kind(number)
        if kind == "unit":
            return Model(self.stored, [*self.collected, steps.unit(number)])
        if kind == "commit":
            return Model(self.states()[-1])
        gone = set(steps.removed(number))
        return Model(_without(self.stored, gone), [_without(u, gone) for u in self.collected])

    def states(self) -> list[Rows]:
        """Every content that the store may have."""
        found = [self.stored]
        for unit in self.collected:
            found.append({**found[-1], **unit})
        return found


def _without(rows: Rows, names: set[str]) -> Rows:
    return {name: value for name, value in rows.items() if name not in names}


def kill_removers(seed: int, folder: str, num_kills: int, row: int, limits: Any) -> Figures:
    """Kill the writer; compare the store with every content that it may have."""
    figures, dice = Figures(), random.Random(seed)
    life, number, model, steps = LONGEST_LIFE, 0, Model(), Steps("", 0, 0)
    while figures.counts["kills"] < num_kills:
        if figures.counts["kills"] % KILLS_PER_STORE == 0:
            at = figures.counts["kills"]
            steps, model, number = Steps(f"{folder}/{at}", seed + at, row), Model(), 0
        child = Child(take_steps, steps, number, limits)
        time.sleep(dice.uniform(0, life))
        done = child.kill()
        child.report_end(figures, "a writer")
        life *= 0.97 if len(done) > 10 else 1.2
        figures.add("kills")
        figures.add("steps", len(done))
        for number in done:
            model = model.after(steps, number)
        number = done[-1] + 1 if done else number
        allowed = [*model.states(), *model.after(steps, number).states()]
        found = checked(figures, compare, steps, allowed)
        if found is None:
            continue
        figures.add("found ahead", found >= len(model.states()))
        model, number = Model(allowed[found]), number + 1
    return figures


def take_steps(send: Callable[[Any], None], steps: Steps, number: int, limits: Any) -> None:
    """Say after each step that it is done."""
    cache = EmbeddingCache(steps.root)
    with cache.writer(steps.config, ragged=True, **limits) as writer:
        while True:
            kind = steps.kind(number)
            if kind == "unit":
                unit = steps.unit(number)
                with writer.together():
                    writer.put_batch(list(unit), list(unit.values()))
            elif kind == "commit":
                writer.commit()
            else:
                writer.remove(steps.removed(number))
            send(number)
            number += 1


def compare(figures: Figures, steps: Steps, allowed: list[Rows]) -> int | None:
    """Which of these is what the store holds."""
    cache, content = EmbeddingCache(steps.root), dict[str, Any]()
    if steps.config in cache:
        with cache.reader(steps.config, verify="always") as reader:
            content = dict(reader.items())
    figures.add("values compared", len(content))
    for index, rows in enumerate(allowed):
        if rows.keys() == content.keys() and all(
            np.array_equal(value, content[name]) for name, value in rows.items()
        ):
            return index
    again, lost = content.keys() - set().union(*allowed), allowed[0].keys() - content.keys()
    words = f"{sorted(again)[:3]} again, {sorted(lost)[:3]} missing, of {len(allowed)} contents"
    figures.problem("wrong", words)
    return None

"""What a fault test counts, and the seed that its dice start from."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

SEED_VARIABLE = "LMDBCACHE_FAULT_SEED"
DEFAULT_SEED = 20_26
SHOWN_PROBLEMS = 10

# What must not happen, whatever the test.
FAILURES = ("lost", "wrong", "hidden", "crashed", "hung", "backwards", "unsound", "stale slots")


def fault_seed() -> int:
    """The seed of all fault tests of this run."""
    return int(os.environ.get(SEED_VARIABLE, DEFAULT_SEED))


@dataclass
class Figures:
    """Counts of one fault test, with a word on each thing that went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    longest: dict[str, float] = field(default_factory=dict)  # seconds
    most: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, number: int = 1) -> None:
        self.counts[name] += number

    def problem(self, kind: str, words: str, number: int = 1) -> None:
        """Something that must not happen: one of `FAILURES`."""
        assert kind in FAILURES, kind
        self.counts[kind] += number
        self.problems.append(f"{kind}: {words}")

    def at_most(self, name: str, seconds: float) -> None:
        """Keep the longest time."""
        self.longest[name] = max(seconds, self.longest.get(name, 0.0))

    def at_most_count(self, name: str, number: int) -> None:
        """Keep the largest number."""
        self.most[name] = max(number, self.most.get(name, 0))

    def merge(self, other: Figures) -> None:
        self.counts.update(other.counts)
        self.problems += other.problems
        for name, seconds in other.longest.items():
            self.at_most(name, seconds)
        for name, number in other.most.items():
            self.at_most_count(name, number)

    def __str__(self) -> str:
        parts = [f"{n:,} {name}" for name, n in self.counts.items() if name not in FAILURES]
        parts += [f"{name} {1000 * seconds:.0f} ms" for name, seconds in self.longest.items()]
        parts += [f"{number} {name}" for name, number in self.most.items()]
        failures = ("lost", "wrong", "crashed")
        failures += tuple(name for name in FAILURES[3:] if self.counts[name])
        return "; ".join([*parts, ", ".join(f"{name} {self.counts[name]}" for name in failures)])

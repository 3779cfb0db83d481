"""The base of reports: what it makes of fields for JSON and for people."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from lmdbcache import CacheConfig
from lmdbcache.storage import Report


class Pair(NamedTuple):
    """A field's value."""

    name: str
    count: int


@dataclass(frozen=True)
class Found(Report):
    """A report with every kind of value."""

    derived: ClassVar[tuple[str, ...]] = ("is_sound", "exit_code")

    path: Path = Path("/store")
    time: datetime = datetime(2026, 1, 2, 3, 4, 5, 6, timezone.utc)
    config: CacheConfig = field(default_factory=CacheConfig)
    pairs: tuple[Pair, ...] = (Pair("dog", 2),)
    counts: Counter[int] = field(default_factory=lambda: Counter({4711: 1}))
    share: float = np.float32(0.5)  # type: ignore[assignment]
    nothing: None = None

    @property
    def is_sound(self):
        """A derived value."""
        return False

    @property
    def exit_code(self):
        """Something is left to do."""
        return 1


def test_fields_and_derived_values_go_through_json():
    """Paths, times, named tuples, configs, numbers as keys and numpy's become plain values."""
    content = json.loads(json.dumps(Found().to_dict()))
    assert content == {
        "path": "/store",
        "time": "2026-01-02T03:04:05+00:00",
        "config": CacheConfig().to_dict(),
        "pairs": [{"name": "dog", "count": 2}],
        "counts": {"4711": 1},
        "share": 0.5,
        "nothing": None,
        "is_sound": False,
        "exit_code": 1,
    }


def test_text_has_a_line_for_each_value_that_is_not_empty():
    """What is empty is left out."""
    lines = str(Found()).splitlines()
    assert "path: /store" in lines
    assert not any(line.startswith("nothing") for line in lines)

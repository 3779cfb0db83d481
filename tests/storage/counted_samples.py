"""Samples of two classes, for the tests of hits and misses."""

from __future__ import annotations

import numpy as np

SAMPLE_IDS = [f"{n:03d}:{'dog' if n % 4 else 'drum'}" for n in range(64)]
VALUES = np.arange(64, dtype=np.float32)[:, None] * np.ones(16, np.float32)
EACH_ONCE = {"dog": (48, 0), "drum": (16, 0)}


def figures(counts):
    names = sorted({*counts.hits, *counts.misses})
    return {name: (counts.hits[name], counts.misses[name]) for name in names}

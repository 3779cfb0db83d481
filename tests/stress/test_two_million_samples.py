"""A store of two million samples in fresh processes: first reads and private memory.

Small embeddings, so that it takes a minute; docs/benchmarks.md has the figures of (768,).
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from lmdbcache import CacheConfig, EmbeddingCache

pytestmark = pytest.mark.stress
NUM_SAMPLES = 2_000_000
FIRST_READS = """
import json, sys, time
import numpy as np
from lmdbcache import CacheConfig, EmbeddingCache

def private_kib():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

figures, start = {}, time.perf_counter()
reader = EmbeddingCache(sys.argv[1]).reader(CacheConfig())
assert (reader["clip_1234567:x"] == 1234567).all()
figures["open to first sample, ms"] = 1000 * (time.perf_counter() - start)
dice, before = np.random.default_rng(int(sys.argv[2])), private_kib()
seconds = []
for _ in range(40):
    numbers = dice.integers(0, 2_000_000, 256)
    names = [f"clip_{n:07d}:x" for n in numbers]
    start = time.perf_counter()
    batch = reader.get_batch(names)
    seconds.append(time.perf_counter() - start)
    assert (batch == numbers[:, None]).all()
figures["first batch by id, ms"] = 1000 * seconds[0]
figures["median batch by id, ms"] = 1000 * sorted(seconds)[20]
figures["private memory of 40 batches, MiB"] = (private_kib() - before) / 1024
reader.close()
print(json.dumps(figures))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two million embeddings of shape (16,) that hold their number."""
    root = tmp_path_factory.mktemp("two_million") / "cache"
    with EmbeddingCache(root).writer(CacheConfig(), commit_records=100_000) as writer:
        for part in np.split(np.arange(NUM_SAMPLES), 200):
            values = np.repeat(part[:, None], 16, axis=1).astype(np.float32)
            writer.put_batch([f"clip_{n:07d}:x" for n in part], values)
    return root


def test_two_million_samples_open_at_once(root, config, record_property):
    """Memory doesn't grow with the store; how soon samples come is noted."""
    runs = []
    for seed in range(3):
        answer = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(FIRST_READS), str(root), str(seed)],
            check=True,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        runs.append(json.loads(answer.stdout))
    best = {name: min(run[name] for run in runs) for name in runs[0]}
    record_property("faults", (", ".join(f"{n} {v:.1f}" for n, v in best.items()), {}))
    assert best["private memory of 40 batches, MiB"] < 10
    report = EmbeddingCache(root).verify(config)
    assert report.is_sound
    assert report.num_embeddings == NUM_SAMPLES

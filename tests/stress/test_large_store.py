"""A store of 300,000 samples in fresh processes, and a hundred killed writers beside a reader."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from storage.child_processes import numbered, peer_process, write, write_until_killed

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.storage import value_table

pytestmark = pytest.mark.stress
NUM_SAMPLES = 300_000
FIRST_READS = """
import json, sys, time
from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.storage import value_table
walks, original, seconds = [], value_table.read_table, {}
value_table.read_table = lambda *args: (walks.append(1), original(*args))[1]
def timed(name, function):
    start = time.perf_counter()
    result = function()
    seconds[name] = time.perf_counter() - start
    return result
names = [f"clip_{n:06d}:x" for n in range(299_999, -1, -1171)]
numbers = list(range(299_999, -1, -1171))
with timed("open", lambda: EmbeddingCache(sys.argv[1]).reader(CacheConfig())) as reader:
    assert (timed("first sample", lambda: reader["clip_123456:x"]) == 123456).all()
    batch = timed("first batch", lambda: reader.get_batch(names))
    assert batch[:, 63].tolist() == numbers
    everything = timed("select", reader.select)
    assert len(everything) == 300_000
    for start in range(0, 300_000, 1000):
        batch = everything.get_batch(range(start, start + 1000))
        assert (batch[:, 0] == range(start, start + 1000)).all()
    assert reader._snapshot.values is not None
    timed("warm batch", lambda: everything.get_batch(numbers))
print(json.dumps({"walks": len(walks), **seconds}))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """300,000 embeddings of shape (64,) that hold their number, written in random order."""
    root = tmp_path_factory.mktemp("large") / "cache"
    order = np.random.default_rng(0).permutation(NUM_SAMPLES)
    with EmbeddingCache(root).writer(CacheConfig(), commit_records=30_000) as writer:
        for part in np.array_split(order, 100):
            values = np.repeat(part[:, None], 64, axis=1).astype(np.float32)
            writer.put_batch([f"clip_{n:06d}:x" for n in part], values)
    return root


def fresh_process(root):
    """Read the whole store in a new interpreter; seconds of each step, and walks of the tree."""
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FIRST_READS), str(root)],
        check=True,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    figures = json.loads(answer.stdout)
    print(figures)
    return figures


def tables(root):
    return [path.name for path in root.rglob("*offsets-*")]


def test_a_large_store_opens_at_once_and_keeps_its_table(root, config):
    """The pages are walked once at most; every process after reads the one kept table."""
    figures = [fresh_process(root) for _ in range(3)]
    assert [each["walks"] for each in figures] in ([1, 0, 0], [0, 0, 0])
    assert len(tables(root)) == 1


def test_a_large_store_is_compacted_under_a_reader(root, config):
    """The old snapshot reads on, the new generation gets a table of its own, nothing is lost."""
    cache = EmbeddingCache(root)
    names = list(numbered(0, NUM_SAMPLES, size=0))
    picks = np.random.default_rng(1).integers(0, NUM_SAMPLES, 5000)
    with cache.reader(config) as reader:
        selection = reader.select(names)
        assert (selection.get_batch(picks)[:, 0] == picks).all()
        with peer_process() as peer:
            peer.call(_compact, root, config)
        assert (selection.get_batch(picks)[:, 0] == picks).all()
        reader.refresh()
        assert (selection.get_batch(picks)[:, 0] == picks).all()
    assert len(list(root.rglob("data.mdb"))) == 1
    assert fresh_process(root)["walks"] in (0, 1)
    assert fresh_process(root)["walks"] == 0
    assert len(tables(root)) == 1
    assert cache.verify(config).is_sound


def _compact(root, config):
    EmbeddingCache(root).compact(config)


def test_a_hundred_killed_writers_beside_a_reader(cache, config, tmp_path, monkeypatch):
    """After kill -9 at any moment nothing acknowledged is lost and no batch was ever wrong."""
    monkeypatch.setattr(value_table, "_READ_AT_ONCE", 2000)  # kept tables take part, too
    acknowledgements = tmp_path / "acknowledged"
    moments, generator = random.Random(0), np.random.default_rng(0)
    write(cache.root, config, numbered(0, 16))
    first, num_gathered = 16, 0
    with cache.reader(config) as reader:
        for _ in range(100):
            with peer_process() as peer:
                before = acknowledgements.stat().st_size if acknowledgements.exists() else 0
                peer.start(write_until_killed, cache.root, config, str(acknowledgements), first)
                deadline = None
                while deadline is None or time.monotonic() < deadline:
                    num_gathered += _check_a_batch(reader, generator)
                    if deadline is None and acknowledgements.exists():
                        if acknowledgements.stat().st_size > before:
                            deadline = time.monotonic() + moments.random() * 0.05
                peer.kill()
            acknowledged = int(acknowledgements.read_text().split()[-1])
            reader.refresh()
            # One commit more may have been on disk before it was written down.
            assert len(reader) in (acknowledged, acknowledged + 16)
            first = len(reader)
            whole = reader.select()
            assert (whole.get_batch(range(first))[:, 0] == np.arange(first)).all()
    assert num_gathered > 10_000
    assert cache.verify(config).is_sound


def _check_a_batch(reader, generator):
    """Gather by key and by position from the newest commit, while it is written to."""
    reader.refresh()
    numbers = generator.integers(0, len(reader), 64)
    names = [f"clip_{n:06d}:x" for n in numbers]
    for batch in (reader.get_batch(names), reader.select(names).get_batch(np.arange(64))):
        assert (batch == numbers[:, None]).all()
    return 128

"""Merges: killed at many moments, and of stores damaged in many ways."""

from __future__ import annotations

import pytest
from exchange.conftest import numbered
from exchange.damaged_sources import merge_damaged
from exchange.killed_merges import kill_merges
from storage.damage import cuts, data_file, flips, outcomes

from lmdbcache import EmbeddingCache

pytestmark = pytest.mark.stress


def test_killed_merges(tmp_path):
    """None leaves a wrong embedding, or one without its origin; the next ones complete it."""
    found = kill_merges(2026, tmp_path, 200)
    print(dict(found))
    bad = ("wrong", "failed", "incomplete", "without origin")
    assert {name: found[name] for name in bad} == dict.fromkeys(bad, 0)


@pytest.mark.parametrize("size", [8, 900, 60_000])
def test_damaged_sources(size, tmp_path, config):
    """No wrong value comes in, none is left out without a word, no process ends by a signal."""
    cache = EmbeddingCache(tmp_path / "cache")
    values = numbered(0, max(6, 6000 // size), size)
    for shift in (1, 0):
        with cache.writer(config, on_duplicate="overwrite") as writer:
            writer.put_batch(values, [value + shift for value in values.values()])
    content = data_file(cache, config).read_bytes()
    for files in (flips(content, 150, 1), flips(content, 150, 2, reach=64), cuts(content, 20, 3)):
        found = outcomes(cache, config, values, files, merge_damaged)
        print(size, dict(found))
        assert set(found) <= {"complete", "partly"}, found

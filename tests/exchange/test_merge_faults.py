"""Merges that are killed, that meet each other or an extraction, or a full disk; and their size."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from exchange.conftest import contents, numbered, same
from exchange.killed_merges import kill_merges, merge_in_child
from small_disks import empty, fill, small_disk
from storage import child_processes
from storage.child_processes import in_fork, peer_process, write_in_turns

from lmdbcache import EmbeddingCache
from lmdbcache.cache import count_origins
from lmdbcache.errors import CacheFullError
from lmdbcache.exchange import intake as intake_module, merge_stores


def test_killed_merges(tmp_path):
    """At any moment, and again: sound after each, complete at the end, each with its origin."""
    found = kill_merges(1, tmp_path, 16)
    assert found["kills"] >= 16
    assert not (found["wrong"])
    assert not (found["failed"])
    assert not (found["incomplete"])
    assert not found["without origin"]


def test_two_merges_at_once(store, target, config):
    """Of the same sources, and of sources that differ: both end, and each sample is one of them."""
    a, b = store("a", numbered(0, 300)), store("b", numbered(200, 500, seed=1))
    children = [merge_in_child(target, [source.root]) for source in (a, b, a)]
    codes = sorted(os.waitpid(pid, 0)[1] >> 8 for pid in children)
    assert codes[0] == 0  # who comes first meets nothing
    found = contents(target, config)
    either = [numbered(0, 500), numbered(200, 500, seed=1)]
    assert found.keys() == numbered(0, 500).keys()
    for name, value in found.items():
        assert any(np.array_equal(value, one.get(name)) for one in either)
    assert sum(number for _, number in count_origins(target.path(config))) == 500


def test_a_merge_while_others_write(store, target, config, monkeypatch):
    """Into the target and into the source: nothing of either is lost, both go on."""
    monkeypatch.setattr(intake_module, "_BATCH_RECORDS", 50)
    source = EmbeddingCache(target.root.parent / "source")
    ours, theirs = child_processes.numbered(0, 300), child_processes.numbered(200, 600)
    write_in_turns(source.root, config, 200, 400, 50)
    with peer_process() as one, peer_process() as other:
        one.start(write_in_turns, target.root, config, 0, 300, 10)
        other.start(write_in_turns, source.root, config, 400, 600, 10)
        for _ in range(3):
            merge_stores(target, [source.root])
        one.answer()
        other.answer()
    reports = merge_stores(target, [source.root])
    assert reports.exit_code == 0
    assert same(contents(target, config), {**ours, **theirs})


def test_a_full_disk(store, config, tmp_path, monkeypatch):
    """Our error; what was committed is kept; with room again the same call ends it."""
    monkeypatch.setattr(intake_module, "_BATCH_RECORDS", 100)
    values = numbered(0, 600, size=8192)
    source = store("source", values)
    with small_disk(tmp_path / "disk", 64) as disk:
        target = EmbeddingCache(disk / "cache")
        merge_stores(target, [store("few", numbered(0, 10, size=8192)).root])
        fill(disk, 28 << 20)
        with pytest.raises(CacheFullError):
            merge_stores(target, [source.root])
        kept = contents(target, config)
        assert 10 < len(kept) < 600
        assert same(kept, {name: values[name] for name in kept})
        empty(disk)
        (report,) = merge_stores(target, [source.root]).stores
        assert report.num_new == 600 - len(kept)
        assert same(contents(target, config), values)


def test_hidden_states_need_little_memory(target, config, tmp_path, monkeypatch):
    """From two sources that differ in some: batches are held, never a store."""
    monkeypatch.setattr(intake_module, "_BATCH_BYTES", 4 << 20)
    config = config.replace(output="last_hidden_state")
    roots = []
    for number in range(2):
        cache = EmbeddingCache(tmp_path / f"source-{number}")
        roots.append(cache.root)
        with cache.writer(config) as writer:
            for n in range(number * 30, number * 30 + 60):
                value = np.full((256, 768), n, np.float32)
                writer.put(f"clip_{n:03d}:x", value + (number if n % 7 == 0 else 0))

    def anonymous_bytes():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) << 10

    def growth():
        seen = [anonymous_bytes()]
        done = lambda *_: seen.append(anonymous_bytes())  # noqa: E731
        (report,) = merge_stores(target, roots, progress=done).stores
        assert (report.num_new, report.num_same, len(report.conflicts)) == (86, 26, 4)
        assert len(seen) > 8
        return max(seen) - seen[0]

    assert in_fork(growth) < 40 << 20  # both stores have 90 MiB
    assert target.verify(config).is_sound

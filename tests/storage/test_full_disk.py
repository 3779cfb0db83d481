"""A disk that is full at each step: our error, the old state readable, and it goes on."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from small_disks import empty, fill, small_disk
from storage.child_processes import in_fork
from storage.full_disks import fill_at_random

from lmdbcache import EmbeddingCache
from lmdbcache.errors import CacheFullError
from lmdbcache.storage import generations, value_table, writer as writing

NAMES = [f"{n:03d}:x" for n in range(200)]


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 64) as folder:
        yield folder


@pytest.fixture
def cache(disk):
    return EmbeddingCache(disk / "cache")


@pytest.fixture
def no_reserve(monkeypatch):
    """Let a commit begin that the disk can't hold."""
    monkeypatch.setattr(writing, "check_room", lambda *_: None)


def put(cache, config, value, **options):
    with cache.writer(config, on_duplicate="overwrite", **options) as opened:
        opened.put_batch(NAMES, np.full((200, 2048), value, np.float32))


def values(cache, config):
    with cache.reader(config) as reader:
        return set(reader.get_batch(NAMES).ravel().tolist())


def test_ten_full_disks(disk):
    """A smaller slice of the stress test."""
    figures = fill_at_random(disk, rounds=10, seed=1)
    assert sum(figures.values()) == 30


def test_commit_names_the_bytes(disk, cache, config):
    """Refused before it begins; the writer keeps what it has and commits it once there is room."""
    put(cache, config, 1)
    with cache.writer(config, on_duplicate="overwrite") as opened:
        opened.put_batch(NAMES, np.full((200, 2048), 2, np.float32))
        fill(disk, 1 << 20)
        with pytest.raises(CacheFullError):
            opened.commit()
        assert values(cache, config) == {1}
        empty(disk)
        assert opened.commit() == 200
    assert values(cache, config) == {2}


def test_commit_that_runs_out_midway(disk, cache, config, no_reserve):
    """LMDB's own failure has the bytes needed, too, and the same writer goes on."""
    put(cache, config, 1)
    with cache.writer(config, on_duplicate="overwrite") as opened:
        opened.put_batch(NAMES, np.full((200, 2048), 2, np.float32))
        fill(disk, 256 << 10)
        for _ in range(3):
            with pytest.raises(CacheFullError):
                opened.commit()
        assert values(cache, config) == {1}
        empty(disk)
        assert opened.commit() == 200
    assert values(cache, config) == {2}
    assert cache.verify(config).is_sound


@pytest.mark.parametrize("leave", [0, 4096, 12 << 10, 64 << 10, 1 << 20])
def test_creation(disk, cache, config, no_reserve, leave):
    """However little is left, a store is there as a whole or not at all, and is made later."""
    cache.root.mkdir()
    fill(disk, leave)

    def create():
        with pytest.raises(CacheFullError):
            put(cache, config, 1)
        if config in cache:
            assert len(cache.reader(config)) == 0

    in_fork(create)
    empty(disk)
    put(cache, config, 1)
    assert values(cache, config) == {1}
    assert len(list(cache.path(config).glob("gen-*"))) == 1


class FullFile:
    """os.fsync on a disk that is full."""

    def __call__(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("exists", [False, True])
def test_publishing(cache, config, monkeypatch, exists):
    """CURRENT can't be written: the old state stays, our error, no half of it lies around."""
    if exists:
        put(cache, config, 1)
    monkeypatch.setattr(generations.os, "fsync", FullFile())
    with pytest.raises(CacheFullError):
        cache.compact(config) if exists else put(cache, config, 1)
    monkeypatch.undo()
    assert (config in cache) == exists
    assert not list(cache.path(config).glob(".*.tmp"))
    if exists:
        assert values(cache, config) == {1}
        assert len(list(cache.path(config).glob("gen-*"))) == 1
        cache.compact(config)
    put(cache, config, 2)
    assert values(cache, config) == {2}


def test_compaction_is_refused(disk, cache, config):
    """No room for the copy: nothing is begun, the message has both figures."""
    put(cache, config, 1)
    fill(disk, 1 << 20)
    with pytest.raises(CacheFullError):
        cache.compact(config)
    assert values(cache, config) == {1}
    empty(disk)
    assert cache.compact(config).num_embeddings == 200


def test_compaction_that_runs_out_midway(disk, cache, config, monkeypatch):
    """Half a copy is removed at once, and its space is there again."""
    put(cache, config, 1)
    monkeypatch.setattr("lmdbcache.storage.maintenance.compaction.check_room", lambda *_: None)
    fill(disk, 1 << 20)
    free = generations.free_bytes(disk)
    with pytest.raises(CacheFullError):
        cache.compact(config)
    assert generations.free_bytes(disk) == free
    assert [path.name for path in cache.path(config).glob("gen-*")] == ["gen-000001"]
    assert values(cache, config) == {1}
    empty(disk)
    assert cache.compact(config).num_embeddings == 200
    assert values(cache, config) == {1}


def test_table_of_offsets(disk, cache, config, monkeypatch):
    """It is a cache of a cache: without room for it everything is read all the same."""
    put(cache, config, 1)
    monkeypatch.setattr(value_table, "_READ_AT_ONCE", 10)
    fill(disk, 0)
    assert values(cache, config) == {1}
    assert not list(cache.path(config).rglob("*offsets-*"))

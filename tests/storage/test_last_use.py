"""When a store was last read and written."""

from __future__ import annotations

import os
import pickle
import time

import numpy as np
import pytest
from small_disks import fill, small_disk
from storage.child_processes import NOBODY, in_fork, numbered, peer_process, read, write

from lmdbcache import EmbeddingCache
from lmdbcache.storage import last_use

MARKER = last_use.LAST_USE_NAME
NAMES = ["video_00001:dog", "video_00002:drum"]
DAY = 86400


@pytest.fixture(autouse=True)
def _nothing_touched_yet():
    last_use._touched.clear()


def age(path):
    return time.time() - path.stat().st_mtime


@pytest.fixture
def is_of_this_test():
    """Whether a file was touched since the test began; file systems' clocks are coarse."""
    began = time.time() - 1
    return lambda path: path.stat().st_mtime >= began


def make_older(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_reading_is_a_use_and_looking_is_none(filled, config, is_of_this_test):
    """info, stores, coverage and writing leave no mark; a reader does when it is closed."""
    store = filled.path(config)
    assert filled.info(config).last_used is None
    filled.stores()
    filled.coverage(config, NAMES)
    write(filled.root, config, numbered(0, 3, 8))
    assert not (store / MARKER).exists()
    with filled.reader(config) as reader:
        assert len(reader) == 23
        assert not (store / MARKER).exists()
    assert is_of_this_test(store / MARKER)
    info = filled.info(config)
    assert info.last_used.timestamp() == pytest.approx((store / MARKER).stat().st_mtime, abs=1)
    assert info.last_touched == max(info.last_used, info.last_written)


def test_touched_once_an_hour(filled, config, monkeypatch, is_of_this_test):
    """Within the hour a process looks at nothing; after it the marker moves."""
    store = filled.path(config)
    read(filled.root, config, NAMES)
    make_older(store / MARKER, 3 * DAY)
    read(filled.root, config, NAMES)
    assert age(store / MARKER) > 2 * DAY
    last_use._touched[store] -= 3601
    read(filled.root, config, NAMES)
    assert is_of_this_test(store / MARKER)


def test_another_process_does_not_write_again(filled, config, is_of_this_test):
    """A marker that is minutes old is left alone; an old one is moved by any process."""
    marker = filled.path(config) / MARKER
    read(filled.root, config, NAMES)
    make_older(marker, 600)
    with peer_process() as peer:
        peer.call(read, filled.root, config, NAMES)
    assert age(marker) > 500
    make_older(marker, 3 * DAY)
    with peer_process() as peer:
        peer.call(read, filled.root, config, NAMES)
    assert is_of_this_test(marker)


def test_closing_a_reader_that_was_open_for_days_counts(filled, config, is_of_this_test):
    """What was read for days was last used when it was closed."""
    store = filled.path(config)
    read(filled.root, config, NAMES)
    with filled.reader(config) as reader:
        len(reader)
        make_older(store / MARKER, 3 * DAY)
        last_use._touched[store] -= 3 * DAY
    assert is_of_this_test(store / MARKER)


def test_readers_pickle_with_it(filled, config):
    """A reader that doesn't count keeps that in a worker."""
    from lmdbcache import EmbeddingReader

    reader = EmbeddingReader(filled.path(config), config, track_usage=False)
    with pickle.loads(pickle.dumps(reader)) as copy:
        assert len(copy) == 20
    assert not (filled.path(config) / MARKER).exists()


def test_a_marker_that_can_not_be_written_is_no_error(filled, config, tmp_path):
    """Another user's folder, a folder in its place, a full disk: reading goes on."""
    store = filled.path(config)
    (store / MARKER).mkdir()
    read(filled.root, config, NAMES)
    with small_disk(tmp_path / "disk", 32) as disk:
        cache = EmbeddingCache(disk / "cache")
        write(cache.root, config, {name: np.ones(8) for name in NAMES})
        fill(disk, 0)
        assert read(cache.root, config, NAMES).sum() == 16


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_a_reader_without_permission_leaves_no_mark(tmp_path_factory, config):
    """A user who may only read can, and last_used stays unknown."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        cache = EmbeddingCache(folder)
        write(cache.root, config, {name: np.ones(8) for name in NAMES})
        assert in_fork(lambda: read(cache.root, config, NAMES).sum(), user=NOBODY) == 16
        assert cache.info(config).last_used is None


def test_last_written_is_the_newest_commit(filled, config):
    """Reading and compacting don't move it, a commit does."""
    data = next(filled.path(config).glob("gen-*/data.mdb"))
    make_older(data, 5 * DAY)
    before = filled.info(config).last_written
    read(filled.root, config, NAMES)
    filled.compact(config)
    assert filled.info(config).last_written == before
    write(filled.root, config, numbered(0, 1, 8))
    assert (filled.info(config).last_written - before).days >= 4


def test_unreadable_times(filled, config):
    """A damaged store has its times, too; an absurd time is none."""
    store = filled.path(config)
    read(filled.root, config, NAMES)
    next(store.glob("gen-*/data.mdb")).write_bytes(b"")
    (info,) = filled.stores()
    assert info.damage
    assert info.last_used is not None
    (store / "CURRENT").write_bytes(b"\xff")
    (info,) = filled.stores()
    assert (info.last_written, info.last_used is None) == (None, False)
    assert info.to_dict()["last_written"] is None

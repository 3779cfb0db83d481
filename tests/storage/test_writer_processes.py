"""Writers in several processes: in turn, killed, forked, and without permission."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_disks import small_disk
from storage.child_processes import (
    NOBODY,
    Peer,
    in_fork,
    numbered,
    peer_process,
    write,
    write_in_turns,
)

from lmdbcache import EmbeddingCache
from lmdbcache.errors import CacheFullError, ReadOnlyCacheError, WriterClosedError

ONES = np.ones(4, np.float32)


@pytest.fixture
def public_root():
    """A cache root that other users reach, unlike pytest's own folders."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder / "cache"
    shutil.rmtree(folder)


def assert_holds_numbers(cache, config, last):
    with cache.reader(config) as reader:
        assert list(reader) == list(numbered(0, last))
        for n, embedding in enumerate(reader.values()):
            assert (embedding == n).all()
    assert cache.verify(config).is_sound


def test_processes_write_in_turn(cache, config):
    """Three spawned writers and this one fill one new store; nothing is lost or torn."""
    peers = [Peer() for _ in range(3)]
    try:
        for index, peer in enumerate(peers):
            first = index * 200
            peer.start(write_in_turns, cache.root, config, first, first + 240, 8)
        write_in_turns(cache.root, config, 600, 800, 8)
        for peer in peers:
            peer.answer()
    finally:
        for peer in peers:
            peer.end()
    assert_holds_numbers(cache, config, 800)


def test_writer_killed_before_its_first_commit_leaves_room_for_another(cache, config):
    """A generation that nothing names is swept away by the next writer."""
    folder = cache.path(config)
    (folder / "gen-000001").mkdir(parents=True)
    (folder / "gen-000001" / "data.mdb").write_bytes(b"half")
    assert config not in cache
    write(cache.root, config, numbered(0, 3))
    assert_holds_numbers(cache, config, 3)


def test_writer_does_not_skip_what_was_cleared_meanwhile(cache, config):
    """Stored once and cleared by another process is not stored: it is written again."""
    items = numbered(0, 5, size=4)
    with cache.writer(config) as writer:
        writer.put_batch(items, items.values())
        writer.commit()
        in_fork(lambda: cache.clear(config) and None)
        assert writer.put("clip_000001:x", ONES)
        assert writer.put_batch(items, np.stack(list(items.values()))) == 4
        writer.commit()
        # The store was made again and compacted elsewhere: the writer follows.
        in_fork(lambda: cache.compact(config) and None)
        assert not writer.put("clip_000002:x", ONES)
    assert len(cache.reader(config)) == 5


def test_forked_child_may_not_use_the_writer(cache, config):
    """A writer belongs to its process; the parent's pending embeddings are untouched."""

    def use_in_child():
        for use in (lambda: writer.put("b:x", ONES), writer.commit):
            with pytest.raises(WriterClosedError):
                use()
        writer.close()
        with EmbeddingCache(cache.root).writer(config) as own:
            own.put("child:x", ONES)
        return own.num_written

    with cache.writer(config) as writer:
        writer.put("a:x", ONES)
        writer.commit()
        writer.put("pending:x", ONES)
        assert in_fork(use_in_child) == 1
    assert list(cache.reader(config)) == ["a:x", "child:x", "pending:x"]


def test_fork_while_another_thread_writes(cache, config):
    """A child forked in the middle of commits neither hangs nor holds the writer's lock."""
    stop = threading.Event()

    def write_on():
        with cache.writer(config, commit_records=2, on_duplicate="overwrite") as writer:
            while not stop.is_set():
                writer.put_batch(["a:x", "b:x"], np.ones((2, 4)))

    cache.writer(config).close()
    thread = threading.Thread(target=write_on)
    thread.start()
    try:
        while config not in cache:
            time.sleep(0.001)
        for n in range(8):
            in_fork(lambda n=n: write(cache.root, config, {f"{n}:x": ONES}))
    finally:
        stop.set()
        thread.join()
    assert len(cache.reader(config)) == 10
    assert cache.verify(config).is_sound


def test_child_forked_within_a_commit_does_not_keep_the_lock(cache, config):
    """A sleeping child of a writing process doesn't block other writers."""
    stop = threading.Event()

    def write_on():
        with cache.writer(config, commit_records=1, on_duplicate="overwrite") as writer:
            while not stop.is_set():
                writer.put("a:x", ONES)

    thread = threading.Thread(target=write_on)
    thread.start()
    sleepers = []
    try:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            sleepers.append(pid)
        stop.set()
        thread.join()
        with peer_process() as peer:
            assert peer.call(write, cache.root, config, {"b:x": ONES}) == 1
    finally:
        stop.set()
        thread.join()
        for pid in sleepers:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_user_without_permission_is_told_so(public_root, config):
    """Neither a new nor an existing store of somebody else is written; both stay as they are."""
    cache = EmbeddingCache(public_root)
    write(public_root, config, numbered(0, 3))

    def try_to_write():
        for each in (config, config.replace(duration=9)):
            writer = cache.writer(each)
            writer.put("b:x", np.ones(64))
            with pytest.raises(ReadOnlyCacheError):
                writer.commit()
            writer.discard()
            writer.close()
        for use in (lambda: cache.compact(config), lambda: cache.clear(config)):
            with pytest.raises(ReadOnlyCacheError):
                use()

    in_fork(try_to_write, user=NOBODY)
    assert_holds_numbers(cache, config, 3)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_failed_attempt_to_write_leaves_readers_alone(public_root, config):
    """A writer that may enter the folder but not write data.mdb doesn't break open readers."""
    cache = EmbeddingCache(public_root)
    write(public_root, config, numbered(0, 3))
    for path in (public_root, *public_root.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    next(public_root.rglob("data.mdb")).chmod(0o644)

    def try_to_write():
        with cache.reader(config) as reader:
            assert len(reader) == 3
            writer = cache.writer(config)
            writer.put("b:x", np.ones(64))
            with pytest.raises(ReadOnlyCacheError):
                writer.commit()
            writer.discard()
            return len(reader)

    assert in_fork(try_to_write, user=NOBODY) == 3


def test_root_that_is_a_file_is_refused(tmp_path, config):
    """A file where the cache root should be is named."""
    (tmp_path / "cache").write_text("")
    writer = EmbeddingCache(tmp_path / "cache").writer(config)
    writer.put("a:x", ONES)
    with pytest.raises(ReadOnlyCacheError):
        writer.commit()
    writer.discard()


def test_root_that_can_not_be_made_is_refused(config):
    """In /proc making a folder fails as if one above it had just been removed: no endless loop."""
    writer = EmbeddingCache("/proc/cache").writer(config)
    writer.put("a:x", ONES)
    with pytest.raises(ReadOnlyCacheError):
        writer.commit()
    writer.discard()


@pytest.fixture
def disk(tmp_path):
    """A file system of 40 MiB."""
    with small_disk(tmp_path / "disk", 40) as folder:
        yield folder


def test_full_disk_is_an_error_that_can_be_mended(disk, config):
    """A commit without room says so, keeps what is pending, and works once there is room."""
    cache = EmbeddingCache(disk / "cache")
    items = numbered(0, 100)
    write(cache.root, config, numbered(0, 50))
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(39 << 20))
    with cache.writer(config) as writer:
        writer.put_batch(items, items.values())
        for _ in range(2):
            with pytest.raises(CacheFullError):
                writer.commit()
        assert len(cache.reader(config)) == 50
        ballast.unlink()
        assert writer.commit() == 50
    assert_holds_numbers(cache, config, 100)


def test_full_disk_without_a_lock_file_is_no_crash(disk, config):
    """LMDB would die of SIGBUS; we refuse, and read once there is room."""
    cache = EmbeddingCache(disk / "cache")
    write(cache.root, config, numbered(0, 50))
    next(cache.path(config).rglob("lock.mdb")).unlink()
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass

    def read_and_write():
        with pytest.raises(CacheFullError):
            len(cache.reader(config))
        with pytest.raises(CacheFullError):
            cache.writer(config)
        new = cache.writer(config.replace(duration=9))
        new.put("a:x", ONES)
        with pytest.raises(CacheFullError):
            new.commit()
        new.discard()

    in_fork(read_and_write)
    ballast.unlink()
    assert len(cache.reader(config)) == 50

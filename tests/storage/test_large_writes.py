"""Much data at once: commits in the background, and batches that aren't copied."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from lmdbcache import CacheConfig
from lmdbcache.errors import CacheFullError, InvalidEmbeddingError
from lmdbcache.storage import writer as writing
from lmdbcache.storage.gather import BatchBuffers

SIZE = 1 << 18  # float32: 1 MiB
NAMES = [f"{number:02d}:x" for number in range(12)]


def embedding(number):
    return np.full(SIZE, number, np.float32)


@pytest.fixture
def early(monkeypatch):
    """Commits of 2 MiB and more that `put` starts go to the background."""
    monkeypatch.setattr(writing, "_BACKGROUND_FROM_BYTES", 2 << 20)


@pytest.fixture
def full_disk(monkeypatch):
    """A switch that makes the disk full."""
    is_full = threading.Event()
    check_room = writing.check_room

    def check(store, needed, purpose):
        if is_full.is_set():
            raise CacheFullError("0 MiB free")
        check_room(store, needed, purpose)

    monkeypatch.setattr(writing, "check_room", check)
    return is_full


def assert_holds(cache, config, names):
    with cache.reader(config) as reader:
        assert sorted(reader) == sorted(names)
        for name in names:
            assert (reader[name] == int(name[:2])).all()
    assert cache.verify(config).is_sound


@pytest.mark.usefixtures("early")
def test_background_commits_lose_nothing(cache, config):
    """What a thread writes is stored, counted once, and known as stored meanwhile."""
    with cache.writer(config, commit_bytes=3 << 20) as writer:
        for number, name in enumerate(NAMES):
            assert writer.put(name, embedding(number))
            assert not writer.put(name, embedding(99))
            assert writer.num_written + writer.num_pending == number + 1
        assert writer.commit() <= len(NAMES)
        assert (writer.num_written, writer.num_pending) == (len(NAMES), 0)
    assert_holds(cache, config, NAMES)


@pytest.mark.usefixtures("early")
def test_failed_background_commit_is_raised_and_tried_again(cache, config, full_disk):
    """Its embeddings are kept, the next call tells, and the next commit with room writes all."""
    with cache.writer(config, commit_bytes=3 << 20) as writer:
        full_disk.set()
        stored = iter(enumerate(NAMES))
        for number, name in stored:
            writer.put(name, embedding(number))
            if writer._in_background is not None:
                break
        with pytest.raises(CacheFullError):
            writer.commit()
        with pytest.raises(CacheFullError):
            for number, name in stored:
                writer.put(name, embedding(number))
        assert writer.num_written == 0
        full_disk.clear()
        for number, name in stored:
            writer.put(name, embedding(number))
        writer.commit()
        assert writer.num_written == len(NAMES)
    assert_holds(cache, config, NAMES)


@pytest.mark.usefixtures("early")
def test_exception_in_the_block_waits_for_the_background(cache, config):
    """What was handed to the thread is committed, what came later is discarded."""
    with pytest.raises(RuntimeError), cache.writer(config, commit_bytes=3 << 20) as writer:
        for number, name in enumerate(NAMES[:4]):
            writer.put(name, embedding(number))
        raise RuntimeError
    assert_holds(cache, config, NAMES[:3])
    assert not [thread for thread in threading.enumerate() if thread.name == "lmdbcache-commit"]


def test_interpreter_that_ends_waits_for_the_background(cache, config):
    """A program that forgets to close keeps what was handed over."""
    program = f"""
import numpy as np, sys
from lmdbcache import EmbeddingCache, CacheConfig
from lmdbcache.storage import writer as writing
writing._BACKGROUND_FROM_BYTES = 0
writer = EmbeddingCache({str(cache.root)!r}).writer(CacheConfig(), commit_records=3)
for number in range(3):
    writer.put(f"{{number:02d}}:x", np.full({SIZE}, number, np.float32))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    assert_holds(cache, CacheConfig(), NAMES[:3])


@pytest.mark.parametrize("as_array", [True, False])
def test_large_batch_is_committed_before_the_caller_has_it_back(cache, config, as_array):
    """Nothing of the caller's memory is left pending: it may be changed at once."""
    rows = np.stack([embedding(number) for number in range(10)])
    with cache.writer(config) as writer:
        assert writer.put_batch(NAMES[:10], rows if as_array else list(rows)) == 10
        assert (writer.num_written, writer.num_pending) == (10, 0)
        rows[:] = 77
    assert_holds(cache, config, NAMES[:10])


def test_large_batch_that_fails_is_kept_as_it_was(cache, config, full_disk):
    """After an error the caller may change its memory; the next commit writes the old values."""
    rows = np.stack([embedding(number) for number in range(10)])
    with cache.writer(config) as writer:
        full_disk.set()
        with pytest.raises(CacheFullError):
            writer.put_batch(NAMES[:10], rows)
        rows[:] = 77
        full_disk.clear()
        assert writer.commit() == 10
    assert_holds(cache, config, NAMES[:10])


def test_bad_embedding_in_a_large_batch_is_named(cache, config):
    """Those before it are kept for the next commit, in memory of their own."""
    rows = np.stack([embedding(number) for number in range(10)])
    rows[6, 5] = np.nan
    with cache.writer(config) as writer:
        with pytest.raises(InvalidEmbeddingError, match="06:x"):
            writer.put_batch(NAMES[:10], rows)
        rows[:] = 77
    assert_holds(cache, config, NAMES[:6])


def test_buffer_comes_back_with_its_last_user_only():
    """Memory of a batch is lent again when no array, slice or view of it is left."""
    buffers = BatchBuffers()
    first = buffers.take(4 << 20)
    address, part = first.ctypes.data, first[100:200].view(np.float32)
    del first
    gc.collect()
    second = buffers.take(4 << 20)
    assert second.ctypes.data != address
    del part
    assert buffers.take(4 << 20).ctypes.data == address


def test_at_most_one_unused_buffer_is_kept():
    """A loop that has ended leaves the memory of one batch, not of all that were alive."""
    buffers = BatchBuffers()
    alive = [buffers.take(4 << 20) for _ in range(3)]
    alive.clear()
    assert len(buffers._free) == 1
    buffers.take(1 << 20)
    assert len(buffers._free) == 1  # another size replaced it


@pytest.mark.usefixtures("early")
def test_close_tries_again_what_failed_in_the_background(cache, config, full_disk):
    """A disk that has room again by then: all is stored, and nothing is raised."""
    writer = cache.writer(config, commit_bytes=3 << 20)
    full_disk.set()
    for number in range(3):
        writer.put(NAMES[number], embedding(number))
    writer._in_background.wait()
    full_disk.clear()
    writer.close()
    assert_holds(cache, config, NAMES[:3])


@pytest.mark.usefixtures("early")
def test_dropped_writer_warns_of_a_failed_background_commit(cache, config, full_disk):
    """Nothing is lost without a word."""
    writer = cache.writer(config, commit_bytes=3 << 20)
    full_disk.set()
    for number in range(3):
        writer.put(NAMES[number], embedding(number))
    writer._in_background.wait()
    with pytest.warns(ResourceWarning, match="3 pending"):
        del writer
        gc.collect()


@pytest.mark.usefixtures("early")
def test_interrupted_close_waits_for_the_background(cache, config, monkeypatch):
    """Ctrl-C in close never closes LMDB under a commit: what was handed over is stored."""
    begun = threading.Event()
    write = writing.EmbeddingWriter._write

    def slowly(self, batch):
        begun.set()
        time.sleep(0.3)
        return write(self, batch)

    monkeypatch.setattr(writing.EmbeddingWriter, "_write", slowly)
    writer = cache.writer(config, commit_bytes=3 << 20)
    for number in range(3):
        writer.put(NAMES[number], embedding(number))
    assert begun.wait(240)
    timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    timer.join()
    assert_holds(cache, config, NAMES[:3])


@pytest.mark.usefixtures("early")
def test_background_commit_whose_start_was_interrupted_is_made_up_for(cache, config, monkeypatch):
    """Ctrl-C before the thread has begun loses nothing."""

    def interrupted(_):
        raise KeyboardInterrupt

    writer = cache.writer(config, commit_bytes=3 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for number in range(3):
                writer.put(NAMES[number], embedding(number))
    writer.close()
    assert_holds(cache, config, NAMES[:3])

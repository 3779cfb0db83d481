"""What a crash leaves in a store's folder, and what is never taken for that."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import signal
import time

import numpy as np
import pytest
from storage.child_processes import compact_until_killed, numbered, peer_process, write

from lmdbcache import EmbeddingCache
from lmdbcache.cache import Source, write_sources
from lmdbcache.cache.records import RECORD_FILES
from lmdbcache.errors import StorageError
from lmdbcache.storage import find_leftovers, remove_leftovers, write_lock, writers_of
from lmdbcache.storage.maintenance.leftovers import is_abandoned


def make_old(path):
    os.utime(path, (time.time() - 7200,) * 2)


@pytest.fixture
def store(filled, config):
    return filled.path(config)


def test_a_sound_store_has_none(filled, config, store):
    """Nothing of a store that is read and written is a leftover, its failures.json included."""
    (store / "failures.json").write_text("{}")
    with filled.reader(config) as reader:
        len(reader)
    assert find_leftovers(store) == []
    assert remove_leftovers(store) == []


def test_what_killed_processes_leave(filled, config, store):
    """Generations nobody names, temporary files and old indexes go; all else stays."""
    live = store / "gen-000001"
    shutil.copytree(live, store / "gen-000002")
    for path in (
        store / ".CURRENT.4711-1.tmp",
        store / ".failures.json.4711-1.tmp",
        live / ".offsets-3.4711-1.tmp",
        live / "offsets-0",
        live / "offsets-999",
        store / "notes.txt",
    ):
        path.write_bytes(b"x")
        make_old(path)
    (store / ".failures.json.4712-1.tmp").write_bytes(b"being written")
    found = find_leftovers(store)
    names = {
        *("gen-000002", "offsets-0", ".CURRENT.4711-1.tmp", ".failures.json.4711-1.tmp"),
        ".offsets-3.4711-1.tmp",
    }
    assert {leftover.path.name for leftover in found} == names
    assert sum(leftover.size_bytes for leftover in found) >= (live / "data.mdb").stat().st_size
    assert remove_leftovers(store) == found
    assert not any(leftover.path.exists() for leftover in found)
    assert (store / "notes.txt").exists()
    assert (live / "offsets-999").exists()
    assert find_leftovers(store) == []
    assert filled.verify(config).is_sound


def test_a_generation_that_is_a_link(filled, store, tmp_path):
    """The link goes, not what it leads to."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data.mdb").write_bytes(b"mine")
    (store / "gen-000007").symlink_to(tmp_path / "elsewhere")
    (leftover,) = remove_leftovers(store)
    assert leftover.path.name == "gen-000007"
    assert (tmp_path / "elsewhere" / "data.mdb").read_bytes() == b"mine"


def test_nothing_is_touched_while_somebody_writes(filled, config, store):
    """Half a copy of a living compaction isn't a leftover."""
    (store / "gen-000002").mkdir()
    with write_lock(store):
        assert writers_of(store)
        assert find_leftovers(store) == []
        with pytest.raises(StorageError):
            remove_leftovers(store)
    assert not writers_of(store)
    assert len(remove_leftovers(store)) == 1


def test_a_fork_while_somebody_looks_keeps_no_writer_out(store, monkeypatch):
    """A child that is forked while its parent asks who writes doesn't hold the lock for life."""
    lock, children = fcntl.flock, []

    def lock_and_fork(descriptor, kind):
        lock(descriptor, kind)
        if not children:
            children.append(os.fork())
            if children == [0]:
                time.sleep(60)
                os._exit(0)

    monkeypatch.setattr(fcntl, "flock", lock_and_fork)
    try:
        assert not writers_of(store)
        with write_lock(store, wait=False):
            pass
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


@pytest.mark.parametrize("is_cut", [False, True])
def test_what_cannot_be_read_is_no_leftover(filled, store, is_cut):
    """Without CURRENT and meta pages the values may still be all there is of them."""
    (store / "CURRENT").unlink()
    (store / "gen-000001" / "committed").unlink()
    path = store / "gen-000001" / "data.mdb"
    raw = bytearray(path.read_bytes())
    raw[: 2 * mmap.PAGESIZE] = bytes(2 * mmap.PAGESIZE)
    path.write_bytes(raw[: 2 * mmap.PAGESIZE] if is_cut else raw)
    assert is_abandoned(store) == is_cut
    assert bool(remove_leftovers(store)) == is_cut
    assert path.exists() != is_cut


def test_a_store_that_was_removed_by_half(filled, config, store):
    """Killed after the generations were gone: what is left of the store is a leftover."""
    with filled.reader(config) as reader:
        reader.get_batch(list(reader))
    write_sources(store, [("a:b", None, b"12345678", Source("a.wav", 1, 1, None))])
    (store / "CURRENT").unlink()
    shutil.rmtree(store / "gen-000001")
    assert remove_leftovers(store, RECORD_FILES)
    assert not store.exists()


def test_damaged_stores_keep_everything(filled, store):
    """Where CURRENT is garbage or its generation is gone, repair may need the others."""
    shutil.copytree(store / "gen-000001", store / "gen-000002")
    for current in (b"\xff\xfe", b"gen-000009\n"):
        (store / "CURRENT").write_bytes(current)
        assert find_leftovers(store) == remove_leftovers(store) == []
    assert (store / "gen-000002" / "data.mdb").exists()


def test_a_store_that_only_lost_current_is_kept(filled, store):
    """Embeddings that one file brings back aren't removed; without any the folder goes."""
    (store / "CURRENT").unlink()
    assert not is_abandoned(store)
    assert find_leftovers(store) == remove_leftovers(store) == []
    (store / "gen-000001" / "data.mdb").write_bytes(b"")
    assert is_abandoned(store)
    (leftover,) = remove_leftovers(store)
    assert leftover.path == store
    assert not store.exists()


def test_strangers_are_never_abandoned_stores(tmp_path, store):
    """A folder of another name, with other files, empty, or a link stays."""
    for name, files in (
        ("photos", ["writer.lock"]),
        ("mine-0123456789abcdef", ["writer.lock", "thesis.tex"]),
        ("empty-0123456789abcdef", []),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in files:
            (folder / file).touch()
        assert not is_abandoned(folder)
    (tmp_path / "link-0123456789abcdef").symlink_to(store)
    assert not is_abandoned(tmp_path / "link-0123456789abcdef")


def test_killed_compactions(cache, config):
    """After kill -9 of compactions the leftovers are found and removed, and nothing is lost."""
    write(cache.root, config, numbered(0, 300, 2048))
    store, seen = cache.path(config), 0
    for number in range(40):
        if seen and number >= 6:
            break
        with peer_process() as peer:
            peer.start(compact_until_killed, cache.root, config)
            before = (store / "CURRENT").read_text()
            while (store / "CURRENT").read_text() == before:
                time.sleep(0.002)
            time.sleep(0.003 * (number % 8))
            os.kill(peer.process.pid, signal.SIGKILL)
            peer.process.join()
        found = find_leftovers(store)
        seen += len(found)
        assert remove_leftovers(store) == found
        assert len(list(store.glob("gen-*"))) == 1
    assert seen
    assert cache.verify(config).is_sound
    with cache.reader(config) as reader:
        assert len(reader) == 300


def test_a_killed_maker_of_a_store(cache, config):
    """A folder with a lock and a generation without embeddings is removed as a whole."""
    store = cache.path(config)
    (store / "gen-000001").mkdir(parents=True)
    (store / "gen-000001" / "data.mdb").write_bytes(b"half")
    (store / "writer.lock").touch()
    (leftover,) = find_leftovers(store)
    assert leftover.what == "a store that was never finished"
    remove_leftovers(store)
    assert not store.exists()
    with EmbeddingCache(cache.root).writer(config) as writer:
        writer.put("a:b", np.ones(3))
    assert cache.verify(config).is_sound


def test_a_current_that_is_half_written(cache, config):
    """The next maker of the store removes it, as it holds the lock that the killed one held."""
    store = cache.path(config)
    (store / "gen-000001").mkdir(parents=True)
    (store / ".CURRENT.4711-1.tmp").write_bytes(b"gen-0")
    (store / ".failures.json.4711-1.tmp").write_bytes(b"being written")
    with EmbeddingCache(cache.root).writer(config) as writer:
        writer.put("a:b", np.ones(3))
    assert [path.name for path in store.glob(".*")] == [".failures.json.4711-1.tmp"]

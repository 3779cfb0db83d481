"""data.mdb truncated, replaced or removed by something else while a reader is open."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from storage.child_processes import in_fork, numbered, peer_process, write

from lmdbcache import EmbeddingCache
from lmdbcache.errors import IntegrityError
from lmdbcache.files import is_temporary
from lmdbcache.storage import MappedFile, write_lock

NUMBERS = numbered(0, 400, 768)


@pytest.fixture
def store(cache, config):
    write(cache.root, config, NUMBERS)
    return cache


@pytest.fixture
def data(store, config):
    return next(store.path(config).rglob("data.mdb"))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("use", ["batch", "selection", "out", "large", "refresh", "reopen"])
def test_truncation_under_a_live_reader_is_an_error(cache, config, share, use):
    """The next batch, refresh or opening finds the file shorter than it was: no SIGBUS."""
    numbers = NUMBERS if use != "large" else numbered(0, 12, 1 << 17)
    write(cache.root, config, numbers)
    names = list(numbers)

    def read():
        data = next(cache.path(config).rglob("data.mdb"))
        reader = cache.reader(config)
        selection = reader.select(names)
        out = np.empty((len(names), numbers[names[0]].size), np.float32)
        assert (reader.get_batch(names) == selection.get_batch(range(len(names)))).all()
        os.truncate(data, int(data.stat().st_size * share))
        attempts = {
            "batch": lambda: reader.get_batch(names),
            "large": lambda: reader.get_batch(names),
            "selection": lambda: selection.get_batch(list(range(len(names)))),
            "out": lambda: selection.get_batch(range(len(names)), out),
            "refresh": reader.refresh,
            "reopen": lambda: (reader.close(), len(reader)),
        }
        with pytest.raises(IntegrityError):
            attempts[use]()
        return True

    assert in_fork(read)  # where a SIGBUS would end it


def test_file_replaced_by_a_rename_is_found_at_refresh(store, config, data):
    """Reading goes on from what was opened; `refresh` moves to the file that is there now."""
    other = EmbeddingCache(store.root.parent / "other")
    write(other.root, config, {name: value + 1000 for name, value in NUMBERS.items()})
    names = list(NUMBERS)
    with store.reader(config) as reader:
        assert reader.get_batch(names)[7, 0] == 7
        # The whole generation, as whoever restores a copy should do it.
        shutil.copytree(other.path(config) / data.parent.name, data.parent.with_name("copied"))
        data.parent.rename(data.parent.with_name("moved"))
        data.parent.with_name("copied").rename(data.parent)
        assert reader.get_batch(names)[7, 0] == reader[names[7]][0] == 7
        assert reader.refresh()
        assert reader.get_batch(names)[7, 0] == reader[names[7]][0] == 1007
    assert store.verify(config).is_sound


def test_store_removed_under_a_live_reader(store, config, data):
    """What is mapped stays readable; a refresh says that nothing is stored."""
    names = list(NUMBERS)
    with store.reader(config) as reader:
        assert len(reader) == 400
        shutil.rmtree(store.path(config))
        assert reader.get_batch(names)[7, 0] == 7
        assert "new:x" not in reader
        with pytest.raises(FileNotFoundError, match="nothing is stored"):
            reader.refresh()
        assert reader[names[7]][0] == 7
        with peer_process() as peer:
            peer.call(write, store.root, config, numbered(500, 510))
        assert reader.refresh()
        assert list(reader) == list(numbered(500, 510))


def test_growing_file_is_never_called_truncated(store, config):
    """Refreshing and reading beside a writer that makes the file longer raises nothing."""
    names = list(NUMBERS)
    with store.reader(config) as reader, peer_process() as peer:
        peer.start(grow, store.root, config)
        while not peer._connection.poll(0):
            reader.refresh()
            assert reader.get_batch(names)[7, 0] == 7
        peer.answer()


def grow(root, config):
    with EmbeddingCache(root).writer(config, commit_records=10) as writer:
        for name, value in numbered(1000, 1800, 768).items():
            writer.put(name, value)


@pytest.mark.parametrize("cut", [1, 4096, 1 << 20])
def test_a_mapped_file_notices_any_cut(store, data, cut):
    """However little is missing: reading beyond the end would end the process."""
    file = MappedFile(data)
    file.check_whole()
    os.truncate(data, data.stat().st_size - cut)
    with pytest.raises(IntegrityError):
        file.gather(np.array([0]), 4)


def test_a_lock_file_that_was_replaced_is_locked_anew(store, config):
    """Whoever waited for a lock on a file that is gone doesn't take it for the store's."""
    folder = store.path(config)
    path, held, left = folder / "writer.lock", threading.Event(), threading.Event()

    def hold():
        with write_lock(folder):
            held.set()
            left.wait(60)

    with path.open("rb") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        thread = threading.Thread(target=hold)
        thread.start()
        inode = os.fstat(ours.fileno()).st_ino
        while not any(
            "->" in line and f":{inode} " in line
            for line in Path("/proc/locks").read_text().splitlines()
        ):
            pass
        path.unlink()
        path.touch()
    try:
        assert held.wait(60)
        with path.open("rb") as new, pytest.raises(BlockingIOError):
            fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        left.set()
        thread.join()


def test_a_generation_is_published_so_that_a_power_cut_is_fine(cache, config, monkeypatch):
    """`CURRENT` is on the disk before it has its name, and its name before the commit returns."""
    done = []
    real_fsync, real_replace = os.fsync, os.replace

    def shown(path):
        name = Path(path).name
        return "temporary" if is_temporary(name) else name

    def fsync(descriptor):
        done.append(shown(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(source, target, **options):
        done.append(f"{shown(source)} → {shown(target)}")
        real_replace(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        write(cache.root, config, numbered(0, 3))
    folder = cache.path(config)
    steps = ["gen-000001", "temporary", "temporary → CURRENT", folder.name, cache.root.name]
    assert [step for step in done if step in steps] == steps

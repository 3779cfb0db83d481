"""data.mdb truncated, replaced or removed by something else while a reader is open."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from storage.child_processes import in_fork, numbered, peer_process, write

from lmdbcache import EmbeddingCache
from lmdbcache.errors import IntegrityError

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
        with pytest.raises(IntegrityError, match=r"truncated|LMDB file") as caught:
            attempts[use]()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "lmdbcache repair" in in_fork(read)


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
        for name, value in numbered(1000, 3000, 768).items():
            writer.put(name, value)

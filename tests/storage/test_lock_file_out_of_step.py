"""A lock file that a killed process has left without the number of the newest commit."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from storage.child_processes import hold, let_go, numbered, peer_process, write

from lmdbcache.errors import StorageError
from lmdbcache.storage import opening

NUMBERS = numbered(0, 20)


@pytest.fixture
def lock_file(cache, config):
    """Of a store that was compacted: its first meta page has no commit."""
    write(cache.root, config, NUMBERS)
    cache.compact(config)
    return next(cache.path(config).rglob("lock.mdb"))


def forget(lock_file):
    content = bytearray(lock_file.read_bytes())
    # On 64-bit Linux: magic and format, a mutex of 40 bytes, the newest transaction.
    assert int.from_bytes(content[48:56], "little") == 1
    with lock_file.open("r+b") as file:
        file.seek(48)
        file.write(bytes(8))


@pytest.mark.parametrize("use", ["write", "compact"])
def test_nobody_takes_a_store_for_empty(cache, config, lock_file, monkeypatch, use):
    """While somebody holds such a lock file: our error, nothing lost; afterwards all is there."""
    monkeypatch.setattr(opening, "_SECONDS_FOR_LOCK_FILE", 0.2)

    def put():
        with cache.writer(config) as writer:
            writer.put("new:x", np.ones_like(next(iter(NUMBERS.values()))))

    uses = {"write": put, "compact": lambda: cache.compact(config)}
    with peer_process() as peer:
        assert peer.call(hold, cache.root, config) == 20
        forget(lock_file)
        with cache.reader(config) as reader:
            assert len(reader) == 20
        with pytest.raises(StorageError) as caught:
            uses[use]()
        assert str(peer.process.pid) in str(caught.value)
        peer.call(let_go)
        uses[use]()
    with cache.reader(config) as reader:
        assert set(NUMBERS) <= set(reader)
    assert cache.verify(config).is_sound


def test_opening_goes_on_as_soon_as_nobody_holds_it(cache, config, lock_file, monkeypatch):
    """Within the time that is waited, no error is seen."""
    monkeypatch.setattr(opening, "_SECONDS_FOR_LOCK_FILE", 240.0)
    with peer_process() as peer:
        peer.call(hold, cache.root, config)
        forget(lock_file)
        thread = threading.Thread(target=lambda: (time.sleep(0.3), peer.call(let_go)))
        thread.start()
        assert cache.compact(config).num_embeddings == 20
        thread.join()

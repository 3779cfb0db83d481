"""Compaction: smaller, sound, and beside readers and writers that go on."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from storage.child_processes import (
    in_fork,
    numbered,
    peer_process,
    read,
    write,
    write_in_turns,
)

from lmdbcache.errors import CacheFullError
from lmdbcache.storage import generations
from lmdbcache.storage.maintenance import compaction

NAMES = [f"{n:03d}:x" for n in range(400)]


@pytest.fixture
def loose(cache, config):
    """A store with free pages: 400 embeddings, all overwritten while a reader looked on."""
    with cache.writer(config, on_duplicate="overwrite") as writer:
        for number in range(3):
            with cache.reader(config) if number else cache.writer(config) as looker:
                if number:
                    len(looker)
                writer.put_batch(NAMES, np.full((400, 768), number))
                writer.commit()
    return cache


def files(cache, config):
    folder = cache.path(config)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_store_shrinks_and_keeps_every_value(loose, config):
    """Unused pages go; the values, their checksums and the metadata stay."""
    before = loose.info(config)
    result = loose.compact(config)
    after = loose.info(config)
    assert result.num_embeddings == after.num_embeddings == 400
    assert result.bytes_after < result.bytes_before / 1.5
    assert after.size_bytes < before.size_bytes / 1.5
    assert (before.creation_time, before.embedding_shape) == (
        after.creation_time,
        after.embedding_shape,
    )
    assert (loose.reader(config).get_batch(NAMES) == 2).all()
    assert loose.verify(config).is_sound


def test_generations_follow_each_other(loose, config):
    """The old generation is gone, and the new one has a lock file of its own."""
    old_lock = next(loose.path(config).rglob("lock.mdb")).stat().st_ino
    with loose.reader(config) as reader:
        len(reader)
        loose.compact(config)
        len(loose.reader(config))
        assert files(loose, config) == [
            "CURRENT",
            "gen-000002/checked",
            "gen-000002/committed",
            "gen-000002/data.mdb",
            "gen-000002/lock.mdb",
            "last_used",
            "writer.lock",
        ]
        assert next(loose.path(config).rglob("lock.mdb")).stat().st_ino != old_lock
    loose.compact(config)
    assert (loose.path(config) / "CURRENT").read_text() == "gen-000003\n"


def test_readers_go_on(loose, config):
    """Readers of this and another process keep their snapshot and move on when they look."""
    with peer_process() as peer, loose.reader(config) as reader:
        assert (reader.get_batch(NAMES) == 2).all()
        peer.call(read, loose.root, config, NAMES)
        loose.compact(config)
        assert (reader.get_batch(NAMES) == 2).all()
        assert peer.call(write, loose.root, config, {"new:x": np.zeros(768)}) == 1
        assert "new:x" in reader
        assert reader.path == loose.path(config)
        assert not reader.refresh()
        assert len(reader) == 401


def test_reader_sees_a_commit_after_a_compaction_of_another_process(loose, config):
    """A reader whose generation was replaced twice still finds new samples and new values."""
    with loose.reader(config) as reader:
        assert (reader[NAMES[0]] == 2).all()
        for _ in range(2):
            in_fork(lambda: loose.compact(config))
        in_fork(
            lambda: write(loose.root, config, {NAMES[0]: np.full(768, 9)}, on_duplicate="overwrite")
        )
        assert (reader[NAMES[0]] == 2).all()
        assert reader.refresh()
        assert (reader[NAMES[0]] == 9).all()


def test_writer_goes_on(loose, config):
    """A writer that was open before writes into the new generation, in the same process or not."""
    with loose.writer(config) as writer:
        writer.put("a:x", np.zeros(768))
        writer.commit()
        loose.compact(config)
        writer.put("b:x", np.zeros(768))
        writer.commit()
        in_fork(lambda: loose.compact(config))
        assert not writer.put("b:x", np.ones(768))
        writer.put("c:x", np.zeros(768))
    assert {"a:x", "b:x", "c:x"} <= set(loose.reader(config))
    assert len(loose.reader(config)) == 403
    assert loose.verify(config).is_sound


def test_compaction_beside_a_writing_process_loses_nothing(cache, config):
    """Commits fall before or after the copy, never between copy and switch."""
    with peer_process() as peer:
        write(cache.root, config, numbered(0, 1))
        peer.start(write_in_turns, cache.root, config, 1, 200, 2)
        cache.compact(config)
        while not peer._connection.poll(0):
            cache.compact(config)
        peer.answer()
    with cache.reader(config) as reader:
        assert list(reader) == list(numbered(0, 200))
        assert all((embedding == n).all() for n, embedding in enumerate(reader.values()))
    assert cache.verify(config).is_sound


def test_left_over_generations_are_removed(loose, config):
    """What a killed compaction left is swept away by the next one, the live one never."""
    folder = loose.path(config)
    for name in ("gen-000000", "gen-000002", "gen-000077"):
        (folder / name).mkdir()
        (folder / name / "data.mdb").write_bytes(b"half a copy")
    (folder / "gen-x").mkdir()
    loose.compact(config)
    assert sorted(path.name for path in folder.glob("gen-*")) == ["gen-000002", "gen-x"]
    assert (loose.reader(config).get_batch(NAMES) == 2).all()


def test_interrupted_compaction_changes_nothing(loose, config, monkeypatch):
    """An error before the switch leaves the old generation live and usable."""

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compaction, "publish_generation", fail)
    with pytest.raises(KeyboardInterrupt):
        loose.compact(config)
    monkeypatch.undo()
    assert (loose.reader(config).get_batch(NAMES) == 2).all()
    assert (loose.path(config) / "CURRENT").read_text() == "gen-000001\n"
    assert loose.compact(config).num_embeddings == 400


def test_compaction_asks_for_room_first(loose, config, monkeypatch):
    """Without space for a copy nothing is begun."""
    monkeypatch.setattr(generations, "free_bytes", lambda _: 1000)
    with pytest.raises(CacheFullError):
        loose.compact(config)
    assert not (loose.path(config) / "gen-000002").exists()


def test_fork_waits_for_a_compaction_of_another_thread(loose, config):
    """A child forked in the middle of compactions opens the store."""
    stop = threading.Event()

    def compact_on():
        while not stop.is_set():
            loose.compact(config)
            loose.verify(config)

    thread = threading.Thread(target=compact_on)
    thread.start()
    try:
        for _ in range(10):
            assert in_fork(lambda: len(loose.reader(config))) == 400
    finally:
        stop.set()
        thread.join()
    assert loose.verify(config).is_sound

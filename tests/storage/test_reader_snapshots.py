"""Snapshots: what a reader sees while others write, and when it moves on."""

from __future__ import annotations

import os
import threading

import lmdb
import numpy as np
import pytest
from storage.child_processes import in_fork, numbered, peer_process, rewrite, write

from lmdbcache import EmbeddingReader
from lmdbcache.errors import CacheNotFoundError, SampleNotFoundError
from lmdbcache.storage import environment

SAMPLE_IDS = [f"{n:03d}:x" for n in range(300)]


@pytest.fixture
def peer():
    with peer_process() as peer:
        yield peer


@pytest.fixture
def reader(cache, config):
    """A reader of 300 embeddings of zeros, with its snapshot pinned."""
    write(cache.root, config, {name: np.zeros(768, np.float32) for name in SAMPLE_IDS})
    with cache.reader(config) as reader:
        assert len(reader) == 300
        yield reader


def only_value(batch):
    """The one number that all of a batch consists of."""
    values = np.unique(batch)
    assert len(values) == 1, values
    return values[0]


def reader_slots(reader):
    """The lines of LMDB's reader table: (pid, txnid or '-')."""
    environment = reader._snapshot.environment.env
    return [
        (int(line.split()[0]), line.split()[2]) for line in environment.readers().split("\n")[1:-1]
    ]


def test_committed_samples_are_seen_without_refresh(reader, cache, config, peer):
    """A sample that another process commits is found by key, `in`, get_batch and missing."""
    for n, look in enumerate(
        [
            lambda name: reader[name],
            lambda name: reader.get_batch([SAMPLE_IDS[0], name]),
            lambda name: name in reader or pytest.fail(name),
            lambda name: reader.missing([name]) == [] or pytest.fail(name),
        ]
    ):
        name = f"new_{n}:x"
        assert name not in reader
        peer.call(write, cache.root, config, {name: np.ones(768, np.float32)})
        look(name)
    with pytest.raises(SampleNotFoundError):
        reader["never:x"]


def test_overwritten_value_stays_old_until_refresh(reader, cache, config, peer):
    """A snapshot is one moment, however often others write; `refresh` moves to the newest."""
    assert not reader.refresh()
    peer.call(rewrite, cache.root, config, SAMPLE_IDS, 30)
    assert only_value(reader.get_batch(SAMPLE_IDS)) == 0
    assert only_value([reader[name] for name in SAMPLE_IDS]) == 0
    assert reader.refresh()
    assert only_value(reader.get_batch(SAMPLE_IDS)) == 30
    assert not reader.refresh()


def test_a_snapshot_survives_forked_children_and_thirty_rewrites(reader, cache, config, peer):
    """Children that read and end don't take away the protection of the parent's snapshot."""
    addresses = [reader._snapshot.transaction.get(name.encode()) for name in SAMPLE_IDS]

    def read_in_child():
        number = only_value(reader.get_batch(SAMPLE_IDS))
        reader.refresh()
        own = EmbeddingReader(reader.path)
        assert only_value(own.get_batch(SAMPLE_IDS)) == number
        own.close()
        grandchild = in_fork(lambda: only_value(reader.get_batch(SAMPLE_IDS)))
        assert grandchild == number
        reader.close()
        return number

    def end_without_closing():
        return only_value(reader.get_batch(SAMPLE_IDS))

    pinned = (os.getpid(), str(reader._snapshot.id))
    for child in (read_in_child, end_without_closing, lambda: 0):
        assert in_fork(child) == 0
        assert pinned in reader_slots(reader)
    peer.call(rewrite, cache.root, config, SAMPLE_IDS, 30)
    assert only_value(reader.get_batch(SAMPLE_IDS)) == 0
    # The very pages, too: nobody has reused them.
    assert only_value([np.frombuffer(value, "<f4") for value in addresses]) == 0
    del addresses
    assert in_fork(end_without_closing) == 30
    assert only_value(reader.get_batch(SAMPLE_IDS)) == 0


def test_writes_of_this_process_show_after_refresh(reader, cache, config):
    """A writer in the same process and its readers agree."""
    with cache.writer(config, on_duplicate="overwrite") as writer:
        for number in range(1, 6):
            writer.put_batch(SAMPLE_IDS, np.full((300, 768), number))
            writer.commit()
            reader.refresh()
            assert only_value(reader.get_batch(SAMPLE_IDS)) == number
        # From here on the environment is open for writing and snapshots stay put.
        writer.put_batch(SAMPLE_IDS, np.full((300, 768), 6))
        writer.commit()
        assert only_value(reader.get_batch(SAMPLE_IDS)) == 5
    reader.refresh()
    assert only_value(reader.get_batch(SAMPLE_IDS)) == 6


def test_iteration_goes_on_while_a_writer_commits(cache, config, peer):
    """Every sample that was there at the start comes once, in order, with its value."""
    before = numbered(0, 9000, size=1)
    write(cache.root, config, before, commit_records=10_000)
    with cache.reader(config) as reader:
        seen = []
        for n, name in enumerate(reader):
            seen.append(name)
            if n % 3000 == 0:
                peer.call(write, cache.root, config, numbered(9000 + n, 9010 + n, size=1))
                assert f"clip_{9000 + n:06d}:x" in reader  # moves the snapshot on
        assert seen[:9000] == list(before)
        assert seen == sorted(set(seen))


def test_threads_share_a_reader_while_another_writes_and_refreshes(reader, cache, config):
    """No read ever mixes two commits, and nobody goes back in time."""
    stop = threading.Event()
    failures = []

    def read():
        try:
            last = 0
            while not stop.is_set():
                number = only_value(reader.get_batch(SAMPLE_IDS[:50]))
                assert number >= last
                last = number
                only_value(reader[SAMPLE_IDS[7]])
                assert len(reader) == 300
                assert "none:x" not in reader
        except BaseException as error:  # noqa: BLE001 - shown in the main thread
            failures.append(repr(error))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 40):
        # Each writer opens and closes, so that the environment changes hands, too.
        with cache.writer(config, on_duplicate="overwrite") as writer:
            writer.put_batch(SAMPLE_IDS, np.full((300, 768), number))
        reader.refresh()
        if number % 10 == 0:
            reader.close()
        if number % 15 == 0:
            cache.compact(config)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert only_value(reader.get_batch(SAMPLE_IDS)) == 39


def test_first_write_in_a_process_does_not_fail_its_readers(cache, config):
    """Opening the environment again for writing never shows in another thread's read."""
    write(cache.root, config, numbered(0, 20))
    failures = []
    stop = threading.Event()

    def read():
        while not stop.is_set():
            try:
                with EmbeddingReader(cache.path(config)) as own:
                    assert len(own.get_batch(list(numbered(0, 20)))) == 20
            except BaseException as error:  # noqa: BLE001 - shown in the main thread
                failures.append(repr(error))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(60):
        write(cache.root, config, numbered(20 + n, 21 + n))
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_store_cleared_and_remade_under_a_reader(reader, cache, config, peer):
    """The old snapshot stays readable; refresh and misses find the new store of the same name."""
    cache.clear(config)
    assert only_value(reader.get_batch(SAMPLE_IDS)) == 0
    with pytest.raises(SampleNotFoundError):
        reader["new:x"]
    with pytest.raises(CacheNotFoundError):
        reader.refresh()
    peer.call(write, cache.root, config, {"new:x": np.ones(3, np.float32)})
    assert reader["new:x"].shape == (3,)
    assert list(reader) == ["new:x"]


def test_nothing_known_of_a_cleared_store_is_used_for_its_successor(cache, config):
    """A new store on the old one's inode, with equal keys and commits, has its values elsewhere."""
    values = np.random.default_rng(0).normal(size=(300, 768)).astype(np.float32)
    selection = None
    for n in range(30):
        for moved in (SAMPLE_IDS, [SAMPLE_IDS[5 + n % 7], SAMPLE_IDS[20 + n % 11]]):
            with cache.writer(config, on_duplicate="overwrite") as writer:
                writer.put_batch(moved, [values[SAMPLE_IDS.index(name)] for name in moved])
        with cache.reader(config) as reader:
            np.testing.assert_array_equal(reader.get_batch(SAMPLE_IDS), values)
        selection = selection or cache.reader(config).select(SAMPLE_IDS)
        np.testing.assert_array_equal(selection.get_batch(range(300)), values)
        selection.reader.close()
        cache.clear(config)


def test_fork_with_a_reader_of_a_cleared_store(reader, cache, config):
    """A child never reads through an environment that its parent no longer has a name for."""
    cache.clear(config)
    write(cache.root, config, {"new:x": np.ones(3, np.float32)})
    with cache.reader(config) as new:
        assert list(new) == ["new:x"]

        def read_in_child():
            assert not environment._environments
            assert list(reader) == ["new:x"]
            assert list(new) == ["new:x"]
            return reader_slots(reader)

        assert (os.getpid(), "1") not in in_fork(read_in_child)
        assert only_value(reader.get_batch(SAMPLE_IDS)) == 0


def test_reading_and_refreshing_takes_one_slot(reader, cache, config, peer):
    """However often a reader moves on, fails or closes, it holds one slot."""
    errors = []
    for n in range(20):
        peer.call(write, cache.root, config, {f"{n}:y": np.ones(768, np.float32)})
        reader.refresh()
        with pytest.raises(SampleNotFoundError) as caught:
            reader["none:x"]
        errors.append(caught.value)
        assert len([slot for slot in reader_slots(reader) if slot[0] == os.getpid()]) == 1


def test_error_that_somebody_keeps_does_not_keep_the_snapshot(reader):
    """After an error inside a read, a forked child can still open the store."""
    path = reader._snapshot.environment.generation
    reader.close()
    with lmdb.open(str(path), max_dbs=2, map_size=1 << 30) as env, env.begin(write=True) as txn:
        txn.put(b"000:x", b"12345678")
    del txn
    kept = []
    try:
        reader["000:x"]
    except Exception as error:  # noqa: BLE001 - kept on purpose
        kept.append(error)
    assert "8 bytes are stored" in str(kept[0])
    assert in_fork(lambda: len(reader)) == 300


def test_dead_readers_do_not_fill_the_table(reader):
    """With every slot taken by a killed process, a reader clears them and goes on."""
    pid = os.fork()
    if pid == 0:
        kept = []
        own = EmbeddingReader(reader.path)
        len(own)
        env = own._holder.environment.env
        while True:
            try:
                kept.append(env.begin())
            except lmdb.ReadersFullError:
                os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(reader_slots(reader)) >= 2047
    reader.refresh()
    other = EmbeddingReader(reader.path)
    assert len(other) == 300
    assert len(reader_slots(reader)) < 10

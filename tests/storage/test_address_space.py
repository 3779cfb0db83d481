"""Maps: hundreds of stores in a process, limited address space, files that outgrow their map."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from storage.child_processes import Peer, in_fork, numbered, peer_process, write_in_turns

from lmdbcache import EmbeddingCache
from lmdbcache.errors import StorageError
from lmdbcache.storage import environment, opening, reader as reader_module

SMALL_MAP = 1 << 16


def shrink_maps(num_bytes=SMALL_MAP):
    """Take maps that the next commits outgrow."""
    opening._WRITER_MAP = opening._READER_MAP = opening._LEAST_GROWTH = num_bytes


def map_sizes():
    return [held.env.info()["map_size"] for held in environment._environments.values()]


@pytest.fixture
def small_maps(monkeypatch):
    for name in ("_WRITER_MAP", "_READER_MAP", "_LEAST_GROWTH"):
        monkeypatch.setattr(opening, name, SMALL_MAP)


def limit_address_space(more):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))


def open_many(root, configs):
    """Keep a reader and then a writer of each store open in one process."""
    cache = EmbeddingCache(root)
    readers = []
    for index, config in enumerate(configs):
        readers.append(cache.reader(config))
        assert readers[-1]["a:x"][0] == index
    writers = [cache.writer(config) for config in configs]
    for writer in writers:
        writer.put("b:x", np.ones(4, np.float32))
        writer.commit()
    assert all(reader.get_batch(["a:x", "b:x"])[1, 0] == 1 for reader in readers)
    sizes = map_sizes()
    largest = np.empty(1 << 33, np.uint8).nbytes  # there is room for others
    for writer in writers:
        writer.close()
    for reader in readers:
        reader.close()
    return len(sizes), largest


def test_hundreds_of_stores_in_one_process(cache, config):
    """160 stores are read and written at once: more than 1 TiB maps allow."""
    configs = [config.replace(duration=1 + n / 10) for n in range(160)]
    for index, each in enumerate(configs):
        with cache.writer(each) as writer:
            writer.put("a:x", np.full(4, index, np.float32))
    assert in_fork(lambda: open_many(cache.root, configs)) == (160, 1 << 33)


@pytest.mark.parametrize("mebibytes", [1024, 256])
def test_limited_address_space_reads_and_writes(cache, config, mebibytes):
    """Under `ulimit -v` stores are made, grown and read, and the process has memory left."""

    def work():
        limit_address_space(mebibytes << 20)
        for duration in (1, 2, 3):
            each = config.replace(duration=duration)
            with cache.writer(each, commit_records=10) as writer:
                for n in range(40):
                    writer.put(f"{n:02d}:x", np.full(50_000, n, np.float32))
        readers = [cache.reader(config.replace(duration=duration)) for duration in (1, 2, 3)]
        for reader in readers:
            assert reader.get_batch(["07:x", "31:x"])[:, -1].tolist() == [7, 31]
        left = np.ones(mebibytes << 18, np.uint8).nbytes
        for reader in readers:
            reader.close()
        return left

    assert in_fork(work) == mebibytes << 18


def test_no_address_space_is_an_error(cache, config):
    """A store larger than the address space that is left is refused with a remedy."""
    with cache.writer(config) as writer:
        writer.put_batch([f"{n}:x" for n in range(64)], np.ones((64, 1 << 18), np.float32))

    def read():
        limit_address_space(48 << 20)
        for use in (lambda: len(cache.reader(config)), lambda: cache.writer(config)):
            with pytest.raises(StorageError) as caught:
                use()
            assert "\n" not in str(caught.value)
        soft_limit = (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2
        resource.setrlimit(resource.RLIMIT_AS, soft_limit)
        return len(cache.reader(config))

    assert in_fork(read) == 64


def test_commit_beyond_the_address_space_keeps_what_is_pending(cache, config, small_maps):
    """No larger map to be had: our error, and the same writer goes on once there is one."""

    def write():
        with cache.writer(config) as writer:
            rows = np.ones((48, 1 << 18), np.float32)
            writer.put("first:x", rows[0])
            writer.commit()
            for n in range(48):
                writer.put(f"{n}:x", rows[n])
            limit = resource.getrlimit(resource.RLIMIT_AS)
            limit_address_space(8 << 20)
            try:
                with pytest.raises(StorageError) as caught:
                    writer.commit()
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limit)
            assert "\n" not in str(caught.value)
            assert writer.num_pending == writer.commit() == 48
        return len(cache.reader(config))

    assert in_fork(write) == 49


def test_writer_grows_its_map_under_its_own_readers(cache, config, small_maps):
    """Commits that outgrow the map are taken; readers of the process go on, singly and in batch."""
    with cache.writer(config, commit_records=4) as writer:
        writer.put("first:x", np.zeros(4096, np.float32))
        writer.commit()
        sizes = map_sizes()
        with cache.reader(config) as reader, cache.reader(config) as second:
            for n in range(40):
                writer.put(f"{n:02d}:x", np.full(4096, n, np.float32))
                assert reader["first:x"][0] == second.get_batch(["first:x"])[0, 0] == 0
            writer.commit()
            assert reader.refresh()
            assert [float(row[0]) for row in reader.values()] == [*range(40), 0]
            assert map_sizes()[0] > 8 * sizes[0]
    assert cache.verify(config).is_sound


def read_numbers(root, config, least):
    """Read on until there are so many embeddings; every one holds its number."""
    shrink_maps()
    seen = 0
    reopened = set()
    with EmbeddingCache(root).reader(config) as reader:
        while seen < least:
            reader.refresh()
            names = list(reader)
            assert len(names) >= seen
            seen = len(names)
            batch = reader.get_batch(names)
            assert batch[:, 0].tolist() == [int(name[5:11]) for name in names]
            assert (batch == batch[:, :1]).all()
            reopened.update(map_sizes())
    return len(reopened)


def test_growing_writers_beside_readers_of_other_processes(cache, config):
    """Two processes outgrow their maps in turn, two others read: nothing is lost, no map error."""
    write_in_turns(cache.root, config, 0, 4, 4)
    peers = [Peer() for _ in range(4)]
    try:
        for peer in peers:
            peer.call(shrink_maps)
        for peer in peers[2:]:
            peer.start(read_numbers, cache.root, config, 2004)
        for index, peer in enumerate(peers[:2]):
            first = 4 + 1000 * index
            peer.start(write_in_turns, cache.root, config, first, first + 1000, 20)
        for peer in peers[:2]:
            peer.answer()
        assert all(peer.answer() >= 2 for peer in peers[2:])  # maps
    finally:
        for peer in peers:
            peer.end()
    with cache.reader(config) as reader:
        assert list(reader) == list(numbered(0, 2004))
    assert cache.verify(config).is_sound


def test_file_that_is_compacted_after_it_has_grown(cache, config, small_maps, monkeypatch):
    """A generation too large for our map is removed while we look at it: the new one is read."""
    write_in_turns(cache.root, config, 0, 4, 4)
    reader = cache.reader(config)
    with peer_process() as peer, cache.reader(config) as holder:
        assert len(holder) == 4

        def acquire_then_lose(store):
            monkeypatch.undo()
            held = environment.acquire_current(store)
            peer.call(write_in_turns, cache.root, config, 4, 3000, 500)
            peer.call(compact, cache.root, config)
            return held

        monkeypatch.setattr(reader_module, "acquire_current", acquire_then_lose)
        assert len(reader) == len(holder) == 3000
        assert reader["clip_002999:x"][0] == 2999
    reader.close()


def compact(root, config):
    EmbeddingCache(root).compact(config)


def test_environment_that_could_not_be_opened_again_is_tried_later(cache, config, monkeypatch):
    """A reopening that fails for want of memory leaves readers and writers that work afterwards."""
    write_in_turns(cache.root, config, 0, 1, 1)
    with cache.writer(config) as writer, cache.reader(config) as reader:
        writer.put("a:x", np.ones(64, np.float32))
        writer.commit()
        assert len(reader) == 2
        writer.put("b:x", np.ones(64, np.float32))
        held = writer._holder.environment

        def no_memory(*_, **__):
            raise StorageError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(environment, "open_environment", no_memory)
            with pytest.raises(StorageError):
                held.grow()
            with pytest.raises(StorageError):
                len(reader)
            with pytest.raises(StorageError):
                writer.commit()
        assert writer.commit() == 1
        assert len(reader) == 3

"""LMDB's reader table: filled by others, and what old snapshots keep from reuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import lmdb
import numpy as np
import pytest
from storage.child_processes import in_fork, peer_process, read, rewrite, write

from lmdbcache import EmbeddingCache, EmbeddingReader
from lmdbcache.errors import StorageError
from lmdbcache.storage.pages.pages import UnreadablePagesError, read_free_pages
from lmdbcache.storage.reader_slots import slots

NAMES = [f"{n:03d}:x" for n in range(200)]
_held = []


def hold_slots(generation, count, table_size):
    """As a program of somebody else: many read transactions, never ended."""
    env = lmdb.open(str(generation), readonly=True, max_readers=table_size)
    _held.extend([env, *(env.begin() for _ in range(count))])
    return os.getpid()


def hold_snapshot(root, config):
    reader = EmbeddingCache(root).reader(config)
    reader["000:x"]
    _held.append(reader)
    return os.getpid()


def test_full_reader_table_names_who_holds_it(filled, config, embeddings):
    """With all slots taken by strangers the error says by whom; it passes when they have died."""
    generation = next(filled.path(config).glob("gen-*"))
    (generation / "lock.mdb").unlink()  # its size is that of the table
    with peer_process() as first, peer_process() as second:
        pids = [first.call(hold_slots, generation, 5, 8)]
        pids.append(second.call(hold_slots, generation, 3, 8))
        for use in (
            lambda: len(filled.reader(config)),
            lambda: filled.info(config),
            lambda: filled.writer(config),
        ):
            with pytest.raises(StorageError) as caught:
                use()
            message = str(caught.value)
            assert all(str(pid) in message for pid in pids)
            assert "\n" not in message
            assert "end such a process" in message
        reader = filled.reader(config)
        with pytest.raises(StorageError):
            len(reader)
        second.kill()
        with pytest.raises(StorageError, match=f"process {pids[0]} "):
            len(reader)  # its slots are taken still: LMDB can't be opened to clear them
        first.kill()
        assert reader == embeddings
        with filled.writer(config) as writer:
            writer.put("new:x", np.ones(8, np.float32))
        assert "new:x" in reader
        reader.close()


def test_old_snapshot_of_another_process_is_shown(cache, config):
    """While others overwrite, the file grows by what a held snapshot pins: info says who and how
    much; writers use it again once the reader has died."""
    write(cache.root, config, {name: np.zeros(768, np.float32) for name in NAMES})
    value_bytes = len(NAMES) * 4096
    with peer_process() as holder, peer_process() as writer:
        pid = holder.call(hold_snapshot, cache.root, config)
        writer.call(rewrite, cache.root, config, NAMES, 10)
        info = cache.info(config)
        assert info.readers[pid] == 10
        assert 9 * value_bytes <= info.pinned_bytes <= info.free_bytes <= info.size_bytes
        assert info.size_bytes > 10 * value_bytes
        assert holder.call(read, cache.root, config, NAMES[:1])[0, 0] in (0, 10)
        command = [sys.executable, "-m", "lmdbcache", "info", info.path, "--root", cache.root]
        shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        flat = " ".join(shown.split())
        assert f"process {pid} (10 commits behind)" in flat
        assert "given back by compact" in flat
        holder.kill()
        assert cache.info(config).pinned_bytes == 0
        size = cache.size(config)
        writer.call(rewrite, cache.root, config, NAMES, 10)
        assert cache.size(config) == size
    as_json = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE)
    found = json.loads(as_json.stdout)
    assert found["free_bytes"] >= 9 * value_bytes
    assert found["pinned_bytes"] == 0
    assert str(pid) not in found["readers"]


def test_compaction_gives_back_what_info_says_is_free(cache, config):
    """free_bytes is what the file shrinks by, to within a few pages."""
    rewrite(cache.root, config, NAMES, 7)
    before = cache.info(config)
    assert before.free_bytes > len(NAMES) * 3072
    result = cache.compact(config)
    given_back = result.bytes_before - result.bytes_after
    assert abs(given_back - before.free_bytes) <= 16 * 4096
    after = cache.info(config)
    assert (after.free_bytes, after.pinned_bytes) == (0, 0)


def test_free_pages_agree_with_a_walk_through_lmdb(cache, config, tmp_path):
    """Lists within a leaf and on pages of their own: as many pages as the file has unused."""
    rewrite(cache.root, config, [f"{n:04d}:x" for n in range(1500)], 4)
    generation = next(cache.path(config).glob("gen-*"))
    data = np.fromfile(generation / "data.mdb", np.uint8)
    with lmdb.open(str(generation), readonly=True, max_dbs=2) as env, env.begin() as transaction:
        counts = [transaction.stat()]
        counts.append(transaction.stat(env.open_db(b"checksums", transaction, create=False)))
        used = sum(s["branch_pages"] + s["leaf_pages"] + s["overflow_pages"] for s in counts)
        last = env.info()["last_pgno"]
        transactions, free = read_free_pages(data, transaction.id())
    # The rest: two meta pages and the free database itself.
    assert 0 <= last + 1 - 2 - used - free.sum() <= 16
    assert (np.diff(transactions) > 0).all()
    assert free.max() > 511  # more than a leaf holds
    with pytest.raises(UnreadablePagesError):
        read_free_pages(data, lmdb_transaction(generation) + 2)


def test_damaged_free_list_is_no_crash(cache, config):
    """Whatever stands in the file, info's figures are refused rather than computed from it."""
    rewrite(cache.root, config, NAMES, 4, 64)
    generation = next(cache.path(config).glob("gen-*"))
    sound = np.fromfile(generation / "data.mdb", np.uint8)
    last = lmdb_transaction(generation)
    expected = int(read_free_pages(sound, last)[1].sum())
    generator = np.random.default_rng(0)
    for _ in range(2000):
        data = sound.copy()
        at = generator.integers(0, len(data), 8)
        data[at] = generator.integers(0, 256, 8, np.uint8)
        try:
            found = int(read_free_pages(data, last)[1].sum())
        except UnreadablePagesError:
            continue
        assert 0 <= found <= len(data) // 4096
    assert expected > 0


def lmdb_transaction(generation):
    with lmdb.open(str(generation), readonly=True) as env:
        return int(env.info()["last_txnid"])


def test_reader_table_is_shown_to_whom_may_not_lock(cache, config):
    """Without a reader table info is as ever, with no reader in it."""
    write(cache.root, config, {name: np.zeros(8, np.float32) for name in NAMES})
    generation = next(cache.path(config).glob("gen-*"))

    def look():
        generation.chmod(0o555)
        for file in generation.iterdir():
            file.chmod(0o444)
        os.setuid(65534)
        return cache.info(config).readers

    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    for folder in (*cache.root.parents, cache.root, cache.path(config)):
        if folder.stat().st_mode & 0o055 != 0o055:
            folder.chmod(folder.stat().st_mode | 0o055)
    assert in_fork(look) == {}


def test_dead_readers_are_cleared_by_a_living_one(filled, config, embeddings):
    """Slots of killed processes are no obstacle to a reader that was open before, and then to
    nobody any more."""
    generation = next(filled.path(config).glob("gen-*"))
    (generation / "lock.mdb").unlink()
    with peer_process() as peer, EmbeddingReader(filled.path(config)) as keeper:
        peer.call(hold_slots, generation, 4, 8)
        assert len(keeper) == len(embeddings)
        with peer_process() as writer:
            writer.call(write, filled.root, config, {"new:x": np.ones(8, np.float32)})
        with peer_process() as other:
            other.call(hold_slots, generation, 3, 8)
            other.kill()
        # Not a slot is left: 4 of a living process, 3 of a dead one, and our own.
        assert keeper.refresh()
        assert "new:x" in keeper
        assert in_fork(lambda: len(filled.reader(config))) == len(embeddings) + 1


def test_a_writer_clears_the_slots_of_killed_readers_every_64_commits(filled, config):
    """Its first commit does, and the 65th; nobody else opens the store in between."""
    with filled.writer(config) as writer, filled.reader(config) as survivor:
        len(survivor)
        for number in range(2):
            writer.put(f"{number}:x", np.ones(8))
            writer.commit()
        with peer_process() as other:
            other.call(hold_slots, next(filled.path(config).glob("gen-*")), 3, 2048)
            other.kill()
        for number in range(2, 65):
            assert len(slots(survivor.pinned().environment.env)) > 1
            writer.put(f"{number}:x", np.ones(8))
            writer.commit()
        assert len(slots(survivor.pinned().environment.env)) == 1


def test_a_snapshot_without_a_slot_is_good_for_one_commit_more(filled, config):
    """A commit uses pages again that the last but one has freed."""
    with filled.reader(config) as reader:
        snapshot = reader.pinned()
        snapshot.is_protected = False
        for number, is_too_old in enumerate((False, True)):
            with peer_process() as writer:
                writer.call(write, filled.root, config, {f"{number}:x": np.ones(8, np.float32)})
            assert snapshot.may_be_overwritten() == is_too_old

"""Removing embeddings inside a store: all or none, for good, and nothing else."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from small_disks import fill, small_disk
from storage.child_processes import numbered, peer_process, write
from storage.damage import data_file, flip_value
from stress.page_kinds import byte_ranges

from lmdbcache import EmbeddingCache
from lmdbcache.errors import CacheFullError, IntegrityError, InvalidSampleIdError, StorageError

DOGS = [f"video_{n:05d}:dog" for n in range(1, 20, 2)]
DRUMS = [f"video_{n:05d}:drum" for n in range(0, 20, 2)]


def remove(root, config, sample_ids):
    with EmbeddingCache(root).writer(config) as writer:
        return writer.remove(sample_ids)


def test_removed_samples_are_gone_and_the_others_untouched(filled, config, embeddings):
    """Value, checksum and coverage forget them; the rest keeps its bits; the store is sound."""
    assert remove(filled.root, config, [*DOGS, DOGS[0], "never:stored"]) == len(DOGS)
    with filled.reader(config) as reader:
        assert list(reader) == DRUMS
        assert all(reader[name].tobytes() == embeddings[name].tobytes() for name in DRUMS)
        assert DOGS[0] not in reader
    assert filled.coverage(config, list(embeddings)).missing == tuple(DOGS)
    report = filled.verify(config)
    assert report.is_sound
    assert report.num_embeddings == len(DRUMS)
    assert remove(filled.root, config, DOGS) == 0


def test_removed_samples_can_be_stored_again(filled, config, embeddings):
    """A writer that skips duplicates doesn't take a removed sample for a stored one."""
    with filled.writer(config) as writer:
        assert not writer.put(DOGS[0], embeddings[DOGS[0]])
        with peer_process() as peer:
            assert peer.call(remove, filled.root, config, DOGS) == len(DOGS)
        assert writer.put(DOGS[0], embeddings[DOGS[0]])
    with filled.reader(config) as reader:
        assert list(reader) == sorted([DOGS[0], *DRUMS])


def test_what_is_collected_is_dropped_too(filled, config):
    """A removed sample that wasn't committed yet stays away; the rest of the batch is written."""
    with filled.writer(config) as writer:
        writer.put("new:dog", np.ones(8))
        writer.put("new:drum", np.ones(8))
        assert writer.remove(["new:dog", DOGS[0]]) == 1
        assert writer.num_pending == 1
    with filled.reader(config) as reader:
        assert "new:drum" in reader
        assert "new:dog" not in reader


def test_everything_can_be_removed(filled, config, embeddings):
    """An empty store is sound, keeps its shape, and takes embeddings again."""
    assert remove(filled.root, config, embeddings) == len(embeddings)
    assert filled.verify(config).is_sound
    assert filled.info(config).num_embeddings == 0
    write(filled.root, config, embeddings)
    with filled.reader(config) as reader:
        assert reader == embeddings


def test_nothing_stored_is_nothing_removed(cache, config):
    """Removing from a store that doesn't exist makes no folder; a bad id is an error."""
    assert remove(cache.root, config, DOGS) == 0
    assert not cache.root.exists()
    with pytest.raises(InvalidSampleIdError):
        remove(cache.root, config, ["no class"])


def test_readers_keep_what_their_snapshot_has(filled, config, embeddings):
    """A snapshot of another process than the writer's has removed samples until it is refreshed."""
    with filled.reader(config) as reader, peer_process() as peer:
        assert len(reader) == len(embeddings)
        peer.call(remove, filled.root, config, DOGS)
        for name, expected in embeddings.items():
            assert reader[name].tobytes() == expected.tobytes()
        assert reader.refresh()
        assert list(reader) == DRUMS


def test_space_is_free_at_once_and_given_back_by_compaction(cache, config):
    """info shows the removed bytes as free; compact returns them to the disk."""
    write(cache.root, config, numbered(0, 200, 4096))
    before = cache.info(config)
    remove(cache.root, config, list(numbered(0, 100)))
    after = cache.info(config)
    assert after.size_bytes >= before.size_bytes
    assert after.free_bytes >= 100 * 4096 * 4
    result = cache.compact(config)
    assert result.bytes_before - result.bytes_after >= 100 * 4096 * 4
    assert cache.info(config).num_embeddings == 100


def test_killed_removal_is_all_or_nothing(cache, config, tmp_path):
    """kill -9 at any moment leaves every sample of the call or none; what returned is durable."""
    everything = numbered(0, 2000)
    write(cache.root, config, everything)
    gone = sorted(everything)[::2]
    moments = random.Random(0)
    for number in range(4):
        with peer_process() as peer:
            begun = tmp_path / f"begun-{number}"
            peer.start(remove_and_restore, cache.root, config, gone, begun)
            while not begun.exists():
                time.sleep(0.002)
            time.sleep(moments.random() * 0.05)
            peer.kill()
        with cache.reader(config) as reader:
            found = len(set(gone) & set(reader))
            assert found in (0, len(gone))
            assert len(reader) == len(everything) - len(gone) + found
        assert cache.verify(config).is_sound
    with peer_process() as peer:
        peer.start(remove_and_wait, cache.root, config, gone, tmp_path / "removed")
        while not (tmp_path / "removed").exists():
            time.sleep(0.002)
        peer.kill()
    assert cache.info(config).num_embeddings == len(everything) - len(gone)


def remove_and_restore(root, config, sample_ids, begun):
    everything = numbered(0, 2000)
    with EmbeddingCache(root).writer(config, commit_records=10_000) as writer:
        while True:
            begun.touch()
            writer.remove(sample_ids)
            with writer.together():  # by itself a batch may be committed in pieces, after a time
                writer.put_batch(sample_ids, [everything[name] for name in sample_ids])
            writer.commit()


def remove_and_wait(root, config, sample_ids, removed):
    with EmbeddingCache(root).writer(config) as writer:
        writer.remove(sample_ids)
        removed.touch()
        time.sleep(60)


def test_repair_does_not_bring_back_what_was_removed(cache, config):
    """Pages of removed values are still in the file, and nothing leads to them."""
    write(cache.root, config, numbered(0, 60, 2048))
    gone = list(numbered(10, 30))
    remove(cache.root, config, gone)
    with cache.reader(config) as reader:
        kept = {name: reader[name] for name in reader}
    flip_value(data_file(cache, config), kept["clip_000040:x"])
    report = cache.repair(config)
    assert report.dropped == ("clip_000040:x",)
    with cache.reader(config) as reader:
        assert set(reader) == set(kept) - {"clip_000040:x"}


def test_full_disk_removes_nothing(tmp_path, config):
    """Without room for the changed pages there is an error, and all is as before."""
    with small_disk(tmp_path / "disk", 32) as disk:
        cache = EmbeddingCache(disk / "cache")
        write(cache.root, config, numbered(0, 100))
        fill(disk, 1 << 20)
        with pytest.raises(CacheFullError):
            remove(cache.root, config, list(numbered(0, 50)))
        with cache.reader(config) as reader:
            assert len(reader) == 100


def test_removal_inside_a_unit_is_refused(filled, config):
    """It would be a transaction of its own, and a failing unit would bring back what it dropped."""
    with filled.writer(config) as writer:
        writer.put("new:dog", np.ones(8))
        with pytest.raises(StorageError), writer.together():
            writer.remove(["new:dog", DOGS[0]])
        assert writer.num_pending == 1
        assert writer.remove(["new:dog", DOGS[0]]) == 1
    with filled.reader(config) as reader:
        assert reader.missing(["new:dog", *DOGS]) == ["new:dog", DOGS[0]]


def test_a_file_from_before_a_removal_is_noticed(filled, config):
    """Put in place of the newer one it would bring back what was removed."""
    path = data_file(filled, config)
    before = path.read_bytes()
    remove(filled.root, config, DOGS)
    with path.open("r+b") as file:
        file.write(before)
    for use in (lambda: len(filled.reader(config)), lambda: remove(filled.root, config, DRUMS)):
        with pytest.raises(IntegrityError):
            use()


def test_repair_without_a_free_list_does_not_bring_back_what_was_removed(cache, config):
    """Without it nobody can tell whose pages are old, but that something was removed is known."""
    write(cache.root, config, numbered(0, 60, 2048))
    gone = list(numbered(10, 30))
    remove(cache.root, config, gone)
    path = data_file(cache, config)
    content = bytearray(path.read_bytes())
    ranges = byte_ranges(bytes(content))
    for start, end in ranges["free list leaf"]:
        content[start:end] = bytes(end - start)
    path.write_bytes(content)
    flip_value(path, np.full(2048, 40, np.float32))
    assert cache.repair(config).is_repaired
    with cache.reader(config) as reader:
        assert not set(gone) & set(reader)
        assert len(reader) == 39

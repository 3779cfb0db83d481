"""The files that hits are counted in: full disks, other users, locks, damage."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from small_disks import fill, small_disk
from storage.child_processes import NOBODY, in_fork
from storage.counted_samples import EACH_ONCE, SAMPLE_IDS, VALUES, figures

from lmdbcache import EmbeddingCache
from lmdbcache.errors import SampleNotFoundError
from lmdbcache.storage import store_counts, tree_counts
from lmdbcache.storage.counting import counter_files
from lmdbcache.storage.counting.counter_files import open_table, read_records


@pytest.fixture(autouse=True)
def _any_machine_is_fast_enough(monkeypatch):
    """Counts are given up after two seconds of waiting; here they are to be exact."""
    monkeypatch.setattr(counter_files, "_LOCK_SECONDS", 240.0)


@pytest.fixture
def store(cache, config):
    with cache.writer(config) as writer:
        writer.put_batch(SAMPLE_IDS, VALUES)
    return cache.path(config)


@pytest.fixture
def reader(cache, config, store):
    with cache.reader(config) as reader:
        yield reader


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_folder_that_cannot_be_written(config):
    """Reading goes on, and this process's own figures are there."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    cache = EmbeddingCache(folder / "cache")
    with cache.writer(config) as writer:
        writer.put_batch(SAMPLE_IDS, VALUES)
    store = cache.path(config)
    codecs.lookup("ascii")  # Python's own files may lie where another user can't read

    def read():
        with cache.reader(config) as reader:
            reader.get_batch(SAMPLE_IDS)
        return figures(tree_counts(store)), figures(store_counts(store))

    try:
        assert in_fork(read, user=NOBODY) == (EACH_ONCE, EACH_ONCE)
        assert not (store / "statistics").exists()
    finally:
        shutil.rmtree(folder)


def test_full_disk(config, tmp_path):
    """No room for the counters: reading goes on without a file."""
    with small_disk(tmp_path / "disk", 64) as disk:
        cache = EmbeddingCache(disk / "cache")
        with cache.writer(config) as writer:
            writer.put_batch(SAMPLE_IDS, VALUES)
        with cache.reader(config) as reader:  # LMDB's own files are made by now
            fill(disk, 8 << 10)
            reader.get_batch(SAMPLE_IDS)
            store = cache.path(config)
            assert figures(tree_counts(store)) == EACH_ONCE
            assert not list((store / "statistics").glob("*.*"))


def test_damaged_files_are_no_error(reader, store):
    """Whatever lies in the folder, reading and counting go on."""
    folder = store / "statistics"
    folder.mkdir()
    (folder / "totals.json").write_text("{")
    (folder / "a.counts").write_bytes(b"short")
    (folder / "b.counts").write_bytes(b"lmdbcache counts 1\n".ljust(64 << 10, b"\xff"))
    (folder / "old.tmp").write_bytes(b"")
    reader.get_batch(SAMPLE_IDS)
    assert figures(tree_counts(store)) == EACH_ONCE
    assert not (folder / "old.tmp").exists()


def read_all_and_count(root, config):
    with EmbeddingCache(root).reader(config) as reader:
        reader.get_batch(SAMPLE_IDS)
    return figures(tree_counts(EmbeddingCache(root).path(config)))


def test_a_lock_that_nobody_gives_back_delays_a_reader_and_no_more(
    cache, config, store, monkeypatch
):
    """A stopped process holds the folder's lock: what is read is counted in memory."""
    monkeypatch.setattr(counter_files, "_LOCK_SECONDS", 0.05)
    (store / "statistics").mkdir()
    with (store / "statistics" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert in_fork(lambda: read_all_and_count(cache.root, config)) == EACH_ONCE
    assert in_fork(lambda: read_all_and_count(cache.root, config)) == EACH_ONCE
    assert figures(store_counts(store)) == EACH_ONCE


@pytest.mark.parametrize(
    "text", ['{"hits": {"a": Infinity}, "misses": {}, "folded": []}', "[" * 100_000]
)
def test_totals_of_another_form_are_ignored(cache, config, store, text):
    """Whatever is written there, reading goes on and counts."""
    (store / "statistics").mkdir()
    (store / "statistics" / "totals.json").write_text(text)
    assert in_fork(lambda: read_all_and_count(cache.root, config)) == EACH_ONCE
    assert figures(store_counts(store)) == EACH_ONCE


def count_with_a_hole_on_a_full_disk(folder, disk):
    fill(disk, 0)
    with pytest.raises(OSError, match="o room|No space"):
        open_table(folder, "b" * 16, ("z" * 16,)).hits[900] = 1


def test_a_file_with_holes_is_no_danger_on_a_full_disk(tmp_path):
    """What `rsync -S` made of a dead process's file is filled before it is counted in."""
    with small_disk(tmp_path / "disk", 2) as disk:
        folder = disk / "statistics"
        in_fork(lambda: open_table(folder, "a" * 16, ("z" * 16,)) and None)
        ancestor = open_table(folder, "z" * 16, ())  # keeps that file from being added up
        with (folder / f"{'a' * 16}.counts").open("r+b") as file:
            file.truncate(512)
            file.truncate(64 << 10)
        in_fork(lambda: count_with_a_hole_on_a_full_disk(folder, disk))
        del ancestor


def count_as_nobody(root, config, store):
    with EmbeddingCache(root).reader(config) as reader:
        reader.get_batch(SAMPLE_IDS)
        (store / "statistics").chmod(0)  # its own
        with pytest.raises(SampleNotFoundError):
            reader["none:dog"]
    return True


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_folder_that_shuts_while_its_store_is_read(config):
    """Whether the counter's file is still there can't be told: reading goes on."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        cache = EmbeddingCache(Path(folder) / "cache")
        with cache.writer(config) as writer:
            writer.put_batch(SAMPLE_IDS, VALUES)
        for path in [cache.root, *cache.root.rglob("*")]:
            path.chmod(0o777)
        assert in_fork(lambda: count_as_nobody(cache.root, config, cache.path(config)), user=NOBODY)


def count_beside(folder):
    table = open_table(folder, "b" * 16, ())
    table.hits[table.code_of("dog")] = 2
    return True


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_files_of_another_user_are_left_alone(tmp_path):
    """Who can't open them has a file of their own beside them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = open_table(folder, "a" * 16, ())
        table.hits[table.code_of("dog")] = 3
        folder.chmod(0o777)
        (folder / "lock").chmod(0o666)
        (folder / f"{'a' * 16}.counts").chmod(0o600)
        assert in_fork(lambda: count_beside(folder), user=NOBODY)
        assert sum(sum(r.counts.hits.values()) for r in read_records(folder)[1]) == 5
        del table


def count_and_end(folder, owner, ancestors, number):
    table = open_table(folder, owner, ancestors)
    table.hits[table.code_of("dog")] += number
    return True


def test_a_dead_process_of_another_family_is_left_to_its_own(tmp_path):
    """Only a sibling goes on in the file of a dead process; its living parent sums up the rest."""
    living = open_table(tmp_path, "a" * 16, ())
    living.hits[living.code_of("dog")] = 1
    assert in_fork(lambda: count_and_end(tmp_path, "b" * 16, ("a" * 16,), 2))
    assert in_fork(lambda: count_and_end(tmp_path, "c" * 16, (), 4))
    _, records = read_records(tmp_path)
    assert {r.owner[0]: (r.ancestors, r.counts.hits["dog"]) for r in records} == {
        "a": ((), 1),
        "b": (("a" * 16,), 2),
        "c": ((), 4),
    }
    assert in_fork(lambda: count_and_end(tmp_path, "d" * 16, ("a" * 16,), 8))
    _, records = read_records(tmp_path)
    assert {r.owner[0]: r.counts.hits["dog"] for r in records if r.ancestors} == {"d": 10}
    del living


def test_files_that_were_added_up_and_could_not_be_removed_count_once(tmp_path):
    """Their names stay in the totals for as long as they are there."""
    left = tmp_path / f"{'e' * 16}.counts"
    left.mkdir()  # can't be removed as a file
    totals = {"hits": {"dog": 5}, "misses": {}, "folded": [left.name, "gone.counts"]}
    (tmp_path / "totals.json").write_text(json.dumps(totals))
    assert in_fork(lambda: count_and_end(tmp_path, "b" * 16, (), 2))
    assert in_fork(lambda: count_and_end(tmp_path, "c" * 16, (), 4))
    written = json.loads((tmp_path / "totals.json").read_text())
    assert left.name in written["folded"]
    assert "gone.counts" not in written["folded"]
    assert written["hits"] == {"dog": 7}

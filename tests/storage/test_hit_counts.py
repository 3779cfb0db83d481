"""Hits and misses by class: exact over readers, workers, kills and other processes."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_disks import fill, small_disk
from storage.child_processes import NOBODY, in_fork, peer_process

from lmdbcache import EmbeddingCache, EmbeddingDataset, EmbeddingReader, collate_embeddings
from lmdbcache.errors import SampleNotFoundError
from lmdbcache.read_figures import EpochFigures
from lmdbcache.storage.counting import counter_files, hit_counts
from lmdbcache.storage.counting.counter_files import Counts, open_table, read_records
from lmdbcache.storage.counting.hit_counts import (
    STATISTICS_VARIABLE,
    counts_of,
    store_counts,
    tree_counts,
)

SAMPLE_IDS = [f"{n:03d}:{'dog' if n % 4 else 'drum'}" for n in range(64)]
VALUES = np.arange(64, dtype=np.float32)[:, None] * np.ones(16, np.float32)
EACH_ONCE = {"dog": (48, 0), "drum": (16, 0)}


@pytest.fixture
def store(cache, config):
    with cache.writer(config) as writer:
        writer.put_batch(SAMPLE_IDS, VALUES)
    return cache.path(config)


@pytest.fixture
def reader(cache, config, store):
    with cache.reader(config) as reader:
        yield reader


def figures(counts):
    names = sorted({*counts.hits, *counts.misses})
    return {name: (counts.hits[name], counts.misses[name]) for name in names}


@pytest.mark.parametrize("verify", ["never", "always"])
def test_every_way_of_reading_counts_each_sample_once(cache, config, store, verify):
    """One by one, by id, by position, into a buffer, for another routine: one hit for each."""
    with cache.reader(config, verify=verify) as reader:
        selection = reader.select(SAMPLE_IDS)
        ways = [
            lambda: [reader[name] for name in SAMPLE_IDS],
            lambda: [reader[name.upper()] for name in SAMPLE_IDS],
            lambda: reader.get_batch(SAMPLE_IDS),
            lambda: reader.get_batch(SAMPLE_IDS, out=np.empty((64, 16), np.float32)),
            lambda: selection.get_batch(range(64)),
            lambda: selection.get_batch(np.arange(64)),
            lambda: list(torch.utils.data.DataLoader(EmbeddingDataset(reader), 7)),
        ]
        for number, way in enumerate(ways, 1):
            way()
            counted = figures(store_counts(store))
            assert counted == {name: (number * n, 0) for name, (n, _) in EACH_ONCE.items()}
        if verify == "never":
            selection.copy_with([0, 1], lambda *_: None)
            selection.get_batch([-63, -64])
            selection.get_batch([])
            assert figures(tree_counts(store))["dog"][0] == 48 * len(ways) + 2


def test_embeddings_of_different_lengths_are_counted(cache, config):
    """What LMDB is asked for one by one counts, too."""
    with cache.writer(config, ragged=True) as writer:
        for number in range(3):
            writer.put(f"{number}:dog", np.ones((number + 1, 4), np.float32))
    with cache.reader(config) as reader:
        for number in range(3):
            reader[f"{number}:dog"]
        reader.get_batch(["1:dog", "1:dog"])
    assert figures(store_counts(cache.path(config))) == {"dog": (5, 0)}


def test_misses_count_each_absent_sample_and_questions_count_nothing(reader, store):
    """A batch with absent samples hands nothing out: only these are misses."""
    with pytest.raises(SampleNotFoundError):
        reader["x:dog"]
    with pytest.raises(SampleNotFoundError):
        reader.get_batch([*SAMPLE_IDS, "x:dog", "y:cat"])
    with pytest.raises(SampleNotFoundError):
        reader["no class"]
    assert reader.get("x:cat") is None
    assert "z:dog" not in reader
    reader.missing(["z:dog"])
    reader.select(SAMPLE_IDS).will_need([0])
    assert figures(store_counts(store)) == {"(no class)": (0, 1), "cat": (0, 2), "dog": (0, 2)}


def test_more_classes_than_there_is_room_for(cache, config):
    """They are summed up under one name; nothing is lost."""
    names = [f"clip:class {number}" for number in range(1500)]
    with cache.writer(config) as writer:
        writer.put_batch(names, np.ones((1500, 4), np.float32))
    with cache.reader(config) as reader:
        reader.get_batch(names)
    counts = store_counts(cache.path(config))
    assert sum(counts.hits.values()) == 1500
    assert counts.hits["class 7"] == 1
    assert counts.hits["(other)"] > 400


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_epochs_of_workers_are_summed(reader, store, method, persistent):
    """Each epoch has exactly its own hits, however the workers start and for how long they live."""
    epochs = EpochFigures(reader)
    loader = torch.utils.data.DataLoader(
        EmbeddingDataset(reader, SAMPLE_IDS, collated=True),
        batch_size=10,
        num_workers=2 if method == "fork" else 1,  # the others import torch anew
        multiprocessing_context=method,
        persistent_workers=persistent,
        collate_fn=collate_embeddings,
    )
    for _ in range(2):
        assert sum(len(batch) for batch in loader) == 64
        assert dict(epochs.end_epoch_figures().by_class) == EACH_ONCE
    assert epochs.end_epoch() == {"cache/hits": 0, "cache/misses": 0, "cache/hit_rate": 1.0}
    del loader
    # A dead worker's file is the next one's: they don't pile up.
    assert len(list((store / "statistics").glob("*.counts"))) <= 3
    assert figures(store_counts(store)) == {name: (2 * n, 0) for name, (n, _) in EACH_ONCE.items()}


def test_a_killed_worker_keeps_its_counts(reader, store):
    """SIGKILL right after a batch: it is counted, and later processes add nothing twice."""
    epochs = EpochFigures(reader)
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            reader.get_batch(SAMPLE_IDS)
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert dict(epochs.end_epoch_figures().by_class) == {"dog": (144, 0), "drum": (48, 0)}
    in_fork(lambda: reader[SAMPLE_IDS[1]])
    assert dict(epochs.end_epoch_figures().by_class) == {"dog": (1, 0)}
    assert figures(store_counts(store)) == {"dog": (145, 0), "drum": (48, 0)}


def read_all(root, config):
    with EmbeddingCache(root).reader(config) as reader:
        reader.get_batch(SAMPLE_IDS)


def test_other_processes_are_kept_apart_and_added_up(cache, config, reader, store):
    """Another program's reads are in the store's sums and not in this one's epochs."""
    reader[SAMPLE_IDS[0]]
    epochs = EpochFigures(reader)
    for _ in range(3):
        with peer_process() as peer:
            peer.call(read_all, cache.root, config)
    assert dict(epochs.end_epoch_figures().by_class) == {}
    assert figures(store_counts(store)) == {"dog": (144, 0), "drum": (49, 0)}
    # This process's, and the last peer's, that the next one adds up.
    assert len(list((store / "statistics").glob("*.counts"))) == 2


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


def test_switched_off(reader, store, monkeypatch):
    """LMDBCACHE_STATISTICS=0: nothing is counted and no file is made."""
    monkeypatch.setenv(STATISTICS_VARIABLE, "0")
    reader.get_batch(SAMPLE_IDS)
    reader[SAMPLE_IDS[0]]
    with pytest.raises(SampleNotFoundError):
        reader["x:dog"]
    assert not (store / "statistics").exists()
    assert figures(store_counts(store)) == {}


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


def test_cleared_and_made_again(cache, config, reader, store):
    """A cleared store takes its figures along; the new one has its own."""
    reader.get_batch(SAMPLE_IDS)
    cache.clear(config)
    assert not store.exists()
    with cache.writer(config) as writer:
        writer.put_batch(SAMPLE_IDS, VALUES)
    with cache.reader(config) as again:
        again.get_batch(SAMPLE_IDS[:4])
    assert figures(store_counts(store)) == {"dog": (3, 0), "drum": (1, 0)}


def test_removed_figures_begin_again(reader, store):
    """The folder is derived: it may be removed at any time."""
    reader.get_batch(SAMPLE_IDS)
    shutil.rmtree(store / "statistics")
    reader.get_batch(SAMPLE_IDS)
    reader.close()
    reader.get_batch(SAMPLE_IDS)
    assert figures(store_counts(store)) == EACH_ONCE


def test_a_kill_between_adding_up_and_removing_counts_nothing_twice(tmp_path):
    """Files that `totals.json` names as added are left out, and removed by the next process."""
    tmp_path = tmp_path / "statistics"

    def count(token):
        table = open_table(tmp_path, token * 16, ())
        table.take(Counts(hits={"dog": 5}))
        return (tmp_path / f"{token * 16}.counts").read_bytes()

    kept = in_fork(lambda: count("a"))
    in_fork(lambda: count("b"))
    content = json.loads((tmp_path / "totals.json").read_text())
    assert content["hits"] == {"dog": 5}
    (tmp_path / f"{'a' * 16}.counts").write_bytes(kept)
    totals, records = read_records(tmp_path)
    assert (totals.hits, [record.owner for record in records]) == ({"dog": 5}, ["b" * 16])
    in_fork(lambda: count("c"))
    assert not (tmp_path / f"{'a' * 16}.counts").exists()
    assert read_records(tmp_path)[0].hits == {"dog": 10}


def test_threads_lose_nothing(reader, store):
    """Several threads with readers of their own: all batches are counted."""

    def read():
        with EmbeddingReader(store) as own:
            for _ in range(50):
                own.get_batch(SAMPLE_IDS)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert figures(store_counts(store)) == {"dog": (9600, 0), "drum": (3200, 0)}


def test_threads_that_begin_at_once_share_one_file(cache, config, store, monkeypatch):
    """Those that come while the first one makes it wait: what they count isn't lost."""
    begun = []

    def slowly(*args):
        begun.append(args)
        time.sleep(0.1)
        return open_table(*args)

    monkeypatch.setattr(hit_counts, "open_table", slowly)
    tables = []
    threads = [
        threading.Thread(target=lambda: tables.append(counts_of(store).table)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == len(set(map(id, tables))) == 1


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


def count_beside(folder):
    table = open_table(folder, "b" * 16, ())
    table.hits[table.code_of("dog")] = 2
    return True


def test_looking_makes_no_statistics(cache, config, store):
    """A reader that doesn't count as use makes no file to count in."""
    for verify in ("never", "always"):
        with EmbeddingReader(store, config, verify, counts_as_use=False) as reader:
            reader.get_batch(SAMPLE_IDS)
            reader.select(SAMPLE_IDS).get_batch(range(64))
            assert [reader[name][0] for name in SAMPLE_IDS] == list(range(64))
    assert not (store / "statistics").exists()


def test_a_worker_of_a_server_that_counts_nothing_works_for_who_sent_the_reader(reader, store):
    """A forkserver that has lmdbcache imported is no ancestor to count for."""
    sent = pickle.dumps(reader)

    def serve():  # in a process of another lineage that has read nothing, as a forkserver's is
        hit_counts._process = hit_counts._Process()
        return in_fork(lambda: pickle.loads(sent).get_batch(SAMPLE_IDS).shape)

    assert in_fork(serve) == (64, 16)
    assert figures(tree_counts(store)) == EACH_ONCE

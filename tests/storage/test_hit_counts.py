"""Hits and misses by class: exact over readers, workers, kills and other processes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import threading
import time
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from storage.child_processes import in_fork, peer_process
from storage.counted_samples import EACH_ONCE, SAMPLE_IDS, VALUES, figures

from lmdbcache import EmbeddingCache, EmbeddingDataset, EmbeddingReader, collate_embeddings
from lmdbcache.cache import EpochStatistics
from lmdbcache.errors import SampleNotFoundError
from lmdbcache.storage import counts_of, store_counts, tree_counts
from lmdbcache.storage.counting import counter_files, hit_counts
from lmdbcache.storage.counting.counter_files import Counts, open_table, read_records
from lmdbcache.storage.counting.hit_counts import STATISTICS_VARIABLE


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
    epochs = EpochStatistics(reader)
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
        assert dict(epochs.end_epoch_statistics().by_class) == EACH_ONCE
    assert epochs.end_epoch() == {"cache/hits": 0, "cache/misses": 0, "cache/hit_rate": 1.0}
    del loader
    # A dead worker's file is the next one's: they don't pile up.
    assert len(list((store / "statistics").glob("*.counts"))) <= 3
    assert figures(store_counts(store)) == {name: (2 * n, 0) for name, (n, _) in EACH_ONCE.items()}


def test_a_killed_worker_keeps_its_counts(reader, store):
    """SIGKILL right after a batch: it is counted, and later processes add nothing twice."""
    epochs = EpochStatistics(reader)
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            reader.get_batch(SAMPLE_IDS)
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert dict(epochs.end_epoch_statistics().by_class) == {"dog": (144, 0), "drum": (48, 0)}
    in_fork(lambda: reader[SAMPLE_IDS[1]])
    assert dict(epochs.end_epoch_statistics().by_class) == {"dog": (1, 0)}
    assert figures(store_counts(store)) == {"dog": (145, 0), "drum": (48, 0)}


def read_all(root, config):
    with EmbeddingCache(root).reader(config) as reader:
        reader.get_batch(SAMPLE_IDS)


def test_other_processes_are_kept_apart_and_added_up(cache, config, reader, store):
    """Another program's reads are in the store's sums and not in this one's epochs."""
    reader[SAMPLE_IDS[0]]
    epochs = EpochStatistics(reader)
    for _ in range(3):
        with peer_process() as peer:
            peer.call(read_all, cache.root, config)
    assert dict(epochs.end_epoch_statistics().by_class) == {}
    assert figures(store_counts(store)) == {"dog": (144, 0), "drum": (49, 0)}
    # This process's, and the last peer's, that the next one adds up.
    assert len(list((store / "statistics").glob("*.counts"))) == 2


def test_switched_off(reader, store, monkeypatch):
    """LMDBCACHE_STATISTICS=0: nothing is counted and no file is made."""
    monkeypatch.setenv(STATISTICS_VARIABLE, "0")
    reader.get_batch(SAMPLE_IDS)
    reader[SAMPLE_IDS[0]]
    with pytest.raises(SampleNotFoundError):
        reader["x:dog"]
    assert not (store / "statistics").exists()
    assert figures(store_counts(store)) == {}


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


def test_looking_makes_no_statistics(cache, config, store):
    """A reader that doesn't count as use makes no file to count in."""
    for verify in ("never", "always"):
        with EmbeddingReader(store, config, verify, track_usage=False) as reader:
            reader.get_batch(SAMPLE_IDS)
            reader.select(SAMPLE_IDS).get_batch(range(64))
            assert [reader[name][0] for name in SAMPLE_IDS] == list(range(64))
    assert not (store / "statistics").exists()


def test_a_worker_of_a_server_that_counts_nothing_works_for_who_sent_the_reader(reader, store):
    """A forkserver that has lmdbcache imported is no ancestor to count for."""
    sent = bytes(ForkingPickler.dumps(reader))  # as multiprocessing sends it

    def serve():  # in a process of another lineage that has read nothing, as a forkserver's is
        hit_counts._process = hit_counts._Process()
        return in_fork(lambda: pickle.loads(sent).get_batch(SAMPLE_IDS).shape)

    assert in_fork(serve) == (64, 16)
    assert figures(tree_counts(store)) == EACH_ONCE

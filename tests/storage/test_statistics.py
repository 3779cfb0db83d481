"""Hits and misses by class: exact over readers, workers and processes; no file in a read."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from small_disks import empty, fill, small_disk
from storage.child_processes import NOBODY, in_fork, peer_process, read

from lmdbcache import (
    EmbeddingCache,
    EmbeddingDataset,
    EmbeddingReader,
    EpochStatistics,
    ReadStatistics,
    collate_embeddings,
)
from lmdbcache.errors import ReadOnlyCacheError, SampleNotFoundError
from lmdbcache.storage import reset_statistics, statistics, statistics_of

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


def counted(store):
    return dict(statistics_of(store).by_class)


def read_all(root, config):
    with EmbeddingCache(root).reader(config) as reader:
        reader.get_batch(SAMPLE_IDS)
    return counted(reader.path)


# ---- the disk is left alone

FIRST_READ = """
import os, sys, time
from pathlib import Path
from lmdbcache import EmbeddingReader

store, changes = Path(sys.argv[1]), []
names = {"os.rename", "os.mkdir", "os.remove", "os.utime", "os.truncate", "os.link", "os.symlink"}

def watch(event, args):
    # A file that is opened may be made.
    if event in names or (event == "open" and isinstance(args[2], int) and args[2] & 0o103):
        changes.append((event, args))

def listing():
    # The lock file is LMDB's own: its reader table changes with each reader.
    paths = [p for p in [store, *store.rglob("*")] if p.name != "lock.mdb"]
    return sorted((str(p), p.stat().st_mtime_ns) for p in paths)

for name in ("fsync", "fdatasync", "sync"):
    setattr(os, name, lambda *args, name=name: changes.append((name, args)))
sys.addaudithook(watch)
before = listing()
reader = EmbeddingReader(store)
reader["001:dog"]
reader.get_batch(["001:dog", "002:dog"])
reader.select(["003:dog"]).get_batch([0])
assert not changes, changes
assert listing() == before
time.sleep(1.01)
reader["001:dog"]  # from here on a thread may write
while not (store / "statistics" / "totals.json").exists():
    time.sleep(0.01)
"""


def test_a_first_read_creates_renames_and_syncs_nothing(store):
    """Only a second later, beside the reads, what they were is written down."""
    (store / "last_used").unlink(missing_ok=True)
    subprocess.run([sys.executable, "-c", FIRST_READ, store], check=True, timeout=240)
    assert counted(store) == {"dog": (5, 0)}
    assert (store / "last_used").exists()


# ---- what counts


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
            assert counted(store) == {name: (number * n, 0) for name, (n, _) in EACH_ONCE.items()}
        if verify == "never":
            selection.copy_with([0, 1], lambda *_: None)
            selection.get_batch([-63, -64])
            selection.get_batch([])
            assert counted(store)["dog"][0] == 48 * len(ways) + 2


def test_names_of_one_store_count_together(cache, config, store, tmp_path):
    """By a link as by its own name; a store that is made again is counted by itself."""
    (tmp_path / "link").symlink_to(cache.root)
    linked = EmbeddingCache(tmp_path / "link")
    assert statistics.counts_of(linked.path(config)) is statistics.counts_of(store)
    before = read_all(cache.root, config)
    assert read_all(tmp_path / "link", config) == {
        name: (2 * hits, misses) for name, (hits, misses) in before.items()
    }
    store.rename(tmp_path / "moved")
    with cache.writer(config) as writer:
        writer.put_batch(SAMPLE_IDS, VALUES)
    assert statistics.counts_of(tmp_path / "moved") is not statistics.counts_of(store)
    assert read_all(cache.root, config) == before


def test_embeddings_of_different_lengths_are_counted(cache, config):
    """What LMDB is asked for one by one counts, too."""
    with cache.writer(config, ragged=True) as writer:
        for number in range(3):
            writer.put(f"{number}:dog", np.ones((number + 1, 4), np.float32))
    with cache.reader(config) as reader:
        for number in range(3):
            reader[f"{number}:dog"]
        reader.get_batch(["1:dog", "1:dog"])
    assert counted(cache.path(config)) == {"dog": (5, 0)}


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
    assert counted(store) == {"(no class)": (0, 1), "cat": (0, 2), "dog": (0, 2)}


def test_more_classes_than_there_is_room_for(cache, config):
    """They are summed up under one name; nothing is lost."""
    names = [f"clip:class {number}" for number in range(1500)]
    with cache.writer(config) as writer:
        writer.put_batch(names, np.ones((1500, 4), np.float32))
    with cache.reader(config) as reader:
        reader.get_batch(names)
    found = statistics_of(cache.path(config))
    assert found.hits == 1500
    assert found.by_class["class 7"] == (1, 0)
    assert found.by_class["(other)"][0] > 400


def test_switched_off(reader, store, monkeypatch):
    """LMDBCACHE_STATISTICS=0: nothing is counted and no file is made."""
    monkeypatch.setenv(statistics.STATISTICS_VARIABLE, "0")
    reader.get_batch(SAMPLE_IDS)
    reader[SAMPLE_IDS[0]]
    with pytest.raises(SampleNotFoundError):
        reader["x:dog"]
    reader.close()
    assert not (store / "statistics").exists()
    assert counted(store) == {}


def test_looking_makes_no_statistics(store, config):
    """A reader that doesn't count as use makes no file to count in."""
    for verify in ("never", "always"):
        with EmbeddingReader(store, config, verify, track_usage=False) as reader:
            reader.get_batch(SAMPLE_IDS)
            reader.select(SAMPLE_IDS).get_batch(range(64))
            assert [reader[name][0] for name in SAMPLE_IDS] == list(range(64))
    assert not (store / "statistics").exists()


def test_threads_lose_nothing(store, monkeypatch):
    """Several threads with readers of their own, and more that write the totals meanwhile."""
    monkeypatch.setattr(statistics, "_SECONDS_BETWEEN", 0.0)

    def read():
        with EmbeddingReader(store) as own:
            for _ in range(50):
                own.get_batch(SAMPLE_IDS)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted(store) == {"dog": (9600, 0), "drum": (3200, 0)}


# ---- the store's totals


def test_processes_are_added_up(cache, config, reader, store):
    """What others have read is in the totals once they have closed, ended, or read for a second."""
    reader[SAMPLE_IDS[0]]
    for _ in range(2):
        with peer_process() as peer:
            peer.call(read, cache.root, config, SAMPLE_IDS)
    in_fork(lambda: read_all(cache.root, config))
    assert counted(store) == {"dog": (144, 0), "drum": (49, 0)}


def test_a_killed_process_loses_what_it_has_not_added(reader, store):
    """What it has added before stays, and nothing is added twice."""
    pid = os.fork()
    if pid == 0:
        reader.get_batch(SAMPLE_IDS)
        reader.close()
        reader.get_batch(SAMPLE_IDS)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert counted(store) == EACH_ONCE


def test_reset_begins_at_zero(reader, store):
    """What this process has read before and not added yet goes as well."""
    reader.get_batch(SAMPLE_IDS)
    reset_statistics(store)
    assert counted(store) == {}
    reader[SAMPLE_IDS[0]]
    reader.close()
    assert counted(store) == {"drum": (1, 0)}


def test_cleared_and_made_again(cache, config, reader, store):
    """A cleared store takes its statistics along; the new one has its own."""
    reader.get_batch(SAMPLE_IDS)
    cache.clear(config)
    assert not store.exists()
    with cache.writer(config) as writer:
        writer.put_batch(SAMPLE_IDS, VALUES)
    with cache.reader(config) as again:
        again.get_batch(SAMPLE_IDS[:4])
    assert counted(store) == {"dog": (3, 0), "drum": (1, 0)}


def test_removed_statistics_begin_again(reader, store):
    """The folder is derived: it may be removed at any time."""
    reader.get_batch(SAMPLE_IDS)
    reader.close()
    shutil.rmtree(store / "statistics")
    reader.get_batch(SAMPLE_IDS)
    assert counted(store) == EACH_ONCE


@pytest.mark.parametrize(
    "text", ['{"hits": {"a": Infinity}, "misses": {}}', "[" * 100_000, "{", '{"hits": [], "b": 1}']
)
def test_totals_of_another_form_are_ignored(cache, config, store, text):
    """Whatever is written there, reading goes on and counts."""
    (store / "statistics").mkdir()
    (store / "statistics" / "totals.json").write_text(text)
    assert in_fork(lambda: read_all(cache.root, config)) == EACH_ONCE
    assert counted(store) == EACH_ONCE


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_folder_that_cannot_be_written(config):
    """Reading goes on, and this process's own statistics are there; resetting them is an error."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    cache = EmbeddingCache(folder / "cache")
    with cache.writer(config) as writer:
        writer.put_batch(SAMPLE_IDS, VALUES)
    store = cache.path(config)

    def refused():
        with pytest.raises(ReadOnlyCacheError):
            reset_statistics(store)

    try:
        assert in_fork(lambda: read_all(cache.root, config), user=NOBODY) == EACH_ONCE
        assert not (store / "statistics").exists()
        read_all(cache.root, config)
        in_fork(refused, user=NOBODY)
        assert counted(store) == EACH_ONCE
    finally:
        shutil.rmtree(folder)


def test_full_disk(config, tmp_path):
    """No room for the totals: reading goes on, and they are written when there is room."""
    with small_disk(tmp_path / "disk", 64) as disk:
        cache = EmbeddingCache(disk / "cache")
        with cache.writer(config) as writer:
            writer.put_batch(SAMPLE_IDS, VALUES)
        store = cache.path(config)
        with cache.reader(config) as reader:
            fill(disk, 0)
            reader.get_batch(SAMPLE_IDS)
            reader.close()
            assert counted(store) == EACH_ONCE
            assert not (store / "statistics" / "totals.json").exists()
            empty(disk)
            reader.get_batch(SAMPLE_IDS)
            reader.close()
        assert json.loads((store / "statistics" / "totals.json").read_text())["hits"]["dog"] == 96


def test_a_lock_that_is_never_given_back_delays_a_close_and_no_more(
    cache, config, store, monkeypatch
):
    """A stopped process holds the folder's lock: what is read is kept in memory."""
    monkeypatch.setattr(statistics, "_SECONDS_FOR_LOCK", 0.05)
    read_all(cache.root, config)
    with (store / "statistics" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert in_fork(lambda: read_all(cache.root, config))["dog"] == (96, 0)
    assert counted(store) == EACH_ONCE


# ---- epochs


@pytest.mark.parametrize(
    ("method", "persistent"),
    [("fork", False), ("fork", True), ("forkserver", False), ("forkserver", True)],
)
def test_epochs_of_workers_are_summed(reader, store, method, persistent):
    """Each epoch has exactly its own hits, however the workers start and for how long they live."""
    epochs = EpochStatistics(reader)
    loader = torch.utils.data.DataLoader(
        EmbeddingDataset(reader, SAMPLE_IDS, collated=True),
        batch_size=10,
        num_workers=2,
        multiprocessing_context=method,
        persistent_workers=persistent,
        collate_fn=collate_embeddings,
    )
    for _ in range(2):
        assert sum(len(batch) for batch in loader) == 64
        assert dict(epochs.end_epoch_statistics().by_class) == EACH_ONCE
    assert epochs.end_epoch() == {"cache/hits": 0, "cache/misses": 0, "cache/hit_rate": 1.0}
    # Files of workers that have ended are removed.
    time.sleep(0.1)
    epochs.end_epoch()
    left = list(Path(statistics.family()).glob(f"{statistics._prefix(store)}*"))
    assert len(left) <= (2 if persistent else 0)
    del loader
    # Workers add to the totals as they end.
    deadline = time.monotonic() + 60
    twice = {name: (2 * n, 0) for name, (n, _) in EACH_ONCE.items()}
    while counted(store) != twice and time.monotonic() < deadline:
        time.sleep(0.05)
    assert counted(store) == twice


def test_a_killed_worker_keeps_its_epoch(reader, store):
    """SIGKILL right after a batch: it is in the epoch, and in no later one."""
    epochs = EpochStatistics(reader)
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            reader.get_batch(SAMPLE_IDS)
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert epochs.end_epoch_statistics() == ReadStatistics({"dog": (144, 0), "drum": (48, 0)})
    in_fork(lambda: reader[SAMPLE_IDS[1]])
    assert epochs.end_epoch_statistics() == ReadStatistics({"dog": (1, 0)})


def test_other_programs_are_in_no_epoch(cache, config, reader):
    """Only this process, what it starts, and what these start."""
    epochs = EpochStatistics(cache)
    with peer_process() as peer:
        peer.call(read, cache.root, config, SAMPLE_IDS)
    assert epochs.end_epoch_statistics().hits == 0
    in_fork(lambda: in_fork(lambda: reader[SAMPLE_IDS[0]]))
    assert epochs.end_epoch_statistics().hits == 1


def test_a_worker_of_a_server_counts_for_the_sender_of_its_reader(reader):
    """A forkserver that has lmdbcache imported belongs to no family itself."""
    epochs = EpochStatistics(reader)
    sent = bytes(ForkingPickler.dumps(reader))  # as multiprocessing sends it

    def serve():
        statistics._family = None  # as in a forkserver
        return in_fork(lambda: pickle.loads(sent).get_batch(SAMPLE_IDS).shape)

    assert in_fork(serve) == (64, 16)
    assert dict(epochs.end_epoch_statistics().by_class) == EACH_ONCE

"""Readers in DataLoader workers of every kind, and across forks of threaded processes."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading

import numpy as np
import pytest
import torch
from storage.child_processes import in_fork, open_database_files, peer_process, read, write
from storage.worker_churn import assert_nothing_piles_up, fill, run_epochs

from lmdbcache import EmbeddingDataset, EmbeddingReader, collate_embeddings
from lmdbcache.storage import environment, forking

SAMPLE_IDS = [f"{n:03d}:{'dog' if n % 2 else 'drum'}" for n in range(64)]
VALUES = np.arange(64, dtype=np.float32)[:, None] * np.ones(16, np.float32)


@pytest.fixture
def reader(cache, config):
    with cache.writer(config) as writer:
        writer.put_batch(SAMPLE_IDS, VALUES)
    with cache.reader(config) as reader:
        yield reader


def slots(reader):
    """Process ids in LMDB's reader table."""
    lines = reader._holder.environment.env.readers().split("\n")[1:-1]
    return [int(line.split()[0]) for line in lines]


@pytest.mark.parametrize(
    ("method", "persistent"),
    [("fork", False), ("fork", True), ("spawn", True), ("forkserver", False)],
)
def test_dataloader_workers_read_right_values(reader, method, persistent):
    """Whatever the workers' kind, with a reader open before: right values, few reader slots."""
    np.testing.assert_array_equal(reader.get_batch(SAMPLE_IDS), VALUES)
    dataset = EmbeddingDataset(reader, labels=list(range(64)))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=10,
        shuffle=True,
        num_workers=2 if method == "fork" else 1,  # the others import torch anew
        multiprocessing_context=method,
        persistent_workers=persistent,
        collate_fn=collate_embeddings,
    )
    for _ in range(2):
        seen = []
        for embeddings, labels in loader:
            assert embeddings.shape == (len(labels), 16)
            assert torch.equal(embeddings[:, 0], labels.to(torch.float32))
            seen += labels.tolist()
            # One for this process and one for each worker; the dead ones are cleared at an open.
            assert slots(reader).count(os.getpid()) == 1
            assert len(slots(reader)) <= 2 + 2 * 3
        assert sorted(seen) == list(range(64))
        np.testing.assert_array_equal(reader.get_batch(SAMPLE_IDS), VALUES)
    del loader
    with EmbeddingReader(reader.path) as other:
        assert len(other) == 64
    reader.close()
    with EmbeddingReader(reader.path) as other:
        assert len(other) == 64
        assert slots(other) == [os.getpid()]


def test_unopened_reader_works_in_forked_workers(cache, config, reader):
    """A reader that nobody has read from before the fork opens in each worker."""
    reader.close()
    dataset = EmbeddingDataset(cache.reader(config), sample_ids=SAMPLE_IDS)
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, num_workers=2)
    batches = torch.cat(list(loader))
    np.testing.assert_array_equal(batches.numpy(), VALUES)


def test_fork_while_other_threads_read(reader):
    """A child forked in the middle of other threads' reads opens the store and reads."""
    stop = threading.Event()
    own = EmbeddingReader(reader.path)

    def read_on():
        while not stop.is_set():
            reader.get_batch(SAMPLE_IDS)
            own.refresh()
            own.close()
            len(own)

    threads = [threading.Thread(target=read_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            np.testing.assert_array_equal(in_fork(lambda: reader.get_batch(SAMPLE_IDS)), VALUES)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    own.close()


def test_fork_from_a_thread(reader):
    """A thread may fork, too, while the main thread has the reader open."""
    found = []

    def fork():
        found.append(in_fork(lambda: reader.get_batch(SAMPLE_IDS)))
        found.append(reader.get_batch(SAMPLE_IDS))

    threads = [threading.Thread(target=fork) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for batch in found:
        np.testing.assert_array_equal(batch, VALUES)


def test_fork_goes_on_after_a_refused_fork(reader, monkeypatch):
    """The gate that a fork closes opens again in parent and child."""
    for _ in range(3):
        assert in_fork(lambda: in_fork(lambda: len(reader))) == 64
    assert not forking.no_fork.is_forking
    assert forking.no_fork.depth == 0
    assert forking.no_fork._num_inside == 0


def test_child_inherits_no_environment(reader):
    """After the fork the child has let go of what it inherited: no file, no map."""

    def inherited():
        with open("/proc/self/maps") as maps:
            mapped = [line for line in maps if ".mdb" in line]
        return mapped, open_database_files(), len(environment._environments)

    assert in_fork(inherited) == ([], [], 0)


def test_killed_children_do_not_disturb(reader, cache, config):
    """Children that are killed while reading leave the store to others."""
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            while True:
                reader.get_batch(SAMPLE_IDS)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    np.testing.assert_array_equal(reader.get_batch(SAMPLE_IDS), VALUES)
    with peer_process() as peer:
        assert peer.call(write, cache.root, config, {"new:x": np.zeros(16)}) == 1
        assert not peer.call(read, cache.root, config, ["new:x"]).any()
    assert "new:x" in reader


def test_garbage_collected_readers_give_their_environment_back_later(reader):
    """A reader collected in the middle of another call closes nothing before that has ended."""
    reader.close()
    cyclic = EmbeddingReader(reader.path)
    len(cyclic)
    held = cyclic._holder.environment
    cyclic.itself = cyclic
    with forking.no_fork:
        del cyclic
        gc.collect()
        assert held.users == 1
        assert list(environment._environments.values()) == [held]
    assert held.users == 0
    assert not environment._environments


def test_epochs_pile_up_neither_slots_nor_descriptors(cache, config):
    """A slice of the long run: new workers in each epoch leave nothing behind."""
    fill(cache, config)
    with cache.reader(config) as own:
        assert_nothing_piles_up(run_epochs(own, "fork", False, 8, 2), 2)


def error_of_killed_epoch(loader):
    epoch = iter(loader)
    next(epoch)
    errors = []
    # Torch's signal handler may raise at any moment until the worker is off its list.
    try:
        os.kill(epoch._workers[0].pid, 9)
        try:
            list(epoch)
        except (RuntimeError, EOFError, OSError) as error:  # whichever torch notices first
            errors.append(error)
    except RuntimeError as error:
        errors.append(error)
    with contextlib.suppress(RuntimeError):
        epoch._shutdown_workers()
    return errors


def test_killed_loader_worker_is_torchs_error_and_no_more(cache, config, request):
    """A worker killed with SIGKILL ends its epoch; the next ones, and writers, go on."""
    fill(cache, config)
    own = cache.reader(config)
    request.addfinalizer(own.close)
    dataset = EmbeddingDataset(own, labels=list(range(64)))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=2, collate_fn=collate_embeddings
    )
    assert len(own) == 64
    for _ in range(3):
        assert error_of_killed_epoch(loader)
        seen = torch.cat([labels for _, labels in loader]).tolist()
        assert seen == list(range(64))
    with peer_process() as peer:
        assert peer.call(write, cache.root, config, {"new:x": np.zeros(16)}) == 1
    assert "new:x" in own


def test_forks_while_a_writer_is_open(cache, config):
    """Children forked with a writer open read what is committed, don't disturb it, and may write
    with one of their own."""
    fill(cache, config)
    with cache.writer(config) as writer, cache.reader(config) as own:
        for n in range(6):
            writer.put(f"pending{n}:x", np.full(16, n, np.float32))
            child = in_fork(lambda: own.get_batch(["005:x"])[0, 0])
            assert child == 5
            assert in_fork(lambda n=n: write(cache.root, config, {f"child{n}:x": np.ones(16)})) == 1
            if n % 2:
                assert writer.commit() == 2
                assert in_fork(lambda n=n: own.get_batch([f"pending{n}:x"])[0, 0]) == n
        own.refresh()
        assert len(own) == 64 + 6 + 6
    assert cache.verify(config).is_sound


def test_an_inherited_reader_may_end_in_the_child(cache, config, reader):
    """Whoever lets go of it there ends nothing of the parent's, nor complains."""
    kept = [cache.reader(config)]
    assert len(kept[0]) == len(SAMPLE_IDS)

    def let_go():
        complaints = []
        sys.unraisablehook = lambda found: complaints.append(repr(found.exc_value))
        kept.clear()
        gc.collect()
        with cache.reader(config) as own:
            assert len(own) == len(SAMPLE_IDS)
        return complaints

    assert in_fork(let_go) == []
    assert len(kept.pop()) == len(SAMPLE_IDS)

"""Hundreds of epochs of DataLoader workers, and thousands of short-lived readers."""

from __future__ import annotations

import os
import random
import time

import numpy as np
import pytest
from storage.child_processes import in_fork, peer_process, write
from storage.worker_churn import (
    NUM_SAMPLES,
    assert_nothing_piles_up,
    descriptors,
    fill,
    run_epochs,
    table,
)

pytestmark = pytest.mark.stress
NUM_WORKERS = 4
# A spawned worker imports torch anew, 2 s on one core: fewer epochs of those.
EPOCHS = {
    ("fork", False): 500,
    ("fork", True): 500,
    ("forkserver", False): 20,
    ("forkserver", True): 500,
    ("spawn", False): 20,
    ("spawn", True): 500,
}


@pytest.mark.parametrize(("method", "persistent"), EPOCHS)
def test_epochs_leave_nothing_behind(cache, config, method, persistent):
    """Reader slots and descriptors stay as many as after the first epochs."""
    fill(cache, config)
    with cache.reader(config) as reader:
        num_epochs = EPOCHS[method, persistent]
        churn = run_epochs(reader, method, persistent, num_epochs, NUM_WORKERS)
        assert_nothing_piles_up(churn, NUM_WORKERS)
        print(
            f"{num_epochs} epochs x {NUM_WORKERS} workers, {method}, persistent {persistent}: "
            f"at most {churn.most_slots} reader slots, descriptors "
            f"{churn.descriptors[0]} -> {churn.descriptors[-1]}"
        )


def test_hundreds_of_forked_readers_half_of_them_killed(cache, config):
    """400 forked readers, every other killed while it reads, beside a writer: slots stay few."""
    fill(cache, config)
    moments = random.Random(0)
    names = [f"{n:03d}:x" for n in range(NUM_SAMPLES)]
    before = descriptors()
    most, wrong = 0, 0
    with cache.reader(config) as reader:
        assert len(reader) == NUM_SAMPLES
        for number in range(200):
            pid = os.fork()
            if pid == 0:
                while True:
                    reader.get_batch(names)
                    reader.refresh()
            found = in_fork(lambda: reader.get_batch(names))
            wrong += int((found[:, 3] != range(NUM_SAMPLES)).any())
            time.sleep(moments.random() * 0.02)
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            if number % 20 == 0:
                with peer_process() as peer:
                    peer.call(write, cache.root, config, {f"new{number}:x": np.zeros(16)})
            most = max(most, len(table(reader)))
        assert reader.refresh()
        assert len(reader) == NUM_SAMPLES + 10
        assert most <= 6
        assert wrong == 0
        assert descriptors() <= before + 8
    assert cache.verify(config).is_sound
    print(f"400 forked readers, 200 killed: at most {most} reader slots, wrong: {wrong}")

"""CachedEncoder: in threads, forked and spawned processes, and DDP ranks."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from storage.child_processes import in_fork, peer_process
from training.encoders import (
    OWN,
    WIDTH,
    ask,
    build,
    direct,
    names_of,
    stored,
    waveforms_of,
)

from lmdbcache import CachedEncoder


def test_threads_compute_nothing_twice(encoder, model):
    """Four threads that ask for the same samples share one computation."""
    threads = [threading.Thread(target=ask, args=(encoder, range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.passes == [20]


def ask_and_close(encoder, numbers):
    found = ask(encoder, numbers)
    encoder.close()
    return found.numpy(), encoder.num_computed


def test_forked_process_has_its_own_writer(encoder, model, cache):
    """A child commits what it computes; what the parent has waiting stays the parent's."""
    ask(encoder, [1])
    found, _ = in_fork(lambda: ask_and_close(encoder, [2, 3]))
    np.testing.assert_array_equal(found, direct([2, 3]).numpy())
    assert list(stored(cache)) == names_of([2, 3])
    ask(encoder, [1, 2, 3])
    assert model.passes == [1]
    encoder.close()
    assert list(stored(cache)) == names_of([1, 2, 3])


def test_pickles_as_settings_and_model(encoder, cache):
    """A copy in a spawned process, or here, has reader and writer of its own."""
    ask(encoder, [1])
    with peer_process() as peer:
        found, computed = peer.call(ask_and_close, encoder, [1, 2])
    assert computed == 2 + encoder.num_computed  # it can't know what waits here
    torch.testing.assert_close(torch.from_numpy(found), direct([1, 2]), atol=2e-7, rtol=0)
    encoder.close()
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(ask(copied, [2, 1]), ask(encoder, [2, 1]))
        assert copied.num_computed == 1
        copied.close()
    lazy = pickle.loads(pickle.dumps(CachedEncoder(cache, OWN, build)))
    assert not lazy._frozen.is_built
    ask(lazy, [1])
    lazy.close()


SCRIPT = """
import multiprocessing, sys
from training.encoders import *
from lmdbcache import CachedEncoder, CacheConfig
config = CacheConfig(model_name="own", front_end="own/1", output="embedding")

def work(numbers):
    encoder = CachedEncoder(sys.argv[1], config, build)
    encoder(waveforms_of(numbers), sample_ids=names_of(numbers))

if __name__ == "__main__":
    work([1])
    for number, method in enumerate(["fork", "spawn"]):
        process = multiprocessing.get_context(method).Process(target=work, args=([10 + number],))
        process.start()
        process.join()
    encoder = CachedEncoder(sys.argv[1], config, build)
    encoder(waveforms_of([2]), sample_ids=names_of([2]))
    raise ValueError("own bug")
"""


def test_the_end_of_a_process_commits(cache, tmp_path):
    """Encoders that nobody closed, dropped ones and those of child processes lose nothing."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", script, cache.root],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"},
    )
    assert "ValueError: own bug" in done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert list(stored(cache)) == names_of([1, 2, 10, 11])


def train_rank(root, rank, folder):
    """One rank of a DDP job: 3 epochs over overlapping samples."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    encoder = CachedEncoder(root, OWN, build)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = encoder, torch.nn.Linear(WIDTH, 1)

        def forward(self, waveforms, sample_ids):
            return self.head(self.encoder(waveforms, sample_ids=sample_ids))

    network = torch.nn.parallel.DistributedDataParallel(Network())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    seen = range(5) if rank == 0 else range(3, 10)
    for _ in range(3):
        optimizer.zero_grad()
        network(waveforms_of(seen), names_of(seen)).square().mean().backward()
        optimizer.step()
    encoder.close()
    torch.distributed.destroy_process_group()
    weight = network.module.head.weight.detach().numpy()
    return SimpleNamespace(computed=encoder.num_computed, weight=weight)


def test_under_ddp(cache, tmp_path):
    """Two ranks share one store; each computes its misses once; the heads stay in step."""
    with peer_process() as first, peer_process() as second:
        first.start(train_rank, cache.root, 0, str(tmp_path))
        second.start(train_rank, cache.root, 1, str(tmp_path))
        ranks = [first.answer(), second.answer()]
    assert ranks[0].computed <= 5
    assert ranks[1].computed <= 7
    assert ranks[0].computed + ranks[1].computed >= 10
    np.testing.assert_array_equal(ranks[0].weight, ranks[1].weight)
    assert list(stored(cache)) == names_of(range(10))


def test_two_that_miss_the_same_sample(cache):
    """Both compute it, the first commit is kept, and then both answer with what is stored."""
    computed, found = {}, {}
    with peer_process() as first, peer_process() as second:
        peers = {"first": first, "second": second}
        for name, peer in peers.items():
            value = 1.0 if name == "first" else 2.0
            computed[name] = peer.call(open_and_ask, cache.root, value)
        for name, peer in peers.items():
            found[name] = peer.call(flush_and_ask)
        for peer in peers.values():
            peer.call(close_opened)
    assert computed == {"first": 1.0, "second": 2.0}
    assert found == {"first": 1.0, "second": 1.0}
    assert {name: float(value[0]) for name, value in stored(cache).items()} == {"clip_001:x": 1.0}


opened = []


def open_and_ask(root, value):
    """Compute a sample, and commit nothing yet."""
    encoder = CachedEncoder(root, OWN, lambda inputs: inputs.new_full((len(inputs), 2), value))
    opened.append(encoder)
    return float(ask(encoder, [1])[0, 0])


def flush_and_ask():
    (encoder,) = opened
    encoder.flush()
    return float(ask(encoder, [1])[0, 0])


def close_opened():
    opened.pop().close()

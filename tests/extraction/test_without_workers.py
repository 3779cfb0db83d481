"""Clips where decoding processes can't start, or there is no shared memory to hand over in."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import soundfile
import torch

from lmdbcache import CacheConfig, EmbeddingCache, ModuleEmbedder, config_for, extract
from lmdbcache.errors import ConfigError, ExtractionError
from lmdbcache.extraction.decoding import FeatureBatches

RATE, SECONDS = 16000, 10.0
# Two clips of a batch are 1.2 MiB of features.
SHARED_MEMORY = {
    "small": "mount -t tmpfs -o size=1m tmpfs /dev/shm",
    "nearly full": "mount -t tmpfs -o size=4k tmpfs /dev/shm",
    "full": "mount -t tmpfs -o size=64k tmpfs /dev/shm; cat /dev/zero > /dev/shm/ballast",
    "read-only": "mount -t tmpfs -o ro tmpfs /dev/shm",
}
PROGRAM = """
import json, sys
from extraction.test_without_workers import extract_means

extract_means(sys.argv[1], json.loads(sys.argv[2]), num_workers=2)
"""
PRELOAD = """
import sys
from extraction.test_without_workers import MODEL, SECONDS
from lmdbcache import EmbeddingCache, config_for
from lmdbcache.errors import CacheFullError
from lmdbcache.training import preload

cache = EmbeddingCache(sys.argv[1])
reader = cache.reader(config_for(MODEL, duration=SECONDS))
try:
    preload(reader)
except CacheFullError as error:
    print(error)
"""


class Means(torch.nn.Module):
    """As much as went in comes out, so that it can be compared."""

    def forward(self, waveforms):
        return waveforms.reshape(len(waveforms), 100, -1).mean(2)


MODEL = ModuleEmbedder(Means(), name="means/1", sample_rate=RATE)


def extract_means(root, clips, **options):
    config = config_for(MODEL, duration=SECONDS)
    return extract(EmbeddingCache(root), config, clips, model=MODEL, batch_size=2, **options)


@pytest.fixture(scope="module")
def noises(tmp_path_factory):
    """Eight clips of ten seconds: sample id → samples, sample id → path."""
    folder = tmp_path_factory.mktemp("noises")
    samples, paths = {}, {}
    for number in range(8):
        sample_id = f"c{number}:dog"
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, int(RATE * SECONDS))
        samples[sample_id] = noise.astype(np.float32)
        paths[sample_id] = str(folder / f"{number}.wav")
        soundfile.write(paths[sample_id], samples[sample_id], RATE, subtype="FLOAT")
    return samples, paths


def check_stored(root, samples):
    with EmbeddingCache(root).reader(config_for(MODEL, duration=SECONDS)) as reader:
        assert len(reader) == len(samples)
        for sample_id, noise in samples.items():
            np.testing.assert_allclose(reader[sample_id], noise.reshape(100, -1).mean(1), atol=1e-6)


def run_with(shared_memory, program, *arguments):
    """A Python program that finds such a /dev/shm; the test is skipped where none can be made."""
    command = ["unshare", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("/dev/shm can't be exchanged here: that needs root")
    setup = f'({SHARED_MEMORY[shared_memory]}) 2> /dev/null; exec "$@"'
    return subprocess.run(
        [*command, setup, "sh", sys.executable, "-c", program, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": "tests"},
    )


@pytest.mark.parametrize("shared_memory", SHARED_MEMORY)
def test_little_shared_memory_costs_no_clip(tmp_path, noises, shared_memory):
    """All clips get their own embedding without shared memory for features or semaphores."""
    samples, paths = noises
    done = run_with(shared_memory, PROGRAM, tmp_path / "cache", json.dumps(paths))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr
    # Without semaphores there are no workers, and somebody has to know why it takes so long.
    assert ("decoded in this process" in done.stderr) == (shared_memory != "small")
    check_stored(tmp_path / "cache", samples)


@pytest.mark.parametrize("shared_memory", ["full", "read-only"])
def test_preload_without_shared_memory_is_our_error(tmp_path, noises, shared_memory):
    """What doesn't fit into /dev/shm is refused before anything is copied there."""
    extract_means(tmp_path / "cache", noises[1], num_workers=0)
    done = run_with(shared_memory, PRELOAD, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "/dev/shm" in done.stdout


@pytest.fixture
def openmp_threads():
    """This process computes with threads that a forked child doesn't have, and would wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("openmp_threads")
def test_a_forked_process_extracts_after_its_parent_did(tmp_path, noises):
    """It doesn't wait for the parent's threads, which it has not."""
    samples, paths = noises
    extract_means(tmp_path / "parent", paths, num_workers=0)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pool.submit(extract_means, tmp_path / "cache", paths, num_workers=2).result(100)
    check_stored(tmp_path / "cache", samples)


FORKS = """
import json, multiprocessing, os, sys
from extraction.test_without_workers import extract_means

cache, paths = sys.argv[1], json.loads(sys.argv[3])
extract_means(cache + "-parent", paths, num_workers=0)
if sys.argv[2] == "fork":
    if not (child := os.fork()):
        extract_means(cache, paths, num_workers=2)
        os._exit(0)
    sys.exit(os.waitpid(child, 0)[1])
multiprocessing.set_start_method("fork")  # still open after an extraction
child = multiprocessing.Process(target=extract_means, args=(cache, paths))
child.start()
child.join()
sys.exit(child.exitcode)
"""


@pytest.mark.parametrize("kind", ["fork", "Process"])
def test_however_it_was_forked(tmp_path, noises, kind):
    """So does a child by `os.fork`, or a `Process` of the default start method."""
    samples, paths = noises
    program = [sys.executable, "-c", FORKS, str(tmp_path / "cache"), kind, json.dumps(paths)]
    environment = {**os.environ, "PYTHONPATH": "tests", "OMP_NUM_THREADS": "2"}
    subprocess.run(program, check=True, timeout=100, env=environment)
    check_stored(tmp_path / "cache", samples)


@pytest.mark.usefixtures("openmp_threads")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_daemonic_process_extracts(tmp_path, noises, method):
    """In a Pool's process, which may start no others, clips are decoded in it."""
    samples, paths = noises
    extract_means(tmp_path / "parent", paths, num_workers=0)
    with multiprocessing.get_context(method).Pool(1) as pool:
        summary = pool.apply(extract_means, (tmp_path / "cache", paths))
    assert summary.num_extracted == len(samples)
    check_stored(tmp_path / "cache", samples)


class _Clips(torch.utils.data.Dataset):
    def __init__(self, root, paths):
        self.root, self.paths = root, paths

    def __len__(self):
        return 1

    def __getitem__(self, _):
        return extract_means(self.root, self.paths, num_workers=2).num_extracted


def test_a_dataloader_worker_extracts(tmp_path, noises):
    """So does a DataLoader's worker."""
    samples, paths = noises
    loader = torch.utils.data.DataLoader(_Clips(tmp_path / "cache", paths), num_workers=1)
    assert [int(number) for number in loader] == [len(samples)]
    check_stored(tmp_path / "cache", samples)


class _Unpicklable:
    """A front end that workers can't be given, where they aren't forked."""

    id = "unpicklable/1"

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, waveform):
        return waveform

    def provenance(self):
        return {}


class _UnpicklableError(ConfigError):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class _Failing(_Unpicklable):
    def __init__(self):
        pass

    def __call__(self, _):
        raise _UnpicklableError("this", "that")


def units_of(paths):
    return [[(sample_id, path)] for sample_id, path in paths.items()]


def test_workers_that_cannot_start_are_done_without(noises, monkeypatch):
    """A front end that can't be pickled to spawned workers is called in this process."""
    samples, paths = noises
    monkeypatch.setattr("lmdbcache.extraction.decoding.start_method", lambda: "spawn")
    config = CacheConfig(sample_rate=RATE, duration=SECONDS)
    batches = FeatureBatches(units_of(paths), config, _Unpicklable(), num_workers=2)
    try:
        found = {batch.sample_ids[0]: batch.features.numpy()[0] for batch in batches}
    finally:
        batches.close()
    assert found.keys() == samples.keys()
    for sample_id, noise in samples.items():
        np.testing.assert_allclose(found[sample_id], noise, atol=1e-6)


def test_an_error_that_cannot_be_handed_over_is_told(noises):
    """An error of the front end ends the run at once, though its class can't be unpickled."""
    config = CacheConfig(sample_rate=RATE, duration=SECONDS)
    batches = FeatureBatches(units_of(noises[1]), config, _Failing(), num_workers=2)
    try:
        with pytest.raises(ExtractionError, match="this"):
            next(batches)
    finally:
        batches.close()

"""The extraction on a local Ray cluster of two nodes, whose processes and nodes are killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from extraction.clips import write_bad, write_tones
from extraction.processes import PATIENCE
from extraction.ray_driver import frames, frames_config

from lmdbcache import EmbeddingCache, config_for, open_dataset
from lmdbcache.cache import SourceRecords
from lmdbcache.extraction import extract
from lmdbcache.storage import stored_checksums

pytest.importorskip("ray", reason="the extra [ray]")
# Each run starts half a dozen Python processes that import torch.
pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent
NUM_CLIPS = 120
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Host:
    """The process that holds the cluster."""

    def __init__(self, folder: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, HERE / "ray_host.py", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        self.address = json.loads(self.process.stdout.readline())

    def ask(self, what: str) -> int:
        """`add` or `kill` a node."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def actors(self) -> list[int]:
        """The processes that run the model."""
        return [pid for pid in descendants(self.process.pid) if "EmbedUnits" in command_of(pid)]

    def close(self) -> None:
        members = descendants(self.process.pid)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.communicate(timeout=30)
        for pid in [self.process.pid, *members]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def host():
    # A short path: Ray's sockets lie below it.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    host = Host(folder)
    yield host
    host.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Good clips, and some that can't be decoded; not to be changed."""
    folder = tmp_path_factory.mktemp("VEGAS")
    write_tones(folder, NUM_CLIPS)
    (folder / "drum" / "audios").mkdir(parents=True)
    bad = write_bad(folder / "drum" / "audios")
    shutil.rmtree(bad["folder:dog"][0])
    return folder


@pytest.fixture
def driver(host, cache, data):
    """Start a program that extracts with a module of its own; what is left running is killed."""
    started = []

    def driver(**options):
        given = {"data": str(data), "root": str(cache.root), "address": host.address}
        given |= {"batch_size": 2, "commit_seconds": 0.2, **options}
        command = subprocess.Popen(
            [sys.executable, HERE / "ray_driver.py", json.dumps(given)],
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        started.append(command)
        return command

    yield driver
    for command in started:
        command.kill()
        command.wait()
        command.stdout.close()


def sources_of(cache, config):
    """Sample id → what is recorded of its file."""
    with cache.reader(config) as reader:
        checksums = {key.decode(): checksum for key, checksum in stored_checksums(reader)}
    with SourceRecords(cache.path(config)) as records:
        return {name: source.below("") for name, source in records.of(checksums).items()}


def num_stored(cache, config) -> int:
    return cache.info(config).num_embeddings if config in cache else 0


def wait_for_more(command, cache, config, more=10) -> None:
    """Wait until the command has stored some more."""
    goal = num_stored(cache, config) + more
    process = getattr(command, "process", command)
    deadline = time.monotonic() + PATIENCE
    while num_stored(cache, config) < goal:
        is_alive = process.poll() is None if process is command else process.is_alive()
        assert is_alive
        assert time.monotonic() < deadline
        time.sleep(0.05)


def values(cache, config):
    with cache.reader(config) as reader:
        return dict(reader)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_what_is_killed_on_the_way(driver, host, cache, data, tmp_path):
    """No clip is lost, computed twice or changed in a bit, and no staged file is left behind.

    First the driver is killed; the run that goes on there loses an actor, then a node.
    """
    place, dataset = tmp_path / "staging place", open_dataset(data)
    config = frames_config(dataset.namespace)
    expected = EmbeddingCache(tmp_path / "expected")
    extract(expected, config, dataset, model=frames(), batch_size=2, num_workers=0)
    command = driver(staging=str(place))
    wait_for_more(command, cache, config)
    command.kill()
    command.wait(PATIENCE)
    before = num_stored(cache, config)

    command = driver(staging=str(place))
    wait_for_more(command, cache, config)
    os.kill(host.actors()[-1], signal.SIGKILL)
    wait_for_more(command, cache, config)
    host.ask("kill")
    try:
        assert command.wait(PATIENCE) == 0
    finally:
        host.ask("add")
    found = json.loads(command.stdout.read())
    assert found["num_extracted"] == num_stored(expected, config) - before
    assert found["num_cached"] == before
    assert [path for path in place.rglob("*") if path.is_file()] == []
    assert_same(values(cache, config), values(expected, config))
    assert sources_of(cache, config) == sources_of(expected, config)


def test_stopped_command(start, host, cache, data, ast_folder):
    """Ctrl-C keeps what came back; a run without Ray does the rest: all is as if there were no Ray.

    Nothing of Ray's is printed.
    """
    dataset = open_dataset(data)
    command = start(
        *("extract", data, "--root", cache.root, "--model", ast_folder, "--duration", 0.5),
        *("--batch-size", 2, "--commit-seconds", 0.2, "--launcher", "ray"),
        *("--ray-address", host.address, "--num-actors", 2),
    )
    config = config_for(ast_folder, duration=0.5, namespace=dataset.namespace)
    wait_for_more(command, cache, config, 30)
    command.signal(signal.SIGINT)
    assert command.wait() == 130, command.err
    before = num_stored(cache, config)
    *noise, last = command.err.splitlines()
    assert [line for line in noise if "has no clips of" not in line] == []
    assert f"interrupted; {before} of {len(dataset.samples)} are stored" in last
    assert command.out == ""

    caches = [cache, EmbeddingCache(cache.root.parent / "expected")]
    options = {"model": ast_folder, "batch_size": 2, "num_workers": 0, "dataset_root": data}
    rest, whole = [extract(one, config, dataset, **options) for one in caches]
    assert rest.num_extracted == NUM_CLIPS - before
    assert rest.failures == whole.failures
    assert_same(*[values(one, config) for one in caches])
    assert sources_of(caches[0], config) == sources_of(caches[1], config)
    assert len(sources_of(cache, config)) == NUM_CLIPS
    for name, value in caches[1].info(config).provenance.items():
        assert cache.info(config).provenance[name] == value


def test_unit_that_kills_its_process(driver):
    """A clip that ends every process that tries it ends the run, with one line."""
    command = driver(crashes=True, most_beginnings=2)
    assert command.wait(PATIENCE) == 1
    (line,) = command.stdout.read().splitlines()
    assert line.startswith("ExtractionError: ")
    assert "has ended its process 2 times" in line

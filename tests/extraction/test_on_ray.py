"""The extraction on a local Ray cluster of two nodes, whose processes and nodes are killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
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

from lmdbcache import EmbeddingCache, open_dataset
from lmdbcache.cache import ClipFailure, SourceRecords
from lmdbcache.errors import (
    CacheFullError,
    ConfigError,
    DatasetError,
    ExtractionError,
    MissingDependencyError,
    ModelLoadError,
    StorageError,
)
from lmdbcache.extraction import (
    ExtractionSummary,
    RankShare,
    extract,
    extract_on_ray,
    on_ray,
    space,
)
from lmdbcache.extraction.pipeline import ExtractionRun

pytest.importorskip("ray", reason="the extra [ray]")
# Each run starts half a dozen Python processes that import torch.
pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent
NUM_CLIPS = 40
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

    def ranks(self) -> list[int]:
        """The processes of the ranks, without those that decode for them."""
        found = [
            pid for pid in descendants(self.process.pid) if "_extract_share" in command_of(pid)
        ]
        below = {child for pid in found for child in descendants(pid)}
        return [pid for pid in found if pid not in below]

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
        given |= {"batch_size": 2, "commit_seconds": 0, **options}
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
        checksums = {key.decode(): checksum for key, checksum in reader.checksums()}
    with SourceRecords(cache.path(config)) as records:
        return {name: source.below("") for name, source in records.of(checksums).items()}


def num_stored(cache, config) -> int:
    return cache.info(config).num_embeddings if config in cache else 0


def num_staged(folder, config) -> int:
    """How many are staged; the stores are looked into while they are filled."""
    return sum(num_stored(EmbeddingCache(rank), config) for rank in folder.glob("world-*/rank-*"))


def wait_for_more(command, folder, config, more=2) -> None:
    """Wait until the command has staged some more."""
    goal = num_staged(folder, config) + more
    deadline = time.monotonic() + PATIENCE
    while num_staged(folder, config) < goal:
        assert command.poll() is None, command.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def values(cache, config):
    with cache.reader(config) as reader:
        return dict(reader)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.stress  # half a minute; killed ranks without Ray are in the short suite
def test_what_is_killed_on_the_way(driver, host, cache, data, tmp_path):
    """Whatever dies, no clip is lost or changed in a bit, and nothing stays staged.

    First the program is killed; the run that goes on there, with one rank more, loses a rank's
    process, then a node. Each rank stops after two batches, so that none is done before that.
    """
    folder, gate, dataset = tmp_path / "staging", tmp_path / "gate", open_dataset(data)
    config = frames_config(dataset.namespace)
    expected = EmbeddingCache(tmp_path / "expected")
    extract(expected, config, dataset, model=frames(), batch_size=2, num_workers=0)
    command = driver(staging=str(folder), num_actors=1, gate=str(gate))
    wait_for_more(command, folder, config)
    command.kill()
    command.wait(PATIENCE)
    while host.ranks():  # Ray ends them: their program is gone
        time.sleep(0.1)
    before = num_staged(folder, config)
    assert config not in cache

    command = driver(staging=str(folder), num_actors=2, gate=str(gate))
    wait_for_more(command, folder, config)
    os.kill(host.ranks()[-1], signal.SIGKILL)
    wait_for_more(command, folder, config)
    host.ask("kill")
    gate.touch()
    try:
        assert command.wait(PATIENCE) == 0, command.stdout.read()
    finally:
        host.ask("add")
    found = json.loads(command.stdout.read().splitlines()[-1])
    assert found["num_cached"] == before
    assert found["num_extracted"] == num_stored(expected, config) - before
    assert {failure["sample_id"].split(":")[1] for failure in found["failures"]} == {"drum"}
    assert not folder.exists()
    assert_same(values(cache, config), values(expected, config))
    assert sources_of(cache, config) == sources_of(expected, config)


def test_stopped_program(driver, cache, data, tmp_path):
    """Ctrl-C keeps what is computed; a run without Ray does the rest, as if there were no Ray."""
    dataset = open_dataset(data)
    config = frames_config(dataset.namespace)
    folder = cache.root.with_name("cache.staging")
    command = driver(gate=str(tmp_path / "gate"))
    wait_for_more(command, folder, config)
    command.send_signal(signal.SIGINT)
    assert command.wait(PATIENCE) == 130
    assert not folder.exists()
    before = num_stored(cache, config)
    assert before > 0

    caches = [cache, EmbeddingCache(cache.root.parent / "expected")]
    options = {"model": frames(), "batch_size": 2, "num_workers": 0}
    rest, whole = [extract(one, config, dataset, **options) for one in caches]
    assert rest.num_extracted == whole.num_extracted - before
    assert rest.failures == whole.failures
    assert_same(*[values(one, config) for one in caches])
    assert sources_of(caches[0], config) == sources_of(caches[1], config)


def test_clip_that_kills_its_process(driver):
    """What ends every process that tries it ends the run, with one line."""
    command = driver(crashes=True, retries=1, num_actors=1)
    assert command.wait(PATIENCE) == 1
    *_, line = command.stdout.read().splitlines()
    assert line.startswith("ExtractionError: ")
    assert "WorkerCrashedError" in line


# ---- one rank, in this process


@pytest.fixture
def ranks(clips, config, tmp_path):
    """Make the record of a run that this process began, and its mark."""
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / on_ray._MARK_NAME).write_text("this run")

    def ranks(model, config=config, clips=clips, **changes):
        made = on_ray._Ranks(
            config, model, None, "cpu", 4, 10.0, "", tmp_path / "staging", clips, ()
        )
        return dataclasses.replace(made, **changes), "this run"

    return ranks


def test_rank_leaves_out_what_is_stored(ranks, clips, tmp_path):
    """The root isn't seen from a node: the program says what it holds."""
    config = frames_config("vegas")
    stored = list(clips)[1:3]
    answer = on_ray._extract_share(ranks(frames(), config, stored=stored), RankShare(0, 1), None)
    assert answer.summary.num_extracted == len(clips) - 2
    assert answer.summary.num_cached == 2
    staged = EmbeddingCache(next((tmp_path / "staging").glob("world-*/rank-0")))
    assert values(staged, config).keys() == clips.keys() - set(stored)


def test_other_weights_on_a_node(ranks, ast_folder):
    """A node whose checkpoint isn't that of the run is refused, and named."""
    given = ranks(str(ast_folder), weights_digest="0123456789abcdef")
    with pytest.raises(ModelLoadError, match="0123456789abcdef") as caught:
        on_ray._extract_share(given, RankShare(), None)
    assert socket.gethostname() in str(caught.value)


def test_staging_folder_that_is_not_shared(ranks):
    """A folder of the node itself is noticed before anything is staged there."""
    given, mark = ranks(frames(), frames_config("vegas"))
    (given.folder / on_ray._MARK_NAME).write_text("another run")
    with pytest.raises(StorageError, match="`staging`"):
        on_ray._extract_share((given, mark), RankShare(), None)
    assert not list(given.folder.glob("world-*"))


def test_files_that_are_not_on_a_node(cache, clips):
    """A file that is here and not on a node ends the run; one that is nowhere is a failed clip."""
    run = ExtractionRun(cache, [frames_config("vegas")], {**clips, "gone:dog": "/nowhere/gone.wav"})
    summary = ExtractionSummary(None, 1, 0, failures=(ClipFailure("gone:dog", "", "absent"),))
    on_ray._add_up(run, [on_ray._Answer(summary, ("gone:dog",), "there")])
    with pytest.raises(DatasetError, match="there"):
        on_ray._add_up(run, [on_ray._Answer(summary, (next(iter(clips)),), "there")])


# ---- without a cluster


def test_nothing_to_do_needs_no_ray(cache, clips, monkeypatch):
    """A run that finds everything cached doesn't start Ray."""
    monkeypatch.setitem(sys.modules, "ray", None)
    config = frames_config("vegas")
    extract(cache, config, clips, model=frames(), num_workers=0)
    assert extract_on_ray(cache, config, clips, model=frames()).num_cached == len(clips)


def test_what_a_killed_run_has_left_replaces_nothing(cache, clips, monkeypatch):
    """What is stored by now may be of a newer file: only what is missing is merged."""
    monkeypatch.setitem(sys.modules, "ray", None)
    config = frames_config("vegas")
    extract(cache, config, clips, model=frames(), num_workers=0)
    expected = values(cache, config)
    with cache.reader(config) as reader:
        provenance = reader.metadata.provenance
    staging = cache.root.with_name("cache.staging")
    staged = EmbeddingCache(staging / "world-1-batch-8-0" / "rank-0")
    with staged.writer(config, provenance=provenance) as writer:
        writer.put(next(iter(clips)), np.zeros((20, 50), np.float32))
        writer.put("staged:dog", np.ones((20, 50), np.float32))
    extract_on_ray(cache, config, clips, model=frames())
    found = values(cache, config)
    assert np.array_equal(found.pop("staged:dog"), np.ones((20, 50), np.float32))
    assert_same(found, expected)
    assert not staging.exists()


def test_space_for_what_is_staged_as_well(cache, clips, monkeypatch):
    """On one disk both have to fit: the staged embeddings and the store they are merged into."""
    config = frames_config("vegas")
    needed = space.needed_bytes(clips, (20, 50), config.dtype)
    monkeypatch.setattr(space, "free_bytes", lambda _: needed * 3 // 2)
    with pytest.raises(CacheFullError):
        extract_on_ray(cache, config, clips, model=frames())


def test_ray_that_is_not_installed(cache, clips, monkeypatch):
    """The error names the extra."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"lmdbcache\[ray\]"):
        extract_on_ray(cache, frames_config("vegas"), clips, model=frames())


@pytest.mark.parametrize(
    "options",
    [
        {"num_actors": 0},
        {"batch_size": 0},
        {"device": "cuda:1"},
        {"address": "ray://head:10001"},
        {"staging": "s3://bucket/folder"},
    ],
)
def test_options_that_are_refused(cache, clips, options):
    """Before anything is started, by name."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        extract_on_ray(cache, frames_config("vegas"), clips, model=frames(), **options)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "[::1]:99999"])
def test_no_cluster_there(cache, clips, address):
    """An address where nothing answers is an error of one line, and quickly."""
    with pytest.raises(ExtractionError) as caught:
        extract_on_ray(cache, frames_config("vegas"), clips, model=frames(), address=address)
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)

"""Extractions that are interrupted, killed, robbed of a worker, or run twice at once."""

from __future__ import annotations

import json
import random
import signal
import time
from functools import partial

import numpy as np
import pytest
from extraction.clips import NUM_CLIPS
from extraction.processes import call_after, hold_after, signal_workers

from lmdbcache import CacheConfig, EmbeddingCache, model_identity


@pytest.fixture
def config(ast_folder):
    return CacheConfig(duration=0.5, model_name=model_identity(ast_folder), namespace="vegas")


@pytest.fixture
def begin(start, dataset_folder, ast_folder):
    """Start `lmdbcache extract` with a commit after every clip."""

    def begin(root, *options, prepare=None):
        fixed = ("--root", root, "--model", ast_folder, "--duration", 0.5, "--class", "dog")
        often = ("--batch-size", 1, "--commit-seconds", 0, "--num-workers", 1)
        return start("extract", dataset_folder, *fixed, *often, "--json", *options, prepare=prepare)

    return begin


@pytest.fixture
def num_stored(cache, config):
    def num_stored():
        if config not in cache:
            return 0
        with cache.reader(config) as reader:
            return len(reader)

    return num_stored


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, dataset_folder, ast_folder):
    """The same embeddings from one run."""
    from lmdbcache.extraction import extract

    cache = EmbeddingCache(tmp_path_factory.mktemp("uninterrupted"))
    config = CacheConfig(duration=0.5, model_name=model_identity(ast_folder), namespace="vegas")
    paths = sorted(dataset_folder.rglob("*.wav"))
    clips = {f"{path.stem}:dog": str(path) for path in paths}
    extract(cache, config, clips, model=ast_folder, batch_size=1, num_workers=0)
    with cache.reader(config) as reader:
        return dict(reader)


def check_equal(stored, expected):
    assert stored.keys() == expected.keys()
    for sample_id, value in expected.items():
        np.testing.assert_allclose(stored[sample_id], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_kills", [3, pytest.param(7, marks=pytest.mark.stress)])
def test_killed_again_and_again(begin, cache, config, num_stored, stored, uninterrupted, num_kills):
    """After kill -9 the store is sound, nothing committed is lost, and the next run goes on."""
    chance = random.Random(0)
    before, most = 0, NUM_CLIPS // 8  # of one run
    for _ in range(num_kills):
        command = begin(cache.root, prepare=partial(hold_after, most))
        command.wait_until(lambda before=before: num_stored() > before)
        time.sleep(chance.uniform(0, 0.15))
        command.signal(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        assert cache.verify(config).is_sound
        after = num_stored()
        assert before < after <= before + most
        before = after
    last = begin(cache.root)
    assert last.wait() == 0, last.err
    assert json.loads(last.out)["num_extracted"] == NUM_CLIPS - before
    check_equal(stored(), uninterrupted)


def test_orphans_of_a_killed_run_end(begin, cache, num_stored):
    """The decoding processes of a run that was killed notice it and end."""
    command = begin(cache.root, prepare=partial(hold_after, NUM_CLIPS // 2))
    command.wait_until(num_stored)
    session = command.members()
    assert len(session) >= 2
    command.signal(signal.SIGKILL)
    command.wait()
    while command.members():
        time.sleep(0.05)


@pytest.mark.parametrize("after", [1, 60])
def test_killed_worker(begin, cache, config, num_stored, after):
    """A decoding process that dies ends the run with one line; what was computed is stored."""
    kill = partial(signal_workers, signal.SIGKILL, 1)
    command = begin(cache.root, "--num-workers", 2, prepare=partial(call_after, after, kill))
    assert command.wait() == 1, command.out
    (line,) = command.err.splitlines()
    assert line.startswith("lmdbcache: a decoding process ended")
    assert "run again" in line
    assert command.members() == []
    assert 0 < num_stored() < NUM_CLIPS
    assert cache.verify(config).is_sound


def test_two_at_once(begin, cache, config, stored, uninterrupted):
    """Two runs that fill one store at the same time both end well and lose nothing."""
    both = [begin(cache.root), begin(cache.root, "--batch-size", 4)]
    for command in both:
        assert command.wait() == 0, command.err
        assert command.err == ""
        assert json.loads(command.out)["failures"] == []
    assert cache.verify(config).is_sound
    check_equal(stored(), uninterrupted)

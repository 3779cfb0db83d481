"""A compaction tells how far it is, what it would do, and stops when it is told to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from extraction.processes import catches
from storage.child_processes import write

from lmdbcache.errors import CacheNotFoundError
from lmdbcache.storage import compact, plan_compaction

NUM, SIZE = 400, 16384  # 25 MiB
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def loose(cache, config):
    """A store with as many free pages as used ones."""
    for value in (0, 1):
        items = {f"{n:03d}:x": np.full(SIZE, value, np.float32) for n in range(NUM)}
        write(cache.root, config, items, on_duplicate="overwrite")
    return cache


def check_unchanged(cache, config):
    with cache.reader(config) as reader:
        assert len(reader) == NUM
        assert all((reader[sample_id] == 1).all() for sample_id in reader)
    assert len(list(cache.path(config).glob("gen-*"))) == 1
    assert not list(cache.path(config).glob(".*.tmp"))


def test_progress_and_plan(loose, config):
    """The plan is what is then done, to the byte; progress rises to the size of the copy."""
    plan = plan_compaction(loose.path(config))
    seen = []
    result = loose.compact(config, progress=lambda *figures: seen.append(figures))
    assert result == plan
    assert result.bytes_after < result.bytes_before / 1.5
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    (total,) = set(totals)
    assert done[-1] == total == next(loose.path(config).glob("gen-*/data.mdb")).stat().st_size
    again = plan_compaction(loose.path(config))
    assert again.bytes_before == again.bytes_after == result.bytes_after


def test_plan_of_nothing(cache, config):
    """There is nothing to plan where nothing is stored."""
    with pytest.raises(CacheNotFoundError):
        plan_compaction(cache.path(config))


def test_interrupted_in_the_copy(loose, config):
    """An exception from the progress call, as Ctrl-C raises it, ends the copy and removes it."""
    check_unchanged(loose, config)  # a file to count reads in stays open from now on
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loose.compact(config, progress=interrupt)
    assert threading.active_count() == threads
    check_unchanged(loose, config)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert compact(loose.path(config)).num_embeddings == NUM
    check_unchanged(loose, config)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_stopped_from_outside(loose, config, number):
    """At whatever moment: the exit code, one line, the store sound, nothing left over."""
    chance, stopped = random.Random(number), 0
    for number_of_stop in range(3):
        command = [sys.executable, "-m", "lmdbcache.cli.main", "compact", "--all"]
        with subprocess.Popen(
            [*command, "--root", loose.root],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            while process.poll() is None and not catches(process.pid, signal.SIGTERM):
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.03 * number_of_stop))
            os.killpg(process.pid, number)
            _, err = process.communicate(timeout=300)
        if process.returncode:
            assert process.returncode == CODES[number], err
            (line,) = err.splitlines()
            assert line.startswith("lmdbcache: interrupted; ")
            stopped += 1
        check_unchanged(loose, config)
    assert stopped
    assert loose.verify(config).is_sound

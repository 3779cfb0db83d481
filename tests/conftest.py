"""A small store, and a watch over what a test leaves behind in this process."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

# The test processes of one machine would spend their time waiting for each other's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from storage.child_processes import open_database_files

from lmdbcache import CacheConfig, EmbeddingCache
from lmdbcache.storage import environment

# Started in the background of a script, pytest and all that it starts would ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Kept for the next process that is started, or for the next test.
HELPERS = (
    "resource_tracker",
    "forkserver",
    "command_server",
    "program_server",
    "moto_server",
    "sftp_server",
)


def child_processes() -> set[str]:
    """Process ids of this process's children, dead ones that nobody waited for included."""
    children: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            listed = (task / "children").read_text().split()
        except OSError:  # a thread that has just ended
            continue
        for pid in listed:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text()
            except OSError:
                continue
            if not any(helper in command for helper in HELPERS):
                children.add(pid)
    return children


def left_behind() -> list[str]:
    return [f"open: {name}" for name in open_database_files()] + [
        f"registered: {item.generation}" for item in environment._environments.values()
    ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _leaves_nothing_open():
    """No test leaves an open store or a running child process behind."""
    if not Path("/proc/self/task").is_dir():
        yield
        return
    children_before = child_processes()
    yield
    if left_behind() or child_processes() - children_before:
        gc.collect()
    assert not left_behind()
    assert not child_processes() - children_before


@pytest.fixture
def config():
    return CacheConfig()


@pytest.fixture
def cache(tmp_path):
    """An EmbeddingCache whose root doesn't exist yet."""
    return EmbeddingCache(tmp_path / "cache")


@pytest.fixture
def embeddings():
    """Twenty embeddings of shape (8,) in two classes, by sample id."""
    generator = np.random.default_rng(0)
    return {
        f"video_{n:05d}:{'dog' if n % 2 else 'drum'}": generator.normal(size=8).astype(np.float32)
        for n in range(20)
    }


@pytest.fixture
def filled(cache, config, embeddings):
    """A cache that holds `embeddings` under `config`; nothing is open."""
    with cache.writer(config) as writer:
        writer.put_batch(embeddings, embeddings.values())
    return cache

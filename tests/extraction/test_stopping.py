"""Extractions that are told to stop: Ctrl-C, SIGTERM, twice, at every stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from extraction.clips import NUM_CLIPS
from extraction.processes import PATIENCE, call_after, catches, hold_after, signal_workers

from lmdbcache import CacheConfig, EmbeddingCache, model_identity
from lmdbcache.extraction import decoding, extract
from lmdbcache.extraction.decoding import worker_errors

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture
def config(ast_folder):
    return CacheConfig(duration=0.5, model_name=model_identity(ast_folder), namespace="vegas")


@pytest.fixture
def arguments(cache, dataset_folder, ast_folder):
    fixed = ("--root", cache.root, "--model", ast_folder, "--duration", 0.5, "--class", "dog")
    return ("extract", dataset_folder, *fixed, "--batch-size", 1)


@pytest.fixture
def num_stored(cache, config):
    def num_stored():
        return cache.info(config).num_embeddings if config in cache else 0

    return num_stored


def check_stopped(command, number, num_stored):
    """The right exit code, one line with the true count, no process left."""
    assert command.wait() == CODES[number], command.err
    (line,) = command.err.splitlines()
    assert line == (
        f"lmdbcache: interrupted; {num_stored()} of {NUM_CLIPS} are stored; "
        "run the same command again to go on"
    )
    assert command.out == ""
    assert command.members() == []


@pytest.mark.parametrize(
    ("number", "num_workers", "whole_group"),
    [
        (signal.SIGINT, 0, True),
        (signal.SIGINT, 2, True),
        (signal.SIGINT, 2, False),
        (signal.SIGTERM, 0, False),
        (signal.SIGTERM, 2, True),
        (signal.SIGTERM, 2, False),
    ],
)
def test_stopped_while_it_computes(
    start, arguments, cache, config, num_stored, number, num_workers, whole_group
):
    """What was computed is committed, one line says how to go on, no process stays."""
    often = ("--commit-seconds", 0, "--num-workers", num_workers)
    command = start(*arguments, *often, prepare=partial(hold_after, NUM_CLIPS // 2))
    command.wait_until(num_stored)
    (os.killpg if whole_group else os.kill)(command.process.pid, number)
    check_stopped(command, number, num_stored)
    assert 0 < num_stored() < NUM_CLIPS
    assert cache.verify(config).is_sound


def _hang_after_five(folder):
    decoding._CLOSE_SECONDS = 1.0  # for which the end of the workers is waited
    call_after(5, partial(signal_workers, signal.SIGSTOP), folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_what_no_commit_has_seen_is_committed(start, arguments, num_stored, number):
    """A run that commits once an hour and whose workers hang loses nothing that was computed."""
    command = start(
        *(*arguments, "--commit-seconds", 3600, "--num-workers", 2),
        prepare=_hang_after_five,
    )
    command.wait_until(command.is_held)
    assert num_stored() == 0
    os.killpg(command.process.pid, number)
    os.killpg(command.process.pid, number)  # `timeout` does that, too
    command.wait_until(num_stored)  # the workers hang: nobody waits for them
    assert command.wait() == CODES[number]
    assert num_stored() >= 5
    check_stopped(command, number, num_stored)


def test_second_ctrl_c_ends_at_once(start, arguments, cache, config, num_stored):
    """While the first waits for another writer, a second one doesn't; the store stays sound."""
    from lmdbcache.storage import write_lock

    cache.writer(config).close()
    command = start(
        *(*arguments, "--commit-seconds", 3600, "--num-workers", 2),
        prepare=partial(hold_after, 5),
    )
    command.wait_until(command.is_held)
    with write_lock(cache.path(config)):
        os.killpg(command.process.pid, signal.SIGINT)
        os.killpg(command.process.pid, signal.SIGINT)  # the same key press, forwarded
        command.wait_until(command.waits_for_a_lock)
        time.sleep(1.1)  # from then on it is another key press
        assert command.process.is_alive()
        os.killpg(command.process.pid, signal.SIGINT)
        assert command.wait() == 130
    assert command.err == ""
    while command.members():
        time.sleep(0.05)
    assert num_stored() == 0


@pytest.mark.parametrize(
    ("number", "delay"),
    [
        (signal.SIGINT, 0.0),
        pytest.param(signal.SIGTERM, 0.5, marks=pytest.mark.stress),
        (signal.SIGTERM, 1.2),
        pytest.param(signal.SIGTERM, 2.0, marks=pytest.mark.stress),
        pytest.param(signal.SIGINT, 3.0, marks=pytest.mark.stress),
    ],
)
def test_stopped_while_it_starts(arguments, number, delay, cache, config):
    """Listing, importing, loading the model: one line, the exit code, nothing left."""
    command = [sys.executable, "-m", "lmdbcache.cli.main", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while process.poll() is None and not catches(process.pid, signal.SIGTERM):
            time.sleep(0.005)
        time.sleep(delay)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=PATIENCE)
    if config in cache:
        assert cache.verify(config).is_sound
    if process.returncode == 0:  # a fast machine was done with all of it
        assert cache.info(config).num_embeddings == NUM_CLIPS
        return
    assert process.returncode == CODES[number], err
    (line,) = err.splitlines()
    assert line.startswith("lmdbcache: interrupted; ")
    assert "run the same command again to go on" in line
    assert out == ""


class InterruptedEmbedder:
    """Raises in the middle, as a signal handler would."""

    outputs = ("pooler_output",)
    embedding_shape = (4,)

    def __init__(self, error, after=3):
        self.error, self.after = error, after
        self.seen = set()  # the first clip comes several times, to be compared

    def embed(self, features):
        self.seen.update(clip.numpy().tobytes() for clip in features)
        if len(self.seen) > self.after:
            raise self.error
        return features[:, :4, 0].clone()

    def provenance(self):
        return {}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_library_use(run, stored, clips, error, num_workers):
    """In a script or notebook the exception arrives after the commit, and no worker is left."""
    with pytest.raises(type(error)):
        run(
            clips,
            make_embedder=lambda: InterruptedEmbedder(error),
            num_workers=num_workers,
            batch_size=1,
        )
    assert len(stored()) == 3


def test_library_leaves_the_signal_handlers_alone(run, clips):
    """`extract` installs no handler: that is the program's own choice."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(clips)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_interrupted_in_the_last_commit(cache, config, ast_folder, clips, monkeypatch):
    """Ctrl-C in the middle of the final commit: it is done again, nothing is lost."""
    import lmdbcache.storage.writer as writing

    put_embeddings, interrupts = writing.put_embeddings, [KeyboardInterrupt()]

    def interrupted(*args, **options):
        result = put_embeddings(*args, **options)
        if interrupts:
            raise interrupts.pop()
        return result

    monkeypatch.setattr(writing, "put_embeddings", interrupted)
    with pytest.raises(KeyboardInterrupt), worker_errors():
        extract(cache, config, clips, model=ast_folder, num_workers=0)
    assert cache.info(config).num_embeddings == len(clips)
    assert EmbeddingCache(cache.root).verify(config).is_sound

"""A staging folder whose ranks had nothing to store, or still run."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from exchange.conftest import contents, numbered, same

from lmdbcache.exchange import held_store, merge as merge_module, merge_stores
from lmdbcache.exchange.merge import _refusal


def test_ranks_that_had_nothing_to_store(target, tmp_path):
    """A staging folder in which all was cached is no error; any other folder without a store is."""
    rank = tmp_path / "staging" / "world-2-batch-8-0123456789abcdef" / "rank-1"
    with held_store(rank / "x-0123456789abcdef", 0.0):
        pass
    for source in (tmp_path / "staging", rank.parent, rank):
        reports = merge_stores(target, [source])
        assert (reports.exit_code, reports.stores) == (0, [])
        assert "nothing to store" in reports.notes[0]


def test_a_store_that_a_rank_writes_is_left_out(store, target, config, monkeypatch):
    """It is named, the others are merged, and no rank begins while its store is read."""
    monkeypatch.setattr(merge_module, "_PATIENCE_SECONDS", 0.3)
    running, ended = store("running", numbered(0, 5)), store("ended", numbered(3, 9))
    with held_elsewhere(running.path(config)) as pid:
        reports = merge_stores(target, [running.root, ended.root])
    assert reports.exit_code == 1
    (refused,) = reports.refused
    assert refused.where == str(running.path(config))
    assert f"being written (process {pid} on " in refused.reason
    assert same(contents(target, config), numbered(3, 9))

    def begin(*_):
        with pytest.raises(subprocess.CalledProcessError), held_elsewhere(running.path(config)):
            pass

    reports = merge_stores(target, [running.root], progress=begin)
    assert reports.exit_code == 0
    assert same(contents(target, config), numbered(0, 9))
    with held_elsewhere(running.path(config)):
        pass


@contextlib.contextmanager
def held_elsewhere(path):
    """Another process has this store; yields its id."""
    program = f"""
import pathlib, sys
from lmdbcache.exchange import held_store
with held_store(pathlib.Path({str(path)!r}), 0.0):
    print(flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        if not process.stdout.readline():
            raise subprocess.CalledProcessError(process.wait(), command)
        yield process.pid
        process.stdin.close()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("/a/store: is empty", "is empty"),
        ("/a/store can't be written", "can't be written"),
        ("/a/store/data.mdb is damaged", "/a/store/data.mdb is damaged"),
    ],
)
def test_a_refusal_says_the_store_once(said, reason):
    """The store's path isn't repeated; that of a file in it stays whole."""
    assert _refusal(Path("/a/store"), said) == ("/a/store", None, reason)

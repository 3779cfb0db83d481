"""The list of clips that failed, when several runs write it."""

from __future__ import annotations

import multiprocessing

from lmdbcache.cache import FAILURES_NAME, ClipFailure, read_failures, update_failures

_context = multiprocessing.get_context("fork")


def _fail(store, rank, barrier, rounds):
    for number in range(rounds):
        barrier.wait(240)
        update_failures(store, [], [ClipFailure(f"{rank}-{number}:dog", "x.wav", "empty")])
    barrier.wait(240)
    update_failures(store, [f"{rank}-0:dog"], [])


def test_simultaneous_runs_keep_each_others_failures(filled, config):
    """What one run adds or takes away stays so, whoever writes at the same moment."""
    store, ranks, rounds = filled.path(config), range(4), 15
    barrier = _context.Barrier(len(ranks))
    runs = [_context.Process(target=_fail, args=(store, r, barrier, rounds)) for r in ranks]
    for run in runs:
        run.start()
    for run in runs:
        run.join(240)
        assert run.exitcode == 0
    expected = {f"{rank}-{number}:dog" for rank in ranks for number in range(1, rounds)}
    assert {failure.sample_id for failure in read_failures(store)} == expected
    assert not list(store.glob(f"{FAILURES_NAME}.*"))


def test_no_list_where_nothing_is_stored(cache, config):
    """A folder with nothing but a list in it would look like a store."""
    update_failures(cache.path(config), [], [ClipFailure("x:dog", "x.wav", "empty")])
    assert not cache.root.exists()

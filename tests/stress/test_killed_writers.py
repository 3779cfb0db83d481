"""SIGKILL at random moments of writing, resuming and making a store."""

from __future__ import annotations

import pytest
from stress.killing_removers import kill_removers
from stress.killing_writers import kill_creators, kill_writers


def sizes(few, many):
    """A slice for every run, all of it under `make stress`."""
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.stress)])


@sizes(12, 600)
def test_killed_writers_lose_nothing(count_faults, tmp_path, number):
    """Every acknowledged batch is there bit by bit, every other wholly or not at all."""
    figures = count_faults(kill_writers, str(tmp_path), number)
    assert figures.counts["kills"] >= number
    assert figures.counts["acknowledged batches"] > number


@sizes(8, 320)
def test_kills_while_a_store_is_made(count_faults, tmp_path, number):
    """The store is absent or opens, and the next writer goes on."""
    figures = count_faults(kill_creators, str(tmp_path), number)
    assert figures.counts["kills"] >= number


@sizes(15, 600)
def test_killed_removals_leave_whole_units(count_faults, tmp_path, number):
    """What was removed never comes back, and each unit of ragged embeddings is there as a whole."""
    limits = {"commit_records": 40}
    figures = count_faults(kill_removers, str(tmp_path), number, 300, limits)
    assert figures.counts["kills"] >= number
    assert figures.counts["steps"] > number


@pytest.mark.stress
def test_killed_removals_beside_commits_in_the_background(count_faults, tmp_path):
    """The same with units that a thread commits while the next ones are collected."""
    limits = {"commit_bytes": 33 << 20}
    figures = count_faults(kill_removers, str(tmp_path), 60, 1 << 18, limits)
    assert figures.counts["steps"] > 60

"""SIGKILL at random moments of writing, resuming and making a store."""

from __future__ import annotations

import pytest
from stress.killing_writers import kill_creators, kill_writers


def sizes(few, many):
    """A slice for every run, all of it under `make stress`."""
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.stress)])


@sizes(20, 600)
def test_killed_writers_lose_nothing(count_faults, tmp_path, number):
    """Every acknowledged batch is there bit by bit, every other wholly or not at all."""
    figures = count_faults(kill_writers, str(tmp_path), number)
    assert figures.counts["kills"] >= number
    assert figures.counts["acknowledged batches"] > number


@sizes(12, 320)
def test_kills_while_a_store_is_made(count_faults, tmp_path, number):
    """The store is absent or opens, and the next writer goes on."""
    figures = count_faults(kill_creators, str(tmp_path), number)
    assert figures.counts["kills"] >= number

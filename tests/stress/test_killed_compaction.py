"""SIGKILL around compaction and `clear`, beside those who write and read."""

from __future__ import annotations

import pytest
from stress.killing_compaction import kill_compactions, kill_removals


@pytest.mark.parametrize("number", [8, pytest.param(360, marks=pytest.mark.stress)])
def test_killed_compactions_beside_writers_and_readers(count_faults, tmp_path, number):
    """Nothing lost, nothing read wrong, no reader sees an older state than before."""
    figures = count_faults(kill_compactions, str(tmp_path), number)
    assert figures.counts["kills of compactions"] >= number
    assert figures.counts["compactions that ended"] > (number // 20 if number > 100 else -1)
    assert figures.counts["acknowledged batches"] > number
    assert figures.counts["looks of readers"] > number


@pytest.mark.parametrize("number", [5, pytest.param(120, marks=pytest.mark.stress)])
def test_killed_removals(count_faults, tmp_path, number):
    """The store is whole or gone; its open reader and the next writer go on."""
    figures = count_faults(kill_removals, str(tmp_path), number)
    assert figures.counts["kills of removals"] == number

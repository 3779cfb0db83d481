"""Flipped bytes in every kind of page, and files cut anywhere."""

from __future__ import annotations

import pytest
from stress.damaging import cut_files, flip_bytes


@pytest.mark.parametrize("number", [30, pytest.param(5200, marks=pytest.mark.stress)])
def test_flipped_bytes_in_copies(count_faults, tmp_path, number):
    """A damaged store from elsewhere ends no process, and no wrong value passes a check."""
    figures = count_faults(flip_bytes, str(tmp_path), number, False)
    assert figures.counts["damaged files"] >= number
    assert figures.counts["found by verify"] > number // 4


@pytest.mark.parametrize("number", [20, pytest.param(2400, marks=pytest.mark.stress)])
def test_flipped_bytes_in_place(count_faults, tmp_path, number):
    """The same under a store that this machine has written."""
    figures = count_faults(flip_bytes, str(tmp_path), number, True)
    assert figures.counts["damaged files"] >= number


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize(
    ("boundaries", "odd"), [(6, 6), pytest.param(10_000, 200, marks=pytest.mark.stress)]
)
def test_cut_files(count_faults, tmp_path, boundaries, odd, in_place):
    """Cut at any page or anywhere, a store is refused or reads right."""
    figures = count_faults(cut_files, str(tmp_path), boundaries, odd, in_place)
    assert figures.counts["damaged files"] >= boundaries + odd or boundaries == 10_000
    told = figures.counts["refused by verify"] + figures.counts["found by verify"]
    assert told == figures.counts["damaged files"]

"""A disk that is filled at random moments."""

from __future__ import annotations

import pytest
from small_disks import small_disk
from storage.full_disks import fill_at_random

pytestmark = pytest.mark.stress


def test_hundreds_of_full_disks(tmp_path, capsys):
    """Nothing committed is lost, nobody dies, and the same process goes on."""
    with small_disk(tmp_path / "disk", 64) as disk:
        figures = fill_at_random(disk, rounds=400, seed=0)
    with capsys.disabled():
        print("\nfull disks:", dict(sorted(figures.items())))
    assert sum(count for name, count in figures.items() if name.endswith(" full")) >= 100

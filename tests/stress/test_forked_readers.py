"""Children that read on through what they inherited, half of them killed."""

from __future__ import annotations

import pytest
from stress.forking_readers import fork_readers


@pytest.mark.parametrize("number", [24, pytest.param(360, marks=pytest.mark.stress)])
def test_forked_readers_half_of_them_killed(count_faults, tmp_path, number):
    """The others read right, slots stay bounded, the parent and the next writer go on."""
    figures = count_faults(fork_readers, str(tmp_path), number)
    assert figures.counts["forked readers"] >= number
    assert figures.counts["killed in a read"] >= number // 2
    assert figures.counts["values compared"] > 64 * number

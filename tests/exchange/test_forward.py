"""Rows that are read from front to back."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from lmdbcache.exchange.formats.base import ForwardRows


def test_in_order_the_file_is_read_once():
    """Each row by its number; going back begins anew; beyond the end is an error."""
    starts = []

    def blocks():
        starts.append(None)
        yield from ([0, 1], [], [2], [3, 4])

    rows = ForwardRows(blocks, 5)
    assert [rows(n) for n in (0, 1, 1, 3)] == [0, 1, 1, 3]
    assert len(starts) == 1
    assert rows(0) == 0
    assert rows(4) == 4
    assert len(starts) == 2
    assert rows(2) == 2
    with pytest.raises(IndexError):
        rows(5)


def test_nothing_is_kept_behind_the_last_row():
    """A hundred shards that are done hold no memory."""
    block = np.ones((3, 4))
    kept = weakref.ref(block)
    rows = ForwardRows(lambda held=[block]: iter([held.pop()]), 3)
    del block
    assert [rows(n).sum() for n in range(3)] == [4, 4, 4]
    gc.collect()
    assert kept() is None

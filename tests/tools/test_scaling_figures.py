"""The figures of docs/scaling.md can be measured; what they are is not asserted."""

from __future__ import annotations

import sys

import bench_scaling
import pytest


@pytest.mark.timeout(900)  # some thirty processes, one after the other
def test_scaling_of_a_quick_run_has_its_figures(monkeypatch, capsys):
    """Every step runs in a process of its own, and a quick run writes no document."""
    before = bench_scaling.DOCUMENT.read_bytes()
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", "--quick"])
    bench_scaling.main()
    text = capsys.readouterr().out
    for title, *_ in bench_scaling.ROWS:
        assert f"| {title} | " in text
    assert "| 2 k pooled | 8 hidden |" in text
    assert bench_scaling.DOCUMENT.read_bytes() == before

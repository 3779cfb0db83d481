"""The steps of tools/bench_scaling.py run; what their figures are is not asserted."""

from __future__ import annotations

import pytest
from bench_scaling import run_step


def test_steps_run_in_processes_of_their_own(tmp_path):
    """Reading and checking what was written."""
    root = tmp_path / "cache"
    figures = run_step("write", root, 2000)
    assert figures["bytes per embedding"] > 4 * 768
    for step in ("first_reads", "coverage", "verify"):
        assert run_step(step, root, 2000)["s"] > 0
    with pytest.raises(RuntimeError, match="verify"):
        run_step("verify", root, 2001)

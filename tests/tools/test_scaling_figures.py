"""The steps of tools/bench_scaling.py run; what they measure is not asserted."""

from __future__ import annotations

import pytest
from bench_scaling import STEPS, run_step


def test_steps_run_in_processes_of_their_own(tmp_path):
    """Reading and checking what was written."""
    root = tmp_path / "cache"
    figures = run_step("write", root, 2000)
    assert figures["bytes per embedding"] > 4 * 768
    for step in (
        "first_reads",
        "search",
        "coverage",
        "list_stores",
        "info",
        "checksums",
        "verify",
        "compact",
    ):
        assert STEPS[step](str(root), "2000")["s"] > 0
    for step, place in (("merge", tmp_path / "other"), ("push", tmp_path / "shared")):
        assert STEPS[step](str(root), "2000", str(place))["new"] == 2000
    pulled = STEPS["pull"](str(tmp_path / "pulled"), "2000", str(tmp_path / "shared"))
    assert pulled["new"] == 2000
    with pytest.raises(RuntimeError, match="verify"):
        run_step("verify", root, 2001)

"""Fault tests: run in a light process, judged by their counts, printed at the end."""

from __future__ import annotations

from collections import Counter

import pytest
from stress.children import in_light_process
from stress.figures import FAILURES, SEED_VARIABLE, SHOWN_PROBLEMS, fault_seed

PROPERTY = "faults"


@pytest.fixture
def count_faults(record_property):
    """Run `function(seed, *args)` in a process without torch; fails on anything lost or wrong."""

    def count(function, *args):
        figures = in_light_process(function, fault_seed(), *args)
        record_property(PROPERTY, (str(figures), dict(figures.counts)))
        assert not figures.problems, "\n".join(
            [str(figures), f"{SEED_VARIABLE}={fault_seed()}", *figures.problems[:SHOWN_PROBLEMS]]
        )
        return figures

    return count


def pytest_terminal_summary(terminalreporter):
    """One line a test, then the sum of what must not happen."""
    found = [
        (report.nodeid.rpartition("::")[2], *value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if not found:
        return
    total: Counter[str] = Counter()
    terminalreporter.section(f"faults ({SEED_VARIABLE}={fault_seed()})")
    for test, line, counts in found:
        total.update(counts)
        terminalreporter.write_line(f"{test}: {line}")
    names = [name for name in FAILURES if total[name] or name in ("lost", "wrong", "crashed")]
    terminalreporter.write_line("faults: " + ", ".join(f"{name} {total[name]}" for name in names))

"""Long tests in rounds: each a test with dice of its own."""

from __future__ import annotations

import pytest


def rounds(number: int) -> pytest.MarkDecorator:
    """The first round in every run, all others under `make stress`.

    A slow machine takes longer, and no limit is for all of them together.
    """
    later = [pytest.param(one, marks=pytest.mark.stress) for one in range(1, number)]
    return pytest.mark.parametrize("round_number", [0, *later])

"""Errors name arguments in the library and options on the command line."""

from __future__ import annotations

import pytest
from typer.main import get_command

from lmdbcache.cli.main import app
from lmdbcache.cli.wording import in_options

EXTRACT = get_command(app).commands["extract"].params


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("give `num_workers=0`", "give --num-workers 0"),
        ("give `model`", "give --model"),
        ("give `model=FOLDER`", "give --model FOLDER"),
        ("give `output='last hidden'`", "give --output 'last hidden'"),
        ("give `json=True`", "give `json=True`"),
        ("give `progress=False`", "give --no-progress"),
        ("give `nothing_of_this=1`", "give `nothing_of_this=1`"),
        ("see `cache.repair(config)`", "see `lmdbcache repair`"),
        ("`VEGAS/dog/a.wav` is cut short", "`VEGAS/dog/a.wav` is cut short"),
    ],
)
def test_arguments_become_options(message, said):
    """An argument that the command has is its option; everything else stays."""
    assert in_options(message, EXTRACT) == said

"""Errors name arguments in the library and options on the command line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lmdbcache
from lmdbcache.cli.main import command_of
from lmdbcache.cli.wording import in_options

PACKAGE = Path(lmdbcache.__file__).parent
EXTRACT = command_of("extract").params


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
        ("duration: 0.0 s; give `hop: 1`", "--duration: 0.0 s; give `hop: 1`"),
        ("dog: `model` is", "dog: --model is"),
        ("`VEGAS/dog/a.wav` is cut short", "`VEGAS/dog/a.wav` is cut short"),
    ],
)
def test_arguments_become_options(message, said):
    """An argument that the command has is its option; everything else stays."""
    assert in_options(message, EXTRACT) == said


OPTION = re.compile(r"(?<![\w-])--[a-z]|`lmdbcache [a-z]")
LIBRARY = [
    path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "cli"
]


@pytest.mark.parametrize("module", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_knows_no_command_line(module):
    """No option and no command in a string or docstring outside of cli/."""
    found = [
        node.value
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and OPTION.search(node.value)
    ]
    assert not found

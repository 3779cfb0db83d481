"""The house: a room is entered by its door, and there are few rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lmdbcache

PACKAGE = Path(lmdbcache.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.pyi").exists()}


def imported(module):
    """Modules that a file imports anywhere in it, for its types included."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_are_entered_by_their_doors(module):
    """Outside of a room only `lmdbcache.<room>` is imported, never a module inside it."""
    here = module.relative_to(PACKAGE).parts[0]
    inside = [
        name for name in imported(module) if name.startswith("lmdbcache.") and name.count(".") > 1
    ]
    # `python -m lmdbcache` starts without the doors' table.
    assert not [name for name in inside if name.split(".")[1] != here and here != "__main__.py"]


def test_there_are_few_rooms():
    """No more than 15 entries, dunder files and the typing mark aside."""
    entries = [
        entry.name
        for entry in PACKAGE.iterdir()
        if not entry.name.startswith("_") and entry.name != "py.typed"
    ]
    assert len(entries) <= 15
    assert ROOMS == {entry for entry in entries if "." not in entry}

"""The house: a room is entered by its door, and there are few rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import lmdbcache

PACKAGE = Path(lmdbcache.__file__).parent
ROOMS = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.pyi").exists()}


def imported(module):
    """Modules that a file imports anywhere in it, for its types included."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_rooms_are_entered_by_their_doors():
    """Outside of a room only `lmdbcache.<room>` is imported, never a module inside it."""
    past_a_door = [
        f"{module.relative_to(PACKAGE)}: {name}"
        for module in PACKAGE.rglob("*.py")
        for name in imported(module)
        if name.startswith("lmdbcache.")
        and name.count(".") > 1
        # `python -m lmdbcache` starts without the doors' table.
        and module.relative_to(PACKAGE).parts[0] not in (name.split(".")[1], "__main__.py")
    ]
    assert past_a_door == []


def test_an_underscore_keeps_a_name_in_its_module():
    """What another module may import is what has no underscore: no list says it again."""
    private = [
        f"{module.relative_to(PACKAGE)}: {alias.name}"
        for module in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lmdbcache")
        for alias in node.names
        if alias.name.startswith("_") and alias.name != "__version__"
    ]
    assert private == []


def test_there_are_few_rooms():
    """No more than 15 entries, dunder files and the typing mark aside."""
    entries = [
        entry.name
        for entry in PACKAGE.iterdir()
        if not entry.name.startswith("_") and entry.name != "py.typed"
    ]
    assert len(entries) <= 15
    assert ROOMS == {entry for entry in entries if "." not in entry}

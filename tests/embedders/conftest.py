"""A small AST checkpoint for the tests of the embedders."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from small_ast import save_small_ast

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def ast_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 128 frames; not to be changed."""
    return save_small_ast(tmp_path_factory.mktemp("ast") / "small-ast", max_length=128)


@pytest.fixture
def own_ast_folder(ast_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(ast_folder, tmp_path / "small-ast")

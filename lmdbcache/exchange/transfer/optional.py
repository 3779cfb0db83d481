"""Packages that only some formats need."""

from __future__ import annotations

import importlib
from typing import Any

from lmdbcache.errors import MissingDependencyError

__all__ = ["optional"]


def optional(module: str, purpose: str, *, extra: str = "formats") -> Any:
    """Import a module of an extra.

    Raises:
        MissingDependencyError: It isn't installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f'{purpose} needs the package {error.name}: pip install "lmdbcache[{extra}]"'
        ) from error

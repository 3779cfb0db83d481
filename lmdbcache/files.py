"""The home directory of the user, who may have none: `~` in paths, and the cache directory."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from lmdbcache.errors import ConfigError

__all__ = ["expand_user", "readable_size", "user_cache_folder"]


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading `~` replaced.

    Raises:
        ConfigError: That home directory isn't known.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)  # noqa: PTH111 - to Path, ./~ and ~ are the same
    if expanded.startswith("~"):
        raise ConfigError(
            f"{text}: there is no such home directory. Set HOME, write the whole path, "
            "or ./~… for a file whose name begins with ~"
        )
    return Path(expanded)


def user_cache_folder() -> Path:
    """Return the folder where this user's caches belong; it may not exist yet.

    Raises:
        ConfigError: The user has no home directory.
    """
    try:
        return Path(platformdirs.user_cache_dir("lmdbcache")).expanduser()
    except RuntimeError:
        raise ConfigError(
            "this user has no home directory (no HOME and no passwd entry), and so no default "
            "cache root. Give the root, or set LMDBCACHE_ROOT or HOME"
        ) from None


def readable_size(num_bytes: float) -> str:
    """A size with a unit of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"

"""The settings that are in force, and where each comes from: argument, environment or default."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import click

from lmdbcache.machine import VARIABLES, Variable
from lmdbcache.storage import Report

# Options of `extract` whose defaults decide which store is meant, and how fast it is filled.
_OPTIONS: Final = (
    *("model", "output", "sample_rate", "duration", "dtype", "compute_dtype", "decoder"),
    *("batch_size", "num_workers", "device", "commit_seconds"),
)
_DEFAULT: Final = re.compile(r"default: (.*?)[.;]?(?:\. |$)")


@dataclass(frozen=True)
class Setting(Report):
    """One setting.

    Args:
        name: What is set: `root`, a variable, or an option of `extract`.
        value: What holds.
        origin: Who has set it.
        meaning: What it decides.
    """

    name: str
    value: str
    origin: Literal["argument", "environment", "default"]
    meaning: str


def settings(given_root: Path | None, root: Path) -> Iterator[Setting]:
    """Yield the cache directory, the environment variables, and the defaults of `extract`.

    Args:
        given_root: As an argument or by the environment.
        root: The one that is used.
    """
    context = click.get_current_context()
    source = context.get_parameter_source("root")
    origin: Any = {"COMMANDLINE": "argument", "ENVIRONMENT": "environment"}.get(
        source.name if source else "", "default"
    )
    yield Setting("root", str(root), origin if given_root else "default", "the cache directory")
    for variable in (*VARIABLES, *_of_others()):
        value = os.environ.get(variable.name)
        yield Setting(
            variable.name,
            variable.default if value is None else value,
            "default" if value is None else "environment",
            variable.meaning,
        )
    yield from _defaults()


def _of_others() -> tuple[Variable, ...]:
    """Variables of other packages that decide what this one does."""
    home = Path("~").expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or str(home / ".cache")
    found = [
        Variable("HF_HOME", str(Path(cache, "huggingface")), "where checkpoints are kept"),
        Variable("HF_HUB_OFFLINE", "0", "1: download no checkpoint"),
        Variable("TMPDIR", tempfile.gettempdir(), "temporary files"),
        Variable("CUDA_VISIBLE_DEVICES", "all", "GPUs that torch sees"),
        Variable("OMP_NUM_THREADS", "all cores", "threads of a model on the CPU"),
        Variable("COLUMNS", str(shutil.get_terminal_size().columns), "width of tables"),
    ]
    if sys.platform.startswith("linux"):
        meaning = "holds the user's cache directory"
        found.insert(0, Variable("XDG_CACHE_HOME", str(home / ".cache"), meaning))
    return tuple(found)


def _defaults() -> Iterator[Setting]:
    from lmdbcache.cli.main import command_of

    parameters: dict[str | None, Any] = {p.name: p for p in command_of("extract").params}
    for name in _OPTIONS:
        option = parameters[name]
        stated = _DEFAULT.search(option.help)
        value = stated[1] if option.default is None and stated else str(option.default)
        yield Setting(option.opts[0], value, "default", "of extract")

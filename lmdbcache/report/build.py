"""Making a report: look at the stores, then write one file at once or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lmdbcache.cache import EmbeddingCache
from lmdbcache.errors import ConfigError
from lmdbcache.files import replace_file
from lmdbcache.report.figures import CacheReport, collect_report
from lmdbcache.report.page import GENERATOR, page_of

_HEAD_BYTES: Final = 2048


def build_report(
    cache: EmbeddingCache,
    stores: Sequence[str | Path] | None = None,
    *,
    out: str | Path = "report.html",
    overwrite: bool = False,
    **choices: Any,
) -> CacheReport:
    """Write a report of stores as one HTML file that needs nothing else.

    Args:
        cache: The root.
        stores: Their folders; None takes all under the root.
        out: The file. A report that is there already is replaced.
        overwrite: Replace any file.
        **choices: See `collect_report`.

    Returns:
        What the report says.

    Raises:
        ConfigError: `out` is a file that isn't a report, or a choice can't be used.
        MissingDependencyError: scikit-learn, plotly or jinja2 isn't installed.
        OSError: The file can't be written.
    """
    check_out(Path(out), overwrite=overwrite)
    report = collect_report(cache, stores, **choices)
    write_report(report, Path(out))
    return report


def write_report(report: CacheReport, out: Path) -> None:
    """Write the page, at once or not at all.

    Raises:
        OSError: The file can't be written.
    """
    # A path that isn't UTF-8 holds lone surrogates; they are shown as escapes.
    replace_file(out, page_of(report).encode("utf-8", "backslashreplace"))


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse, before anything is computed, to write over a file that isn't a report.

    Raises:
        ConfigError: `out` is a folder, lies in none, or is another file and `overwrite` isn't set.
        OSError: The file can't be read.
    """
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"can't be written: there is no {out.parent}"
        raise ConfigError(f"{out} {what}. Name a file in a folder that exists: `out`")
    if overwrite or not out.exists():
        return
    with out.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if f'content="{GENERATOR}'.encode() not in head:
        raise ConfigError(
            f"{out} exists and isn't a report of lmdbcache. Choose another file: `out`, or replace "
            "it: `overwrite=True`"
        )

"""`lmdbcache merge`: stores of other roots into those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from lmdbcache.cache import DEFAULT_TOLERANCE, EmbeddingCache
from lmdbcache.cli.command import Argument, Option
from lmdbcache.cli.console import (
    counted,
    finish,
    print_error,
    print_table,
    progress_bar,
    say,
    say_some,
)
from lmdbcache.cli.options import Json, OnDuplicateChoice, Progress, Root, Tolerance, title_of
from lmdbcache.errors import CacheFullError
from lmdbcache.exchange import IntakeReport, MergeReport, Refusal, merge_stores
from lmdbcache.files import readable_size

_FEW: int = 10


def merge_command(
    sources: Annotated[
        list[Path],
        Argument(help="Stores, roots, or folders that hold roots (a staging folder)."),
    ],
    *,
    root: Root = None,
    on_duplicate: Annotated[
        OnDuplicateChoice,
        Option(
            help="If a stored embedding differs: error leaves it and reports the conflict, skip "
            "keeps it, overwrite takes the source's."
        ),
    ] = OnDuplicateChoice.ERROR,
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    dry_run: Annotated[bool, Option("--dry-run", help="Only show what would be merged.")] = False,
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Merge stores into those of the same configs under the root; the sources stay as they are.

    A stopped merge continues where it was when you run it again. Exit code 1 if something was left
    out: a conflict, a damaged value, a store of other weights; 3 if the disk is full.
    """
    label = "checking" if dry_run else "merging"
    with progress_bar(label, shown=progress) as report_progress:
        try:
            report = merge_stores(
                EmbeddingCache(root),
                sources,
                tolerance=tolerance,
                on_duplicate=on_duplicate.value,
                dry_run=dry_run,
                progress=report_progress,
            )
        except CacheFullError as error:
            text = f"{error}. What was merged until then is kept; merge again to continue"
            raise CacheFullError(text) from None
    finish(report, _print_all, as_json=as_json)


def _print_all(merged: MergeReport) -> None:
    for note in merged.notes:
        say(f"note: {note}")
    for report in merged.stores:
        _print_report(report)
    _print_refused(merged.refused)
    if not (merged.stores or merged.refused):
        say("nothing to merge")


def _print_report(report: IntakeReport) -> None:
    for note in report.notes:
        say(f"note: {note}")
    print_conflicts(report)
    say(f"{report}; {readable_size(report.num_bytes)}")
    _print_refused(report.refused)
    print_unresolved(report)


def print_conflicts(report: IntakeReport) -> None:
    """The first conflicts as a table: both origins, and how far apart they are."""
    if not report.conflicts:
        return
    of_store = f"/{report.path.name}"  # the same for all, and long
    rows = [
        (
            c.sample_id,
            c.kept,
            c.stored.writer.removesuffix(of_store),
            c.given.writer.removesuffix(of_store),
            f"{c.max_abs:.3g}",
            f"{c.cosine:.3g}",
        )
        for c in report.conflicts[:_FEW]
    ]
    headings = ("conflict", "kept", "stored", "given", "max. difference", "1 - cosine")
    print_table(headings, rows, num_text_columns=4)
    if len(report.conflicts) > _FEW:
        say(f"… and {len(report.conflicts) - _FEW} more conflicts; see --json")


def print_unresolved(report: IntakeReport) -> None:
    """Say which options decide the conflicts that are left."""
    if report.unresolved:
        print_error(
            f"{counted(len(report.unresolved), 'conflict')} in {title_of(report.path)} left as "
            "they were; --on-duplicate skip or overwrite decides, --tolerance sets what counts as "
            "equal"
        )


def _print_refused(refused: list[Refusal]) -> None:
    lines = [f"not merged: {refusal}" for refusal in refused]
    say_some(lines, what="not merged", printed=print_error)

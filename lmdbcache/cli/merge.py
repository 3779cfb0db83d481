"""`lmdbcache merge`: stores of other roots into those of one."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lmdbcache.cache import DEFAULT_TOLERANCE, EmbeddingCache
from lmdbcache.cli.console import counted, print_error, print_json, print_table, progress_bar, say
from lmdbcache.cli.options import Json, Progress, Root
from lmdbcache.errors import CacheFullError
from lmdbcache.exchange import MergeReport, MergeReports, Refusal, merge_stores
from lmdbcache.files import readable_size

__all__ = ["Conflicts", "merge_command", "print_conflicts", "print_unresolved"]

_FEW: int = 10


class Conflicts(str, Enum):
    """What to do about two embeddings of one sample that are further apart than the tolerance."""

    ERROR = "error"
    OURS = "ours"
    THEIRS = "theirs"


def merge_command(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Stores, roots, or folders that hold roots (a staging folder)."),
    ],
    *,
    root: Root = None,
    on_conflict: Annotated[
        Conflicts,
        typer.Option(
            help="Where embeddings differ: error leaves what is stored, ours keeps it and says so, "
            "theirs takes the source's."
        ),
    ] = Conflicts.ERROR,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference of two elements that counts as none.")
    ] = DEFAULT_TOLERANCE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be merged.")
    ] = False,
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Merge stores into those of the same configs under the root; the sources stay as they are.

    Stopped at any moment, it goes on where it was when run again. Exit code 1 if something was
    left out: a conflict, a damaged value, a store of other weights; 3 if the disk is full.
    """
    label = "checking" if dry_run else "merging"
    with progress_bar(label, shown=progress) as report_progress:
        try:
            reports = merge_stores(
                EmbeddingCache(root),
                sources,
                tolerance=tolerance,
                on_conflict=on_conflict.value,
                dry_run=dry_run,
                progress=report_progress,
            )
        except CacheFullError as error:
            text = f"{error}. What was merged until then is kept; merge again to go on"
            raise CacheFullError(text) from None
    if as_json:
        print_json(reports.to_dict())
    else:
        _print_reports(reports)
    raise typer.Exit(reports.exit_code)


def _print_reports(reports: MergeReports) -> None:
    for note in reports.notes:
        say(f"note: {note}")
    for report in reports.stores:
        _print_report(report)
    _print_refused(reports.refused)
    if not (reports.stores or reports.refused):
        say("nothing to merge")


def _print_report(report: MergeReport) -> None:
    for note in report.notes:
        say(f"note: {note}")
    print_conflicts(report)
    say(f"{report}; {readable_size(report.num_bytes)}")
    _print_refused(report.refused)
    print_unresolved(report)


def print_conflicts(report: MergeReport) -> None:
    """The first conflicts as a table: both origins, and how far apart they are."""
    if not report.conflicts:
        return
    of_store = f"/{report.path.name}"  # the same for all, and long
    rows = [
        (
            c.sample_id,
            c.kept,
            c.ours.writer.removesuffix(of_store),
            c.theirs.writer.removesuffix(of_store),
            f"{c.max_abs:.3g}",
            f"{c.cosine:.3g}",
        )
        for c in report.conflicts[:_FEW]
    ]
    headings = ("conflict", "kept", "ours", "theirs", "max. difference", "1 - cosine")
    print_table(headings, rows, num_text_columns=4)
    if len(report.conflicts) > _FEW:
        say(f"… and {len(report.conflicts) - _FEW} more conflicts; see --json")


def print_unresolved(report: MergeReport) -> None:
    """Say how to decide the conflicts that nobody has decided."""
    if report.unresolved:
        print_error(
            f"{counted(len(report.unresolved), 'conflict')} in {report.path.name} left as they "
            "were; --on-conflict ours or theirs decides, --tolerance says what counts as equal"
        )


def _print_refused(refused: list[Refusal]) -> None:
    for refusal in refused[:_FEW]:
        print_error(f"not merged: {refusal}")
    if len(refused) > _FEW:
        print_error(f"… and {len(refused) - _FEW} more not merged; see --json")

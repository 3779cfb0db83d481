"""`lmdbcache pull`: what others have shared comes into a store."""

from __future__ import annotations

from typing import Annotated

import click

from lmdbcache.cache import DEFAULT_TOLERANCE, EmbeddingCache
from lmdbcache.cli.command import Argument, Option
from lmdbcache.cli.console import (
    counted,
    print_error,
    print_json,
    progress_bar,
    say,
)
from lmdbcache.cli.merge import print_conflicts, print_unresolved
from lmdbcache.cli.options import (
    Classes,
    IdsFile,
    Json,
    OnDuplicateChoice,
    Progress,
    Root,
    Tolerance,
    ids_in,
)
from lmdbcache.errors import ConfigError
from lmdbcache.exchange import (
    PullReport,
    Remote,
    pull,
    shared_fingerprints,
)
from lmdbcache.files import few, readable_size

_FEW: int = 10


def pull_command(
    url: Annotated[
        str,
        Argument(help="Where they were pushed to: s3://bucket/folder, file:///mnt/shared, …"),
    ],
    fingerprint: Annotated[
        str | None,
        Argument(
            help="Of the store, or its first digits; not needed if there is only one.",
        ),
    ] = None,
    *,
    everything: Annotated[bool, Option("--all", help="All stores that are shared there.")] = False,
    root: Root = None,
    manifest: Annotated[
        str | None,
        Option(
            help="The state to pull: a manifest's id, or its beginning; default: all there is.",
            show_default=False,
        ),
    ] = None,
    classes: Classes = None,
    ids: IdsFile = None,
    on_duplicate: Annotated[
        OnDuplicateChoice,
        Option(
            help="Where a stored embedding differs: error leaves it and lists both, skip keeps it "
            "without a look, overwrite takes what is shared."
        ),
    ] = OnDuplicateChoice.ERROR,
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    dry_run: Annotated[bool, Option("--dry-run", help="Only count what would be fetched.")] = False,
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Bring embeddings that were pushed to a place into a store; only what is missing is fetched.

    Stopped at any moment, it goes on where it was when run again. Exit code 1 if something was
    left out: a conflict, a damaged file, a sample that was never pushed; 3 if the disk is full.
    """
    if everything and (fingerprint or manifest):
        raise ConfigError(
            "--all takes all that is shared: leave out the fingerprint and --manifest"
        )
    chosen = [*shared_fingerprints(Remote(url))] if everything else [fingerprint]
    reports = []
    for one in chosen:
        with progress_bar("pulling", shown=progress, in_bytes=True) as report_progress:
            report = pull(
                EmbeddingCache(root),
                one,
                url,
                manifest=manifest,
                on_duplicate=on_duplicate.value,
                tolerance=tolerance,
                classes=classes,
                sample_ids=ids_in(ids),
                dry_run=dry_run,
                progress=report_progress,
            )
        reports.append(report)
        if not as_json:
            _print_report(report)
    if as_json:
        found = [report.to_dict() for report in reports]
        print_json(found if everything else found[0])
    raise click.exceptions.Exit(max(report.exit_code for report in reports))


def _print_report(report: PullReport) -> None:
    if report.is_dry_run:
        say(
            f"{counted(report.num_samples, 'sample')} shared, {report.num_same} stored with the "
            f"same bytes: {counted(report.num_shards, 'shard')} to fetch, "
            f"{readable_size(report.bytes_to_fetch)}; nothing was fetched (--dry-run)"
        )
    else:
        print_conflicts(report)
        say(f"{report}; {readable_size(report.bytes_fetched)} fetched")
    if report.manifest:
        say(f"manifest {report.manifest}")
    if not report.is_dry_run:
        say(str(report.path))
    _print_left_out(report)


def _print_left_out(report: PullReport) -> None:
    for one in (*[*report.problems.values()][:_FEW], *report.refused[:_FEW]):
        print_error(f"not imported: {one}")
    if report.problems:
        print_error(f"`lmdbcache push {report.url} --repair`, where the embeddings are, helps")
    for what, names in (("lost", report.lost), ("not shared there", report.absent)):
        if names:
            print_error(f"{counted(len(names), 'sample')} {what}: {few(names, 3)}")
    print_unresolved(report)

"""`lmdbcache compact` and `repair`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import click

from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.command import Option
from lmdbcache.cli.console import counted, print_error, print_json, print_table, progress_bar, say
from lmdbcache.cli.options import (
    All,
    Json,
    Progress,
    Root,
    Stores,
    Yes,
    check_can_ask,
    digits_of,
    find_folders,
    title_of,
)
from lmdbcache.errors import CacheFullError, IntegrityError, StorageError
from lmdbcache.files import readable_size
from lmdbcache.storage import RepairReport, compact, plan_compaction, repair

KeptOnly = Annotated[bool, Option("--dry-run", help="Only show what would be kept.")]


def compact_command(
    stores: Stores = None,
    *,
    root: Root = None,
    everything: All = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Only show the sizes before and after.")
    ] = False,
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Rewrite stores without their unused pages; readers and writers may go on.

    Interrupted at any moment, a store is as before. Exit code 3 if the disk can't hold the copy.
    """
    chosen = find_folders(EmbeddingCache(root), stores, everything=everything)
    results, failed = [], list[Path]()
    for store in chosen:
        with _others_going_on(store, failed):
            if dry_run:
                results.append(plan_compaction(store))
                continue
            with progress_bar(digits_of(store), shown=progress, in_bytes=True) as report:
                results.append(compact(store, progress=report))
    if failed and not results:
        raise click.exceptions.Exit(1)
    if as_json:
        print_json([result.to_dict() for result in results])
    else:
        print_table(
            ("store", "embeddings", "before", "after"),
            [
                (
                    title_of(r.path),
                    r.num_embeddings,
                    readable_size(r.bytes_before),
                    readable_size(r.bytes_after),
                )
                for r in results
            ],
        )
    if failed:
        raise click.exceptions.Exit(1)


def repair_command(
    stores: Stores = None,
    *,
    root: Root = None,
    everything: All = False,
    dry_run: KeptOnly = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Keep what is sound of damaged stores, after asking; the next extraction computes the rest."""
    chosen = find_folders(EmbeddingCache(root), stores, everything=everything)
    check_can_ask(as_json=as_json, may_ask=not (yes or dry_run))
    reports, failed = [], list[Path]()
    for store in chosen:
        with _others_going_on(store, failed):
            report = repair(store, dry_run=True)
            if not as_json:
                _say_repair(report)
            if not report.was_sound and not dry_run:
                if not yes:
                    click.confirm(f"Repair {title_of(store)}?", abort=True)
                with progress_bar(f"repairing {digits_of(store)}") as progress:
                    report = repair(store, progress=progress)
                if not as_json:
                    say(f"repaired {title_of(store)}, {counted(report.num_kept, 'embedding')}")
            reports.append(report)
    if as_json and not (failed and not reports):
        print_json([report.to_dict() for report in reports])
    if failed:
        raise click.exceptions.Exit(1)


@contextlib.contextmanager
def _others_going_on(store: Path, failed: list[Path]) -> Iterator[None]:
    """Name a store that can't be used; the others are served."""
    try:
        yield
    except CacheFullError:
        raise
    except (IntegrityError, StorageError) as error:
        print_error(error)
        failed.append(store)


def _say_repair(report: RepairReport) -> None:
    kept = counted(report.num_kept, "embedding")
    if report.was_sound:
        say(f"{title_of(report.path)}: sound, {kept}")
        return
    say(f"{title_of(report.path)}: DAMAGED, {kept} can be kept, {len(report.dropped)} can't")
    say_findings(structure=report.structure, dropped=report.dropped)


def say_findings(**findings: tuple[str, ...]) -> None:
    """Print what is wrong with a store, by kind."""
    for kind, found in findings.items():
        for finding in found:
            say(f"  {kind}: {finding}")

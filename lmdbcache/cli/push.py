"""`lmdbcache push`: share stores through a folder or bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click

from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.command import Argument, Option
from lmdbcache.cli.console import counted, print_error, print_json, progress_bar, say, say_some
from lmdbcache.cli.options import (
    All,
    Classes,
    IdsFile,
    Json,
    OnDuplicateChoice,
    Progress,
    Root,
    Stores,
    digits_of,
    find_folders,
    ids_in,
    stored_config,
    title_of,
)
from lmdbcache.errors import CacheError, ConfigError, RemoteError
from lmdbcache.exchange import PushReport, Remote, push
from lmdbcache.files import readable_size


def push_command(
    url: Annotated[
        str,
        Argument(
            help="Where to: s3://bucket/folder, ssh://host/folder, file:///folder, or any other "
            "that fsspec knows."
        ),
    ],
    stores: Stores = None,
    *,
    root: Root = None,
    everything: All = False,
    own: Annotated[
        bool,
        Option("--own", help="Only what was computed here, not what was pulled or merged."),
    ] = False,
    class_names: Classes = None,
    ids_file: IdsFile = None,
    on_duplicate: Annotated[
        OnDuplicateChoice,
        Option(
            help="Where a sample is there with another value: overwrite pushes this store's in the "
            "place of its earlier one, next to those of others; skip leaves the sample out; "
            "error pushes nothing."
        ),
    ] = OnDuplicateChoice.OVERWRITE,
    repair: Annotated[
        bool,
        Option(
            "--repair",
            help="Read all that is there, and upload damaged shards again that are stored here.",
        ),
    ] = False,
    writer: Annotated[
        str | None,
        Option(
            help="Name that is pushed with the embeddings; default: a random id of the store.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only count what would be pushed.")] = False,
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Upload what a place lacks of stores, so that others can pull it.

    Without STORES: the only one under the root. Embeddings derive from the audio, which may be
    private: nothing is ever pushed unless this command is given. Exit code 1 if a stored value is
    damaged; all others are pushed.
    """
    cache = EmbeddingCache(root)
    Remote(url)  # a wrong one is refused before any store is looked at
    chosen = _folders(cache, stores, everything=everything)
    ids = ids_in(ids_file)
    reports: list[PushReport] = []
    failed = False
    for folder in chosen:
        try:
            with progress_bar(digits_of(folder), shown=progress) as bar:
                report = push(
                    cache,
                    stored_config(folder),
                    url,
                    writer=writer,
                    own=own,
                    classes=class_names,
                    sample_ids=ids,
                    on_duplicate=on_duplicate.value,
                    repair=repair,
                    dry_run=dry_run,
                    progress=bar,
                )
        except CacheError as error:
            if len(chosen) == 1:
                raise
            print_error(error)
            failed = True
            if isinstance(error, RemoteError):
                break
            continue  # the other stores are pushed nevertheless
        reports.append(report)
        if not as_json:
            _say_report(title_of(folder), report)
    if as_json:
        print_json([report.to_dict() for report in reports])
    raise click.exceptions.Exit(1 if failed else max((one.exit_code for one in reports), default=0))


def _folders(cache: EmbeddingCache, stores: list[str] | None, *, everything: bool) -> list[Path]:
    if stores or everything:
        return find_folders(cache, stores, everything=everything)
    found = cache.folders()
    if not found:
        raise ConfigError(f"there is no store under {cache.root}; is --root right?")
    if len(found) > 1:
        raise ConfigError(
            f"which of {len(found)} stores under {cache.root}? Name them (see `lmdbcache ls`), or "
            "give --all"
        )
    return found


def _say_report(name: str, report: PushReport) -> None:
    chosen = counted(report.num_chosen, "embedding")
    if report.dry_run:
        say(f"{name}: would push {report.num_pushed} of {chosen} to {report.url}")
    elif report.num_pushed:
        say(
            f"{name}: pushed {report.num_pushed} of {chosen} to {report.url}, "
            f"{counted(report.num_shards, 'shard')}, {readable_size(report.num_bytes)} uploaded"
        )
    else:
        say(f"{name}: nothing to push, {report.num_there} of {chosen} are at {report.url}")
    if report.num_different:
        say(f"  {counted(report.num_different, 'sample')} there with another value")
    damaged = [f"{sample_id}: {why}" for sample_id, why in report.damaged.items()]
    problems = [f"{path}: {why}" for path, why in report.problems.items()]
    for what, found in (
        ("damaged, not pushed", damaged),
        ("uploaded again", report.repaired),
        ("can't be used", problems),
    ):
        say_some([f"  {what}: {one}" for one in found], what=what)
    if report.manifest:
        say(f"  manifest {report.manifest}")

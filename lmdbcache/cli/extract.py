"""`lmdbcache extract`."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import Annotated, Any, Final

import click

from lmdbcache.audio import AudioSource
from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.command import Option
from lmdbcache.cli.config_choice import ConfigChoice
from lmdbcache.cli.console import DISK_FULL, print_json, print_table, progress_bar, say
from lmdbcache.cli.dataset_choice import DatasetChoice
from lmdbcache.cli.launching import LaunchChoice
from lmdbcache.cli.options import BatchSize, Device, Json, NumWorkers, Progress, Root
from lmdbcache.cli.stopping import Stopped
from lmdbcache.cli.wording import in_options
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheFullError
from lmdbcache.extraction import (
    Choice,
    ExtractionPlan,
    extract,
    extract_on_ray,
    finish_with_other_ranks,
    plan_extraction,
    stored_of_share,
)
from lmdbcache.files import readable_size

__all__ = ["extract_command"]

_TRIAL_SECONDS: Final = 5.0


def extract_command(
    context: click.Context,
    dataset: DatasetChoice,
    choice: ConfigChoice,
    launch: LaunchChoice,
    *,
    root: Root = None,
    batch_size: BatchSize = 8,
    num_workers: NumWorkers = None,
    device: Device = None,
    commit_seconds: Annotated[
        float, Option(help="Commit at least this often; a kill loses no more.")
    ] = 10.0,
    progress: Progress = None,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="Only print what is missing and the space that it needs."),
    ] = False,
    plan: Annotated[
        bool,
        Option(
            "--plan",
            help="Only print what every output and dtype would take of the disk, and the time, by "
            "a trial of a few seconds.",
        ),
    ] = False,
    changed: Annotated[
        bool,
        Option("--changed", help="Also compute stored clips again whose file has changed since."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Extract and store the embeddings of a dataset; only what is missing is computed.

    Stopped at any moment, by Ctrl-C or by a batch system's SIGTERM, it continues where it was when
    run again. Exit code 1 if a clip failed, 3 if the disk is full.
    """
    share = launch.share
    launch.check(num_workers)
    clips, config = dataset.clips(), choice.config(dataset.namespace)
    cache = EmbeddingCache(root)
    dataset.check_namespace(cache, config)
    if dry_run or plan:
        shown = plan_extraction(
            cache,
            config,
            clips,
            model=choice.model,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            share=share,
            staging=launch.folder,
            trial_seconds=_TRIAL_SECONDS if plan else 0.0,
        )
        shown = replace(shown, left_out=dataset.left_out_counts)
        if as_json:
            print_json(shown.to_dict())
        else:
            _print_plan(shown, config, context)
        raise click.exceptions.Exit(0 if shown.fits else DISK_FULL)
    try:
        common: dict[str, Any] = {
            "model": choice.model,
            "batch_size": batch_size,
            "device": device,
            "dataset_root": dataset.data_dir.absolute(),
            "commit_seconds": commit_seconds,
            "recompute_changed": changed,
            "staging": launch.staging,
        }
        name = config.model_name.rsplit("/", 1)[-1]
        label = name if share.is_all else f"{name} {share.rank}/{share.world_size}"
        with progress_bar(label, shown=progress) as report:
            if launch.is_on_ray:
                # Ray prints what it repairs on standard output.
                with contextlib.redirect_stdout(sys.stderr):
                    summary = extract_on_ray(
                        cache, config, clips, progress=report, **common, **launch.ray_options
                    )
            else:
                own: dict[str, Any] = {"num_workers": num_workers, "share": share}
                summary = extract(cache, config, clips, progress=report, **common, **own)
        summary = replace(summary, left_out=dataset.left_out_counts)
    except KeyboardInterrupt:
        kept = _kept(cache, config, clips, launch, batch_size)
        raise Stopped(f"{kept}; run the same command again to go on") from None
    except CacheFullError as error:
        kept = _kept(cache, config, clips, launch, batch_size)
        raise CacheFullError(f"{error}; {kept}; run the same command again after that") from error
    if as_json:
        print_json({**summary.to_dict(), "fingerprint": config.fingerprint})
    else:
        say(f"{summary}\n{summary.store}")
    sys.stdout.flush()
    finish_with_other_ranks(summary.exit_code)
    raise click.exceptions.Exit(summary.exit_code)


def _kept(
    cache: EmbeddingCache,
    config: CacheConfig,
    clips: list[tuple[str, str | AudioSource]],
    launch: LaunchChoice,
    batch_size: int,
) -> str:
    """What is on the disk now of this process's share, whoever has stored it."""
    num_cached, num_samples = stored_of_share(
        cache, config, clips, batch_size=batch_size, share=launch.share, staging=launch.folder
    )
    return f"{num_cached} of {num_samples} are stored"


def _print_plan(plan: ExtractionPlan, config: CacheConfig, context: click.Context) -> None:
    if plan.choices:
        print_table(
            ("", "output", "dtype", "shape", "all clips"),
            [_row(choice, config) for choice in plan.choices],
            num_text_columns=4,
        )
        say("")
    say(f"{in_options(str(plan), context.command.params)}\n{plan.store}")


def _row(choice: Choice, config: CacheConfig) -> tuple[object, ...]:
    is_chosen = (choice.output, choice.dtype) == (config.output, config.dtype)
    shape, size = choice.embedding_shape, choice.bytes_for_all
    return (
        "*" if is_chosen else "",
        choice.output,
        choice.dtype,
        "?" if shape is None else " x ".join(map(str, shape)),
        "?" if size is None else readable_size(size),
    )

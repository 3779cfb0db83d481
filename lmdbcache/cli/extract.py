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
from lmdbcache.cli.config_choice import ConfigsChoice
from lmdbcache.cli.console import (
    DISK_FULL,
    print_json,
    print_table,
    progress_bar,
    say,
    with_options,
)
from lmdbcache.cli.dataset_choice import DatasetChoice
from lmdbcache.cli.launching import LaunchChoice
from lmdbcache.cli.options import BatchSize, Device, Json, NumWorkers, Progress, Root
from lmdbcache.cli.stopping import Stopped
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheFullError
from lmdbcache.extraction import (
    Choice,
    ExtractionPlan,
    ExtractionSummary,
    extract,
    extract_on_ray,
    finish_with_other_ranks,
    plan_extraction,
    stored_of_share,
)
from lmdbcache.files import readable_size

_TRIAL_SECONDS: Final = 5.0


def extract_command(
    dataset: DatasetChoice,
    choice: ConfigsChoice,
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
    cache = EmbeddingCache(root)
    clips, configs = dataset.clips(), choice.configs(cache, dataset.namespace)
    for config in configs:
        dataset.check_namespace(cache, config)
    model = choice.model_in(cache)
    if dry_run or plan:
        plans = plan_extraction(
            cache,
            configs,
            clips,
            model=model,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            share=share,
            staging=launch.folder,
            trial_seconds=_TRIAL_SECONDS if plan else 0.0,
        )
        plans = [replace(one, left_out=dataset.left_out_counts) for one in plans]
        if as_json:
            _print_json([one.to_dict() for one in plans])
        else:
            _print_plans(plans, configs)
        raise click.exceptions.Exit(0 if all(one.fits for one in plans) else DISK_FULL)
    try:
        common: dict[str, Any] = {
            "model": model,
            "batch_size": batch_size,
            "device": device,
            "dataset_root": dataset.root,
            "commit_seconds": commit_seconds,
            "recompute_changed": changed,
            "staging": launch.staging,
        }
        label = configs[0].model_alias
        if not share.is_all:
            label += f" {share.rank}/{share.world_size}"
        with progress_bar(label, shown=progress, first=f"loading torch, {label}") as report:
            if launch.is_on_ray:
                # Ray prints what it repairs on standard output.
                with contextlib.redirect_stdout(sys.stderr):
                    only: Any = configs if len(configs) > 1 else configs[0]  # it refuses several
                    summary = extract_on_ray(
                        cache, only, clips, progress=report, **common, **launch.ray_options
                    )
                    summaries = [summary]
            else:
                own: dict[str, Any] = {"num_workers": num_workers, "share": share}
                summaries = extract(cache, configs, clips, progress=report, **common, **own)
        summaries = [replace(one, left_out=dataset.left_out_counts) for one in summaries]
    except KeyboardInterrupt:
        kept = _kept(cache, configs, clips, launch, batch_size)
        raise Stopped(f"{kept}; run the same command again to go on") from None
    except CacheFullError as error:
        kept = _kept(cache, configs, clips, launch, batch_size)
        raise CacheFullError(f"{error}; {kept}; run the same command again after that") from error
    if as_json:
        pairs = zip(summaries, configs, strict=True)
        _print_json([{**one.to_dict(), "fingerprint": config.fingerprint} for one, config in pairs])
    else:
        _print_summaries(summaries)
    sys.stdout.flush()
    exit_code = max(one.exit_code for one in summaries)
    finish_with_other_ranks(exit_code)
    raise click.exceptions.Exit(exit_code)


def _kept(
    cache: EmbeddingCache,
    configs: list[CacheConfig],
    clips: list[tuple[str, str | AudioSource]],
    launch: LaunchChoice,
    batch_size: int,
) -> str:
    """What is on the disk now of this process's share, whoever has stored it."""
    found = [
        stored_of_share(
            cache, config, clips, batch_size=batch_size, share=launch.share, staging=launch.folder
        )
        for config in configs
    ]
    return " and ".join(f"{stored} of {asked}" for stored, asked in found) + " are stored"


def _print_json(stores: list[dict[str, Any]]) -> None:
    """Print one store's values, or a list where there are several."""
    print_json(stores[0] if len(stores) == 1 else stores)


def _print_summaries(summaries: list[ExtractionSummary]) -> None:
    """Print the counts of each store, and once what is the same for several."""
    for summary in summaries[:-1]:
        say(f"{summary.counts}\n{summary.store}")
    remarks = dict.fromkeys(line for summary in summaries for line in summary.remarks)
    say("\n".join([summaries[-1].counts, *remarks, str(summaries[-1].store)]))


def _print_plans(plans: list[ExtractionPlan], configs: list[CacheConfig]) -> None:
    if plans[0].choices:
        print_table(
            ("", "output", "dtype", "shape", "all clips"),
            [_row(choice, configs) for choice in plans[0].choices],
            num_text_columns=4,
        )
        say("")
    last = max(plans, key=lambda plan: plan.num_missing)
    for plan in plans:
        # The time is that of the run, whatever number of stores it fills.
        shown = plan if plan is last else replace(plan, trial=None, no_trial="")
        say(f"{with_options(str(shown))}\n{plan.store}")


def _row(choice: Choice, configs: list[CacheConfig]) -> tuple[object, ...]:
    is_chosen = any(choice[:2] == (config.output, config.dtype) for config in configs)
    shape, size = choice.embedding_shape, choice.bytes_for_all
    return (
        "*" if is_chosen else "",
        choice.output,
        choice.dtype,
        "?" if shape is None else " x ".join(map(str, shape)),
        "?" if size is None else readable_size(size),
    )

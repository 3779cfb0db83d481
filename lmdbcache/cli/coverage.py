"""`lmdbcache coverage` and `explain`: what is stored of a dataset, and why the rest isn't."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import click

from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.command import Argument, Option
from lmdbcache.cli.config_choice import ConfigChoice
from lmdbcache.cli.console import finish, print_json, print_table, say, with_options
from lmdbcache.cli.dataset_choice import DatasetChoice
from lmdbcache.cli.options import Json, Root
from lmdbcache.datasets import NAMESPACE


def coverage_command(
    dataset: DatasetChoice,
    choice: ConfigChoice,
    *,
    root: Root = None,
    list_missing: Annotated[bool, Option("--missing", help="List what is missing.")] = False,
    by_split: Annotated[
        bool, Option("--by-split", help="A column for each of train, val and test.")
    ] = False,
    min_coverage: Annotated[
        float, Option(help="Share that must be stored for exit code 0.", min=0, max=1)
    ] = 1.0,
    allow_failed: Annotated[
        bool,
        Option("--allow-failed", help="Don't count clips that failed when last tried."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how much of a dataset is stored, by class. Exit code 1 if too little is."""
    cache = EmbeddingCache(root)
    config = choice.config(cache, dataset.namespace)
    dataset.check_namespace(cache, config)
    by_split = by_split and dataset.split == "all"
    found = cache.coverage(config, dataset.ids_by_split(each=by_split))
    found = replace(found, left_out=dataset.left_out_counts)
    if as_json:
        print_json({"fingerprint": config.fingerprint, **found.to_dict()})
    else:
        if config not in cache:
            say(with_options(str(cache.explain(config))))
        if by_split:
            print_table(*found.cells())
            say("")
        print_table(
            ("class", "stored", "of", "%"),
            [
                (name, stored, asked, f"{100 * stored / asked:.1f}")
                for name, (stored, asked) in found.by_class.items()
            ],
        )
        say(f"{found.num_present} of {found.num_asked} stored ({100 * found.fraction:.1f} %)")
        if dataset.left_out:
            say(f"{len(dataset.left_out)} files or rows of the dataset are left out")
        if len(found.failed) < len(found.missing):
            say("`lmdbcache extract` with the same dataset and model computes what is missing")
        if found.failed:
            say(f"{len(found.failed)} of the missing failed when last tried: fix or exclude them")
        if list_missing:
            say("\n".join(found.missing))
    raise click.exceptions.Exit(
        0 if found.is_enough(min_coverage, allow_failed=allow_failed) else 1
    )


def explain_command(
    choice: ConfigChoice,
    *,
    sample_id: Annotated[
        str | None,
        Argument(help="file_id:class; without it, the config as a whole."),
    ] = None,
    namespace: Annotated[
        str | None,
        Option(
            help="The dataset's name in the config; default: that of the only store that has the "
            "rest of it, else vegas.",
            show_default=False,
        ),
    ] = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Explain why a config, or a sample of it, isn't found. Exit code 0 if it is stored, else 1."""
    cache = EmbeddingCache(root)
    config = choice.config(cache, NAMESPACE if namespace is None else namespace)
    if namespace is None:
        alike = [one for one in cache if one.replace(namespace=config.namespace) == config]
        config = alike[0] if len(alike) == 1 else config
    found = cache.explain(config, sample_id)
    finish(found, as_json=as_json)

"""`lmdbcache explain` and `stats`: why something isn't found, and how often that was so."""

from __future__ import annotations

from typing import Annotated

import typer

from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.config_choice import ConfigChoice
from lmdbcache.cli.console import counted, print_json, print_table, say
from lmdbcache.cli.options import Json, Root, Yes, check_can_ask, find_folder
from lmdbcache.cli.parameters import grouped
from lmdbcache.datasets import NAMESPACE
from lmdbcache.storage import ReadStatistics, reset_statistics, statistics_of

__all__ = ["explain_command", "stats_command"]


@grouped
def explain_command(
    choice: ConfigChoice,
    *,
    sample_id: Annotated[
        str | None,
        typer.Argument(help="file_id:class; without it, the config as a whole."),
    ] = None,
    dataset: Annotated[
        str, typer.Option("--namespace", help="The dataset's name in the config.")
    ] = NAMESPACE,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Explain why a config, or a sample of it, isn't found. Exit code 0 if it is stored, else 1."""
    found = EmbeddingCache(root).explain(choice.config(dataset), sample_id)
    if as_json:
        print_json(found.to_dict())
    else:
        say(str(found))
    raise typer.Exit(0 if found.is_stored else 1)


def stats_command(
    store: Annotated[
        str | None,
        typer.Argument(help="Fingerprint (its first digits do), or a store's folder name."),
    ] = None,
    *,
    reset: Annotated[bool, typer.Option("--reset", help="Begin again at zero.")] = False,
    root: Root = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Show the hits and misses of a store by class, or of all stores."""
    cache = EmbeddingCache(root)
    folders = cache.folders() if store is None else [find_folder(cache, store)]
    if reset:
        check_can_ask(as_json=as_json, may_ask=not yes)
        if folders and not yes:
            typer.confirm(
                f"Set the figures of {counted(len(folders), 'store')} to zero?", abort=True
            )
        for folder in folders:
            reset_statistics(folder)
    figures = {folder: statistics_of(folder) for folder in folders}
    if as_json:
        print_json([{"path": str(folder), **found.to_dict()} for folder, found in figures.items()])
    elif store is None:
        print_table(
            ("store", "hits", "misses", "hit rate, %"),
            [
                (folder.name, found.hits, found.misses, _percent(found))
                for folder, found in figures.items()
            ],
        )
    else:
        for found in figures.values():
            rows = [(name, *numbers) for name, numbers in found.by_class.items()]
            print_table(("class", "hits", "misses"), [*rows, ("all", found.hits, found.misses)])
            say(
                f"hit rate {_percent(found)} %"
                if found.hits or found.misses
                else "nothing was read"
            )


def _percent(found: ReadStatistics) -> str:
    return f"{100 * found.hit_rate:.1f}" if found.hits or found.misses else "-"

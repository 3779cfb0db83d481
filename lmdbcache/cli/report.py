"""`lmdbcache report`: one HTML file of what is stored."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.command import Argument, Option, PathOrUrl
from lmdbcache.cli.console import counted, finish, progress_bar, say
from lmdbcache.cli.dataset_choice import DatasetChoice
from lmdbcache.cli.options import Json, Progress, Root, find_folder
from lmdbcache.files import readable_size
from lmdbcache.report import (
    DEFAULT_MAX_SAMPLES,
    CacheReport,
    DatasetSplits,
    check_out,
    collect_report,
    write_report,
)


def report_command(
    stores: Annotated[
        list[str] | None,
        Argument(help="Fingerprints (their first digits do) or folder names; default: all."),
    ] = None,
    *,
    root: Root = None,
    data: Annotated[
        list[Path] | None,
        Option(
            help="Show how much of this dataset is stored, by class and split; may be given "
            "several times.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, Option(help="The file to write.")] = Path("report.html"),
    max_samples: Annotated[
        int, Option(help="Read the values of so many embeddings of a store at most.")
    ] = DEFAULT_MAX_SAMPLES,
    progress: Progress = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace a file that isn't a report.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write one HTML file that shows what is stored: sizes, coverage, a map, duplicates, outliers.

    Exit code 1 if a store is damaged, or splits of --data share equal or nearly equal embeddings.
    --json prints the same and writes no file.
    """
    cache = EmbeddingCache(root)
    chosen = [find_folder(cache, store) for store in stores] if stores else None
    if not as_json:
        check_out(out, overwrite=overwrite)
    with progress_bar("looking at embeddings", shown=progress) as bar:
        report = collect_report(
            cache,
            None if chosen is None else list(dict.fromkeys(chosen)),
            datasets=[_by_split(folder) for folder in data or ()],
            max_samples=max_samples,
            progress=bar,
        )
    if not as_json:
        write_report(report, out)
        shown = {one.dataset for store in report.stores for one in store.coverage}
        for folder in data or ():
            if _name_of(folder) not in shown:
                say(f"no store is of the dataset in {folder}: it isn't shown")
    finish(report, partial(_say_written, out), as_json=as_json)


def _say_written(out: Path, report: CacheReport) -> None:
    state = "no damage found" if report.is_sound else "DAMAGED, see the report"
    if report.num_leaks:
        state += f", {counted(report.num_leaks, 'LEAK')} across splits"
    found = counted(len(report.stores), "store")
    say(f"{out}: {found}, {state}; {readable_size(out.stat().st_size)}")


def _name_of(folder: Path) -> str:
    return folder.name or str(folder)


def _by_split(folder: Path) -> DatasetSplits:
    choice = DatasetChoice(PathOrUrl(str(folder)))
    return DatasetSplits(
        name=_name_of(folder),
        namespace=choice.namespace,
        splits=choice.ids_by_split(each=True),
    )

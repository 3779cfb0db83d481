"""`lmdbcache verify --sources`: whether the audio files are still those that were embedded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lmdbcache.cache import STATES, SourceReport, adopt_sources, check_sources, read_store_info
from lmdbcache.cli.console import counted, print_json, print_table, progress_bar, say
from lmdbcache.cli.dataset_choice import DatasetChoice
from lmdbcache.errors import ConfigError

__all__ = ["SourceChoice", "clips_of_store", "verify_sources"]

_FEW = 20


@dataclass(frozen=True)
class SourceChoice:
    """Whether and how the sources of a store's embeddings are looked at."""

    is_given: Annotated[
        bool,
        typer.Option("--sources", help="Look at the audio files instead of the stored values."),
    ] = False
    data_dir: Annotated[
        Path | None,
        typer.Option(help="With --sources: where the dataset is now; default: where it was."),
    ] = None
    rehash: Annotated[
        bool,
        typer.Option("--hash", help="With --sources: read every file, whatever its size and time."),
    ] = False
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt",
            help="With --sources and --data-dir: take the files that are there now for the "
            "sources of embeddings that none is recorded for.",
        ),
    ] = False

    @property
    def is_wanted(self) -> bool:
        """Whether to look at files.

        Raises:
            ConfigError: An option that needs --sources was given without it.
        """
        if not self.is_given and (self.data_dir or self.rehash or self.adopt):
            raise ConfigError("--data-dir, --hash and --adopt need --sources")
        return self.is_given


def verify_sources(
    stores: list[Path], choice: SourceChoice, *, progress: bool | None, as_json: bool
) -> None:
    """Print how the files are and end the command: exit code 1 if some changed or vanished.

    Raises:
        ConfigError: --adopt without a dataset.
        IntegrityError: The records of a store are damaged.
    """
    if choice.adopt and choice.data_dir is None:
        raise ConfigError("--adopt needs the dataset: give --data-dir")
    reports = []
    for store in stores:
        if choice.adopt and choice.data_dir is not None:
            clips = clips_of_store(store, choice.data_dir)
            with progress_bar("recording files", shown=progress) as report:
                number = adopt_sources(store, clips, choice.data_dir.absolute(), report)
            if not as_json:
                say(f"{store.name}: recorded {counted(number, 'source')}")
        with progress_bar("looking at files", shown=progress) as report:
            reports.append(
                check_sources(
                    store, data_dir=choice.data_dir, rehash=choice.rehash, progress=report
                )
            )
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        for found in reports:
            _say_report(found)
    raise typer.Exit(0 if all(found.is_trusted for found in reports) else 1)


def clips_of_store(store: Path, data_dir: Path) -> Mapping[str, str]:
    """The dataset's clips that are files, if the store is one of that dataset.

    Raises:
        ConfigError: It holds another dataset's embeddings.
        DatasetError: The folder isn't such a dataset.
    """
    dataset = DatasetChoice(data_dir)
    config = read_store_info(store).config
    if config is not None and config.namespace != dataset.namespace:
        raise ConfigError(
            f"--data-dir: {store.name} holds embeddings of the dataset {config.namespace!r}, not "
            f"of {dataset.namespace!r}"
        )
    return {sample_id: source for sample_id, source in dataset.clips() if isinstance(source, str)}


def _say_report(report: SourceReport) -> None:
    say(f"{report.path.name}: " + ", ".join(f"{report.num(s)} {s}" for s in STATES))
    print_table(
        ("class", *STATES),
        [(name, *(counts.get(s, 0) for s in STATES)) for name, counts in report.by_class.items()],
    )
    shown = [found for found in report.found if found.state in ("changed", "vanished")]
    for found in shown[:_FEW]:
        say(f"{found.state}: {found.sample_id}: {found.path}")
    if len(shown) > _FEW:
        say(f"… and {len(shown) - _FEW} more; see --json")
    if report.num("changed"):
        say("`lmdbcache extract DATA_DIR … --changed` computes the changed ones again")
    if report.num("vanished"):
        say("if the dataset was moved, give its folder with --data-dir")
    if report.num("unknown"):
        say(
            f"no file is known for {counted(report.num('unknown'), 'embedding')}: `verify "
            "--sources --data-dir DATA_DIR --adopt` records those that are there now"
        )

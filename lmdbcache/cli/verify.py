"""`lmdbcache verify`: stored values, the audio files behind them, or what was pushed somewhere."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import click

from lmdbcache.cache import (
    STATES,
    EmbeddingCache,
    SourceReport,
    adopt_sources,
    check_sources,
)
from lmdbcache.cli.command import Option, PathOrUrl
from lmdbcache.cli.console import (
    counted,
    finish,
    print_json,
    print_table,
    progress_bar,
    say,
    say_some,
)
from lmdbcache.cli.dataset_choice import DatasetChoice
from lmdbcache.cli.maintain import say_findings
from lmdbcache.cli.options import (
    All,
    Json,
    Progress,
    Root,
    Stores,
    digits_of,
    find_folders,
    stored_config,
    title_of,
)
from lmdbcache.errors import ConfigError, IntegrityError, NotRegularFileError
from lmdbcache.exchange import RemoteReport, is_url, verify_remote
from lmdbcache.files import readable_size
from lmdbcache.storage import IntegrityReport, verify


@dataclass(frozen=True)
class SourceChoice:
    """Whether and how the sources of a store's embeddings are looked at."""

    is_given: Annotated[
        bool,
        Option("--sources", help="Look at the audio files instead of the stored values."),
    ] = False
    data_dir: Annotated[
        Path | None,
        Option(
            "--data",
            "--data-dir",
            help="With --sources: where the dataset is now; default: where it was.",
        ),
    ] = None
    rehash: Annotated[
        bool,
        Option("--hash", help="With --sources: read every file, whatever its size and time."),
    ] = False
    adopt: Annotated[
        bool,
        Option(
            "--adopt",
            help="With --sources and --data: take the files that are there now for the "
            "sources of embeddings that none is recorded for.",
        ),
    ] = False

    @property
    def is_wanted(self) -> bool:
        """Whether to look at files.

        Raises:
            ConfigError: An option is given without another one that it needs.
        """
        if not self.is_given and (self.data_dir or self.rehash or self.adopt):
            raise ConfigError("--data, --hash and --adopt need --sources")
        if self.adopt and self.data_dir is None:
            raise ConfigError("--adopt needs the dataset: give --data")
        return self.is_given


def verify_command(
    stores: Stores = None,
    *,
    source_choice: SourceChoice,
    root: Root = None,
    everything: All = False,
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Check every stored value against its checksum. Exit code 1 if something is wrong.

    With --sources: whether the audio files are still those that were embedded. With a URL in the
    place of the first store: every file that was pushed there, of all stores or of those named.
    """
    if stores and is_url(stores[0]):
        _verify_shared(*stores, progress=progress, as_json=as_json)
    chosen = find_folders(EmbeddingCache(root), stores, everything=everything)
    if source_choice.is_wanted:
        _verify_sources(chosen, source_choice, progress=progress, as_json=as_json)
    reports = [_verified(store, shown=progress) for store in chosen]
    is_sound = all(report.is_sound for report in reports)
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        for report in reports:
            state = "sound" if report.is_sound else "DAMAGED"
            say(f"{title_of(report.path)}: {state}, {report.num_embeddings} embeddings")
            say_findings(structure=report.structure, damaged=report.damaged, missing=report.missing)
        if not is_sound:
            say("`lmdbcache repair` keeps what is sound; extracting again computes the rest")
    raise click.exceptions.Exit(0 if is_sound else 1)


def _verified(store: Path, *, shown: bool | None) -> IntegrityReport:
    with progress_bar(f"verifying {digits_of(store)}", shown=shown) as progress:
        try:
            return verify(store, progress)
        except (IntegrityError, NotRegularFileError) as error:  # the other stores are verified
            return IntegrityReport(store, 0, structure=(str(error),))


# ---- the audio files


def _verify_sources(
    stores: list[Path], choice: SourceChoice, *, progress: bool | None, as_json: bool
) -> NoReturn:
    reports = []
    for store in stores:
        if choice.adopt and choice.data_dir is not None:
            clips = clips_of_store(store, choice.data_dir)
            with progress_bar("recording files", shown=progress) as report:
                number = adopt_sources(store, clips, choice.data_dir.absolute(), report)
            if not as_json:
                say(f"{title_of(store)}: recorded {counted(number, 'source')}")
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
            _say_sources(found)
    raise click.exceptions.Exit(max((found.exit_code for found in reports), default=0))


def clips_of_store(store: Path, data_dir: Path) -> Mapping[str, str]:
    """Return the dataset's clips that are files, if the store is one of that dataset.

    Raises:
        ConfigError: It holds another dataset's embeddings.
        DatasetError: The folder isn't such a dataset.
    """
    dataset = DatasetChoice(PathOrUrl(os.fspath(data_dir)))
    namespace = stored_config(store).namespace
    if namespace != dataset.namespace:
        raise ConfigError(
            f"--data: {digits_of(store)} holds embeddings of the dataset {namespace!r}, not of "
            f"{dataset.namespace!r}"
        )
    return {sample_id: source for sample_id, source in dataset.clips() if isinstance(source, str)}


def _say_sources(report: SourceReport) -> None:
    say(f"{title_of(report.path)}: " + ", ".join(f"{report.num(s)} {s}" for s in STATES))
    print_table(
        ("class", *STATES),
        [(name, *(counts.get(s, 0) for s in STATES)) for name, counts in report.by_class.items()],
    )
    shown = [found for found in report.found if found.state in ("changed", "vanished")]
    say_some([f"{found.state}: {found.sample_id}: {found.path}" for found in shown])
    if report.num("changed"):
        say("`lmdbcache extract DATA_DIR … --changed` computes the changed ones again")
    if report.num("vanished"):
        say("if the dataset was moved, give its folder with --data")
    if report.num("unknown"):
        say(
            f"no file is known for {counted(report.num('unknown'), 'embedding')}: `verify "
            "--sources --data DATA_DIR --adopt` records those that are there now"
        )


# ---- what was pushed


def _verify_shared(url: str, *fingerprints: str, progress: bool | None, as_json: bool) -> NoReturn:
    report = RemoteReport(url)
    for fingerprint in fingerprints or (None,):
        with progress_bar("verifying", shown=progress, in_bytes=True) as bar:
            found = verify_remote(url, fingerprint, progress=bar)
        report.url = found.url
        report.stores += found.stores
    finish(report, _say_shared, as_json=as_json)


def _say_shared(report: RemoteReport) -> None:
    for store in report.stores:
        say(
            f"{store.fingerprint}: {'sound' if store.is_sound else 'DAMAGED'}, "
            f"{counted(store.num_samples, 'sample')} in "
            f"{counted(store.num_shards, 'sound shard')}, "
            f"{counted(store.num_manifests, 'manifest')}, {readable_size(store.num_bytes)}"
        )
        say_some([f"  {path}: {why}" for path, why in store.problems.items()])
        if store.num_unlisted:
            say(f"  {counted(store.num_unlisted, 'shard')} that no manifest lists")
    if not report.is_sound:
        url = shlex.quote(report.url)
        say(f"`lmdbcache push {url} --repair`, where the embeddings are, uploads them again")

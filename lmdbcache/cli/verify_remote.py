"""`lmdbcache verify URL`: whether what was pushed is as it was written."""

from __future__ import annotations

import shlex
from typing import NoReturn

import typer

from lmdbcache.cli.console import counted, print_json, progress_bar, say
from lmdbcache.exchange import RemoteReport, SharedStoreReport, verify_remote
from lmdbcache.files import readable_size

__all__ = ["verify_shared"]

_FEW = 20


def verify_shared(arguments: list[str], *, progress: bool | None, as_json: bool) -> NoReturn:
    """Print how the files are and end the command: exit code 1 if something is wrong.

    Args:
        arguments: The URL, and fingerprints or their first digits; none takes all.
        progress: Whether a bar is shown.
        as_json: Whether JSON is printed.

    Raises:
        RemoteError: The place can't be reached or refuses.
        CacheNotFoundError: Nothing is shared there.
    """
    url = arguments[0]
    fingerprints: list[str | None] = [*arguments[1:]]
    report = RemoteReport(url)
    for fingerprint in fingerprints or [None]:
        with progress_bar("verifying", shown=progress, in_bytes=True) as bar:
            found = verify_remote(url, fingerprint, progress=bar)
        report.url = found.url
        report.stores += found.stores
    if as_json:
        print_json(report.to_dict())
    else:
        for store in report.stores:
            _say_report(store)
        if not report.is_sound:
            url = shlex.quote(report.url)
            say(f"`lmdbcache push {url} --repair`, where the embeddings are, uploads them again")
    raise typer.Exit(report.exit_code)


def _say_report(store: SharedStoreReport) -> None:
    say(
        f"{store.fingerprint}: {'sound' if store.is_sound else 'DAMAGED'}, "
        f"{counted(store.num_samples, 'sample')} in {counted(store.num_shards, 'sound shard')}, "
        f"{counted(store.num_manifests, 'manifest')}, {readable_size(store.num_bytes)}"
    )
    problems = [f"{path}: {why}" for path, why in store.problems.items()]
    for one in problems[:_FEW]:
        say(f"  {one}")
    if len(problems) > _FEW:
        say(f"  … and {len(problems) - _FEW} more; see --json")
    if store.num_unlisted:
        say(f"  {counted(store.num_unlisted, 'shard')} that no manifest lists")

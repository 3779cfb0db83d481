"""`lmdbcache verify URL`: whether what was pushed is as it was written."""

from __future__ import annotations

import shlex
from typing import NoReturn

import typer

from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.console import counted, print_json, progress_bar, say
from lmdbcache.exchange import RemoteReport, SharedStoreReport, verify_remote
from lmdbcache.files import readable_size

__all__ = ["verify_shared"]

_FEW = 20


def verify_shared(
    arguments: list[str],
    cache: EmbeddingCache,
    *,
    repair: bool,
    progress: bool | None,
    as_json: bool,
) -> NoReturn:
    """Print how the files are and end the command: exit code 1 if something is wrong.

    Args:
        arguments: The URL, and fingerprints or their first digits; none takes all.
        cache: What is here.
        repair: Put right what can be.
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
            found = verify_remote(
                url,
                fingerprint,
                repair_from=cache if repair else None,
                known_to=cache,
                progress=bar,
            )
        report.url = found.url
        report.stores += found.stores
    if as_json:
        print_json(report.to_dict())
    else:
        for store in report.stores:
            _say_report(store)
            _say_given_up(store, report.url, cache)
        if not (report.is_sound or repair):
            say(f"`lmdbcache verify {report.url} --repair` puts right what the stores here can")
    raise typer.Exit(report.exit_code)


def _say_given_up(store: SharedStoreReport, url: str, cache: EmbeddingCache) -> None:
    if not store.given_up:
        return
    paths = ", ".join(store.given_up[:_FEW]) + (" …" if len(store.given_up) > _FEW else "")
    say(f"  given up: {paths}; what only these told or held is shared no longer")
    if any(folder.name.endswith(f"-{store.fingerprint}") for folder in cache.folders()):
        root = shlex.quote(str(cache.root))
        push = f"lmdbcache push {shlex.quote(url)} {store.fingerprint} --root {root}"
        say(f"  `{push}` pushes again what is stored here of it")
    else:
        say(f"  who has its samples pushes them again: `lmdbcache push {shlex.quote(url)}`")


def _say_report(store: SharedStoreReport) -> None:
    state = "sound" if store.is_sound else "DAMAGED"
    if store.repaired:
        state = "sound now" if store.is_sound else "REPAIRED IN PART"
    say(
        f"{store.fingerprint}: {state}, "
        f"{counted(store.num_samples, 'sample')} in {counted(store.num_shards, 'sound shard')}, "
        f"{counted(store.num_commits, 'commit')}, {readable_size(store.num_bytes)}"
    )
    for found in store.findings[:_FEW]:
        what = store.repaired.get(found.path)
        say(f"  {found.state}: {found.path}: {found.reason}" + (f"; {what}" if what else ""))
    if len(store.findings) > _FEW:
        say(f"  … and {len(store.findings) - _FEW} more; see --json")
    for sample_id in store.lost[:_FEW]:
        say(f"  lost: {sample_id}")
    if len(store.lost) > _FEW:
        say(f"  … and {len(store.lost) - _FEW} more; see --json")
    if store.lost:
        say("  who has these can push them again; else extract them")
    if store.num_unlisted:
        say(f"  {counted(store.num_unlisted, 'shard')} that no commit lists: of a push under way?")
    if store.leftovers:
        say(f"  {counted(len(store.leftovers), 'file')} left by interrupted uploads")
    for commit_id in store.commits:
        say(f"  commit {commit_id}")

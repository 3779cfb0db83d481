"""`lmdbcache clear`, `compact` and `verify`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from lmdbcache.cache import EmbeddingCache
from lmdbcache.cli.console import byte_progress, counted, print_json, print_table, say, sizes
from lmdbcache.cli.options import Json, Progress, Root, Yes, find_store
from lmdbcache.errors import ConfigError
from lmdbcache.storage.compaction import compact, plan_compaction
from lmdbcache.storage.integrity import verify
from lmdbcache.store_info import StoreInfo

__all__ = ["clear_command", "compact_command", "verify_command"]

Stores = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(help="Fingerprints (their first digits do) or folder names."),
]
All = Annotated[bool, typer.Option("--all", help="All stores under the root.")]


def clear_command(
    stores: Stores = None,
    *,
    root: Root = None,
    everything: All = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove stores, after asking."""
    cache = EmbeddingCache(root)
    chosen = _chosen(cache, stores, everything=everything)
    if as_json and not yes:
        raise ConfigError("--json: it can't ask in the middle of JSON; give --yes, too")
    if chosen and not yes:
        for store in chosen:
            held = "damaged" if store.damage else f"{store.num_embeddings} embeddings"
            say(f"{store.path.name}: {held}, {sizes(store.size_bytes)}")
        question = f"Remove {counted(len(chosen), 'store')} from {cache.root}?"
        typer.confirm(question, abort=True)
    removed = [cache.remove(store.path) for store in chosen]
    if as_json:
        print_json([store.to_dict() for store in removed])
    else:
        freed = sum(store.size_bytes for store in removed)
        say(f"removed {counted(len(removed), 'store')}, {sizes(freed)}")


def compact_command(
    stores: Stores = None,
    *,
    root: Root = None,
    everything: All = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell the sizes before and after.")
    ] = False,
    progress: Progress = None,
    as_json: Json = False,
) -> None:
    """Rewrite stores without their unused pages; readers and writers may go on meanwhile.

    Interrupted at any moment, a store is as before. Exit code 3 if the disk can't hold the copy.
    """
    chosen = _chosen(EmbeddingCache(root), stores, everything=everything)
    if dry_run:
        results = [plan_compaction(store.path) for store in chosen]
    else:
        results = []
        for store in chosen:
            with byte_progress(store.path.name, shown=progress) as report:
                results.append(compact(store.path, progress=report))
    if as_json:
        print_json(
            [
                {
                    "path": str(result.path),
                    "bytes_before": result.bytes_before,
                    "bytes_after": result.bytes_after,
                    "num_embeddings": result.num_embeddings,
                }
                for result in results
            ]
        )
        return
    print_table(
        ("store", "embeddings", "before", "after"),
        [
            (r.path.name, r.num_embeddings, sizes(r.bytes_before), sizes(r.bytes_after))
            for r in results
        ],
    )


def verify_command(
    stores: Stores = None, *, root: Root = None, everything: All = False, as_json: Json = False
) -> None:
    """Check every stored value against its checksum. Exit code 1 if something is wrong."""
    chosen = _chosen(EmbeddingCache(root), stores, everything=everything)
    reports = [verify(store.path) for store in chosen]
    if as_json:
        print_json(
            [
                {
                    "path": str(report.path),
                    "is_sound": report.is_sound,
                    "num_embeddings": report.num_embeddings,
                    "structure": list(report.structure),
                    "damaged": list(report.damaged),
                    "lost": report.lost,
                }
                for report in reports
            ]
        )
    for report in reports if not as_json else ():
        say(
            f"{report.path.name}: {'sound' if report.is_sound else 'DAMAGED'}, "
            f"{report.num_embeddings} embeddings"
        )
        for finding in report.structure:
            say(f"  structure: {finding}")
        for sample_id in report.damaged:
            say(f"  damaged: {sample_id}")
        if report.lost:
            say(f"  {report.lost} checksums without an embedding")
    raise typer.Exit(0 if all(report.is_sound for report in reports) else 1)


def _chosen(
    cache: EmbeddingCache, stores: list[str] | None, *, everything: bool
) -> list[StoreInfo]:
    if everything and not stores:
        return cache.stores()
    if not stores or everything:
        raise ConfigError("name the stores (see `lmdbcache ls`), or give --all")
    found = [find_store(cache, store) for store in stores]
    return list({store.path: store for store in found}.values())

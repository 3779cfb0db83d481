"""`merge_stores`: stores of other roots into those of one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

from lmdbcache.cache import EmbeddingCache
from lmdbcache.comparison import DEFAULT_TOLERANCE
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError, CacheFullError
from lmdbcache.merging.merger import Merger
from lmdbcache.merging.report import MergeReport, MergeReports, OnConflict, Refusal
from lmdbcache.sources.origins import Origin
from lmdbcache.storage.reader import EmbeddingReader
from lmdbcache.store_info import is_store

__all__ = ["merge_stores"]

_AT_ONCE = 2048
_DEPTH = 4


def merge_stores(
    cache: EmbeddingCache,
    sources: Iterable[str | os.PathLike[str]],
    *,
    configs: Collection[CacheConfig] | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    on_conflict: OnConflict = "error",
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReports:
    """Merge stores into those of the same configs under one root.

    Args:
        cache: Where they go.
        sources: Stores, roots, or folders that hold roots.
        configs: Only stores of these; None takes all.
        tolerance: See `Merger`.
        on_conflict: See `Merger`.
        dry_run: Only tell what would be done.
        progress: Called with (embeddings done, embeddings in all).

    Returns:
        What was merged and what wasn't.
    """
    found = MergeReports()
    reports: dict[CacheConfig, MergeReport] = {}
    stores = [store for source in sources for store in _stores_under(Path(source), _DEPTH)]
    for store in dict.fromkeys(stores):
        try:
            with EmbeddingReader(store, counts_as_use=False) as reader:
                config = reader.config
                if configs is not None and config not in configs:
                    continue
                shape = reader.embedding_shape or ()
                merger = Merger(
                    cache,
                    config,
                    tolerance=tolerance,
                    on_conflict=on_conflict,
                    ragged=None in shape,
                    dry_run=dry_run,
                    dataset_root=reader.metadata.dataset_root,
                )
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                detail = {"store": os.fspath(store), "merged_at": now}
                origin = Origin(socket.gethostname(), detail, reader.metadata.provenance)
                names = iter(reader)
                while chunk := list(islice(names, _AT_ONCE)):
                    merger.add(chunk, [reader[name] for name in chunk], origin)
                    if progress is not None:
                        progress(len(chunk), len(reader))
                reports[config] = merger.report
        except CacheFullError:
            raise
        except CacheError as error:
            found.refused.append(Refusal(os.fspath(store), None, str(error)))
    found.stores = list(reports.values())
    return found


def _stores_under(folder: Path, depth: int) -> list[Path]:
    folder = folder.absolute()
    if is_store(folder):
        return [folder]
    if not depth or not folder.is_dir():
        return []
    children = sorted(child for child in folder.iterdir() if child.is_dir())
    return [store for child in children for store in _stores_under(child, depth - 1)]

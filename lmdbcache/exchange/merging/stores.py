"""`merge_stores`: stores of other roots into those of one."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from lmdbcache.cache import DEFAULT_TOLERANCE, EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    CacheFullError,
    ConfigError,
    ReadOnlyCacheError,
    StorageError,
)
from lmdbcache.exchange.merging.failed_clips import merge_failures
from lmdbcache.exchange.merging.finding import file_number, find_stores
from lmdbcache.exchange.merging.merger import Merger
from lmdbcache.exchange.merging.report import (
    MergeReport,
    MergeReports,
    OnConflict,
    Refusal,
    store_refusal,
)
from lmdbcache.exchange.merging.side_by_side import SideBySide
from lmdbcache.exchange.merging.source_stores import SourceStore, open_source_store
from lmdbcache.storage import StoreMetadata, at_rest

__all__ = ["merge_stores"]

# Open at once. Those after them meet what these have left.
_STORES_AT_ONCE: Final = 128
_DESCRIPTORS_PER_STORE, _OTHER_DESCRIPTORS = 6, 64
# A rank that was ended commits what it has.
_PATIENCE_SECONDS: Final = 10.0

Progress = Callable[[int, int], None]


def merge_stores(
    cache: EmbeddingCache,
    sources: Iterable[str | os.PathLike[str]],
    *,
    configs: Collection[CacheConfig] | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    on_conflict: OnConflict = "error",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReports:
    """Merge stores into those of the same configs under one root.

    What is damaged in a source is left out and told, the rest is merged. Committed batch by batch:
    stopped at any moment, the same call goes on where it was.

    Args:
        cache: Where they go.
        sources: Stores, roots, or folders that hold roots.
        configs: Only stores of these; None takes all.
        tolerance: Largest difference of two elements that counts as none.
        on_conflict: `"error"` leaves what is stored as it is, and takes neither of two sources
            that differ; `"ours"` keeps what is stored, or the first source's; `"theirs"` takes
            the last source's.
        dry_run: Only tell what would be done.
        progress: Called with (embeddings done, embeddings in all).

    Returns:
        What was merged and what wasn't.

    Raises:
        CacheFullError: The disk is full; what was committed stays.
        ReadOnlyCacheError: The root can't be written.
    """
    found = find_stores(sources)
    reports = MergeReports([], found.refused, found.notes)
    run = _Run(cache, tolerance, on_conflict, reports, dry_run=dry_run, progress=progress)
    step = _stores_at_once()
    for start in range(0, len(found.stores), step):
        with contextlib.ExitStack() as stack:
            run.merge(run.open(found.stores[start : start + step], configs, stack))
    return reports


def _stores_at_once() -> int:
    """As many as this process may have open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _STORES_AT_ONCE
    return max(1, min(_STORES_AT_ONCE, (limit - _OTHER_DESCRIPTORS) // _DESCRIPTORS_PER_STORE))


class _Run:
    """One call of `merge_stores`."""

    def __init__(
        self,
        cache: EmbeddingCache,
        tolerance: float,
        on_conflict: OnConflict,
        reports: MergeReports,
        *,
        dry_run: bool,
        progress: Progress | None,
    ) -> None:
        self._cache = cache
        self._tolerance = tolerance
        self._on_conflict: OnConflict = on_conflict
        self._reports = reports
        self._dry_run = dry_run
        self._progress = progress
        self._mergers: dict[CacheConfig, Merger] = {}
        self._done = 0
        self._total = 0
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._detail = {"merged_at": now, "merged_on": socket.gethostname()}
        self._deadline = time.monotonic() + _PATIENCE_SECONDS
        self._own = {number: store for store in cache.folders() if (number := file_number(store))}

    def open(
        self,
        paths: Iterable[Path],
        configs: Collection[CacheConfig] | None,
        stack: contextlib.ExitStack,
    ) -> dict[CacheConfig, list[SourceStore]]:
        """Open stores by their config; those of the root itself are passed over."""
        opened: dict[CacheConfig, list[SourceStore]] = {}
        for path in paths:
            own = self._own.get(file_number(path) or (0, 0))
            is_below_root = own is not None and own.resolve() == path.resolve()
            if own is not None and not is_below_root:
                self._note_own(path)
                continue
            try:
                stack.enter_context(self._at_rest(path))
                # A store of the root may be the target: nobody else could write to it then.
                store = open_source_store(path, stack, takes_lock=not is_below_root)
            except (CacheError, OSError) as error:
                self._reports.refused.append(store_refusal(path, error))
                continue
            if path.resolve() == self._cache.path(store.config).resolve():
                self._note_own(path)
            elif configs is None or store.config in configs:
                opened.setdefault(store.config, []).append(store)
        return opened

    @contextlib.contextmanager
    def _at_rest(self, path: Path) -> Iterator[None]:
        """No rank of a staged extraction, of this or another machine, writes it meanwhile."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(at_rest(path.resolve(), self._deadline))
            except StorageError as error:
                raise StorageError(f"{error}; merge again when that has ended") from None
            yield

    def _note_own(self, path: Path) -> None:
        self._reports.notes.append(f"{path} is a store of {self._cache.root} itself")

    def merge(self, opened: Mapping[CacheConfig, list[SourceStore]]) -> None:
        """Merge stores that are open, by their config."""
        self._total += sum(store.num_embeddings for each in opened.values() for store in each)
        for config, stores in opened.items():
            done = self._done
            try:
                self._merge_into(config, stores)
            except CacheFullError:
                raise
            except (CacheError, OSError) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise CacheFullError(f"{error}. Free space and merge again") from None
                target = self._cache.path(config)
                self._reports.refused.append(store_refusal(target, error))
            self._done = done + sum(store.num_embeddings for store in stores)
            self._tell()

    def _merge_into(self, config: CacheConfig, stores: list[SourceStore]) -> None:
        merger = self._merger(config, stores)
        stores, provenance = self._fitting(stores, merger)
        SideBySide(merger, stores, provenance, self._detail, self._advance).run()
        if not self._dry_run:
            try:
                merge_failures(self._cache, config, [store.path for store in stores])
            except (OSError, ReadOnlyCacheError) as error:
                merger.report.notes.append(f"the list of failed clips isn't complete: {error}")

    def _merger(self, config: CacheConfig, stores: list[SourceStore]) -> Merger:
        merger = self._mergers.get(config)
        if merger is None:
            merger = self._mergers[config] = Merger(
                self._cache,
                config,
                tolerance=self._tolerance,
                on_conflict=self._on_conflict,
                ragged=any(None in (store.metadata.embedding_shape or ()) for store in stores),
                dry_run=self._dry_run,
                dataset_root=next(filter(None, (s.metadata.dataset_root for s in stores)), ""),
            )
            self._reports.stores.append(merger.report)
        return merger

    def _fitting(
        self, stores: list[SourceStore], merger: Merger
    ) -> tuple[list[SourceStore], Mapping[str, str]]:
        """The stores that may be merged at all, and their provenance with the target's."""
        report, fitting = merger.report, []
        known = merger.metadata() or StoreMetadata.new(report.config)
        for store in stores:
            _tell_damage(store, report)
            shape = store.metadata.embedding_shape
            if shape is None:
                report.notes.append(f"{store.path} is empty")
                continue
            try:
                _check_shapes(store, known)
                combined = known.with_provenance(store.metadata.provenance, report.path)
                combined.pack()
            except CacheError as error:
                report.refused.append(store_refusal(store.path, error))
                continue
            if known.states_weights and not store.metadata.states_weights:
                report.notes.append(
                    f"{store.path} doesn't state which weights computed its embeddings; those of "
                    f"{report.path} are known"
                )
            if known.embedding_shape is None:
                ragged = any(None in (s.metadata.embedding_shape or ()) for s in stores)
                shape = (None, *shape[1:]) if ragged and shape else shape
                combined = StoreMetadata(known.config, shape, provenance=combined.provenance)
            known = combined
            fitting.append(store)
        return fitting, known.provenance

    def _advance(self, number: int) -> None:
        self._done += number
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _tell_damage(store: SourceStore, report: MergeReport) -> None:
    where = os.fspath(store.path)
    if store.damage is not None:
        text = f"damaged; what is sound of it is merged ({store.damage})"
        report.refused.append(Refusal(where, None, text))
    report.refused += [Refusal(where, name, "damaged") for name in store.lost]


def _check_shapes(store: SourceStore, known: StoreMetadata) -> None:
    theirs, ours = store.metadata.embedding_shape or (), known.embedding_shape
    if ours is None:
        return
    if len(theirs) != len(ours) or any(
        a is not None and b is not None and a != b for a, b in zip(theirs, ours, strict=True)
    ):
        raise ConfigError(
            f"its embeddings have shape {theirs}, those of the store {ours}. Another output or "
            "length needs a config of its own"
        )

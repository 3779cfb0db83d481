"""`EmbeddingCache`: all stores under one root."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.cache.coverage import Coverage, coverage_of, shortfall
from lmdbcache.cache.misses import (
    Explanation,
    explain_config,
    explain_sample,
    log_misses,
    read_failures,
)
from lmdbcache.cache.store_info import (
    StoreInfo,
    allocated_bytes,
    info_or_damage,
    is_store,
    read_store_info,
    users_of,
)
from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheNotFoundError,
    CoverageError,
    InvalidEmbeddingError,
    ReadOnlyCacheError,
    StorageError,
)
from lmdbcache.files import existing_parent, expand_user, user_cache_folder
from lmdbcache.machine import ROOT_VARIABLE as ROOT_VARIABLE
from lmdbcache.storage import (
    CompactionResult,
    EmbeddingReader as EmbeddingReader,
    EmbeddingWriter,
    IntegrityReport,
    OnDuplicate,
    Progress,
    ReadStatistics,
    RepairReport,
    Verify,
    canonical_sample_id,
    check_local_for_writing,
    compact,
    counts_of,
    current_generation,
    removing,
    repair,
    statistics_of,
    verify,
)


class EmbeddingCache:
    """All stores under one root, one per config.

    Making one touches nothing on disk; the root is created with the first commit. Picklable; safe
    to use in several processes and threads at once.

    Args:
        root: The cache directory; None takes `$LMDBCACHE_ROOT`, else the platform's cache
            directory.

    Raises:
        ConfigError: No root is given, and the user has no home directory.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        chosen = root or os.environ.get(ROOT_VARIABLE) or user_cache_folder()
        self.root: Final = expand_user(chosen).absolute()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({os.fspath(self.root)!r})"

    # ---- one store

    def path(self, config: CacheConfig) -> Path:
        """Return the folder of this config's store, whether or not it exists."""
        return self.root / f"{config.slug}-{config.fingerprint}"

    def __contains__(self, config: CacheConfig) -> bool:
        return current_generation(self.path(config)) is not None

    def reader(
        self, config: CacheConfig, *, verify: Verify = "never", track_usage: bool = True
    ) -> EmbeddingReader:
        """Return a Mapping of the stored embeddings.

        Args:
            config: Identity of the store.
            verify: Whether values are compared with their checksums: see `EmbeddingReader`.
            track_usage: Whether reading moves the store's time of last use and is counted.

        Raises:
            CacheNotFoundError: Nothing is stored for this config; names the nearest that is.
        """
        store = self.path(config)
        if current_generation(store) is None:
            raise CacheNotFoundError(str(self.explain(config)))
        reader = EmbeddingReader(store, config, verify, track_usage=track_usage)
        reader.on_miss = log_misses
        return reader

    def writer(
        self,
        config: CacheConfig,
        *,
        on_duplicate: OnDuplicate = "skip",
        ragged: bool = False,
        provenance: Mapping[str, str] | None = None,
        without_provenance: bool = False,
        dataset_root: str | Path = "",
        **commit_limits: Any,
    ) -> EmbeddingWriter:
        """Return a writer; the store is made at its first commit. See `EmbeddingWriter`."""
        return EmbeddingWriter(
            self.path(config),
            config,
            on_duplicate=on_duplicate,
            ragged=ragged,
            provenance=provenance,
            without_provenance=without_provenance,
            dataset_root=dataset_root,
            **commit_limits,
        )

    def check_writable(self, config: CacheConfig) -> None:
        """Raise before any work is done if this user may not store something.

        Raises:
            ReadOnlyCacheError: The folder can't be written, or lies on a network file system.
        """
        check_local_for_writing(self.path(config))
        folder = existing_parent(self.path(config))
        if not folder.is_dir():
            raise ReadOnlyCacheError(
                f"{folder} is a file; a cache root is a folder: choose another `root`"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ReadOnlyCacheError(
                f"{folder} can't be written by this user. Check its permissions, or choose another "
                f"cache root: `root`, or ${ROOT_VARIABLE}"
            )

    def info(self, config: CacheConfig) -> StoreInfo:
        """Return what the store of this config holds.

        Raises:
            CacheNotFoundError: Nothing is stored for this config.
            IntegrityError: The store is damaged.
        """
        if config not in self:
            raise CacheNotFoundError(str(self.explain(config)))
        return read_store_info(self.path(config))

    def size(self, config: CacheConfig | None = None) -> int:
        """Return the bytes allocated on disk by one store, or by all."""
        folders = [self.path(config)] if config else self.folders()
        return sum(allocated_bytes(folder) for folder in folders)

    def compact(self, config: CacheConfig, *, progress: Progress | None = None) -> CompactionResult:
        """Rewrite the store without unused pages."""
        return compact(self.path(config), progress=progress)

    def verify(self, config: CacheConfig, *, progress: Progress | None = None) -> IntegrityReport:
        """Compare every value with its checksum."""
        return verify(self.path(config), progress)

    def repair(
        self, config: CacheConfig, *, dry_run: bool = False, progress: Progress | None = None
    ) -> RepairReport:
        """Keep what is sound of a damaged store."""
        return repair(self.path(config), dry_run=dry_run, progress=progress)

    def coverage(self, config: CacheConfig, dataset: Any) -> Coverage:
        """Return how much of a dataset is stored, by class, split and node.

        Args:
            config: Identity of the store; if nothing is stored for it, all is missing.
            dataset: Sample ids; a dict of sample id → audio file; an `AudioDataset` (its samples
                may have a `split` and a `node`), with `train`, `val` and `test` or not; or a dict
                of split → one of these, or of node → split → one of these.

        Raises:
            ConfigError: `dataset` isn't a dataset.
        """
        if config not in self:
            return coverage_of(dataset, None)
        failed = [failure.sample_id for failure in read_failures(self.path(config))]
        with EmbeddingReader(self.path(config), config, track_usage=False) as reader:
            return coverage_of(dataset, reader, failed)

    def require(
        self,
        config: CacheConfig,
        dataset: Any,
        min_coverage: float = 1.0,
        *,
        allow_failed: bool = False,
    ) -> Coverage:
        """Raise before a training, and not in the middle of it, if too little is stored.

        Args:
            config: Identity of the store.
            dataset: See `coverage`.
            min_coverage: Share that must be stored, 0 to 1.
            allow_failed: Leave out clips that failed when last tried: no run fills these.

        Returns:
            What is stored.

        Raises:
            CoverageError: Too little is; the message has a table and what fills the gap.
            ConfigError: `min_coverage` is outside [0, 1], or `dataset` isn't a dataset.
        """
        found = self.coverage(config, dataset)
        if found.is_enough(min_coverage, allow_failed=allow_failed):
            return found
        reason = str(self.explain(config))
        raise CoverageError(shortfall(config, dataset, found, min_coverage, reason))

    def statistics(self, config: CacheConfig) -> ReadStatistics:
        """Return hits and misses of all processes, since the store was made or they were reset."""
        return statistics_of(self.path(config))

    def get_or_compute(
        self,
        config: CacheConfig,
        sample_ids: Sequence[str],
        compute: Callable[[list[str]], Sequence[Any] | npt.NDArray[Any]],
        *,
        provenance: Mapping[str, str] | None = None,
        without_provenance: bool = False,
    ) -> npt.NDArray[Any]:
        """Return the embeddings of these samples; compute and store what isn't stored.

        Args:
            config: Identity of the store.
            sample_ids: Sample ids; repeats are fine and computed once.
            compute: Called with the missing sample ids, if there are any; returns one embedding
                for each, in their order (array, tensor, or sequence of these).
            provenance: See `EmbeddingWriter`.
            without_provenance: See `EmbeddingWriter`.

        Returns:
            `(len(sample_ids), *embedding_shape)`, stored dtype, in the order asked for. A computed
            embedding comes back as stored, so that every later call returns the same bits.

        Raises:
            InvalidSampleIdError: A sample id can't be stored.
            InvalidEmbeddingError: `compute` returned another number of embeddings, or NaN.
            ProvenanceMismatchError: Something is missing, and the store was filled with other
                weights, or with known ones and `provenance` states none; before `compute`.
        """
        asked = [canonical_sample_id(sample_id) for sample_id in sample_ids]
        missing = list(self.coverage(config, asked).missing)
        if missing and config not in self:
            self.explain(config).log_new_store()
        if (counts := counts_of(self.path(config))) is not None:
            absent = set(missing)
            counts.count([i for i in asked if i in absent], are_there=False)
            counts.count([i for i in asked if i not in absent], are_there=True)
        if missing:
            with self.writer(
                config, provenance=provenance, without_provenance=without_provenance
            ) as writer:
                writer.check_provenance()
                computed = compute(list(missing))
                if not isinstance(computed, Sized):
                    raise InvalidEmbeddingError(
                        f"compute returned a {type(computed).__name__}; return an array or a "
                        "sequence with an embedding for each sample id, in their order"
                    )
                if len(computed) != len(missing):
                    raise InvalidEmbeddingError(
                        f"compute returned {len(computed)} embeddings for {len(missing)} samples"
                    )
                writer.put_batch(missing, computed)
        if not asked and config not in self:
            return np.empty((0,), np.float32)
        with self.reader(config) as reader:
            reader.counts_reads = False  # as they were found
            return reader.get_batch(asked)

    # ---- all stores

    def stores(self) -> list[StoreInfo]:
        """Return what is stored under this root, damaged stores included, by folder name."""
        return list(map(info_or_damage, self.folders()))

    def __iter__(self) -> Iterator[CacheConfig]:
        """Iterate over the configs that something is stored for."""
        return iter([store.config for store in self.stores() if store.config])

    def clear(self, config: CacheConfig | None = None) -> list[StoreInfo]:
        """Remove one store, or all under this root.

        Returns:
            What was removed; empty if nothing is stored.

        Raises:
            ReadOnlyCacheError: No permission to remove it.
        """
        folders = [self.path(config)] if config else self.folders()
        return [self.remove(folder) for folder in folders if is_store(folder)]

    def remove(
        self, store: str | os.PathLike[str] | StoreInfo, *, unless_used: bool = False
    ) -> StoreInfo:
        """Remove one store, sound or damaged; waits for its writers.

        Readers go on with what they have open.

        Args:
            store: Its folder, or what `stores` or `info` gave.
            unless_used: Refuse if another process has the store open, or, for a `StoreInfo`, if
                it was read or changed since.

        Returns:
            What was removed.

        Raises:
            CacheNotFoundError: The folder isn't a store under this root.
            ReadOnlyCacheError: No permission to remove it.
            StorageError: It is in use, or was used since.
        """
        folder = Path(store.path if isinstance(store, StoreInfo) else store).absolute()
        if folder.parent != self.root or not is_store(folder):
            raise CacheNotFoundError(f"{folder} isn't a store under {self.root}")
        with removing(folder, wait=not unless_used):
            removed = info_or_damage(folder)
            if unless_used:
                _check_unused(removed, store)
        return removed

    def explain(self, config: CacheConfig, sample_id: str | None = None) -> Explanation:
        """Return why this config, or a sample of it, isn't found; or that it is.

        Args:
            config: Identity of the store.
            sample_id: `file_id:class`; None asks about the config as a whole.
        """
        path, stores = self.path(config), self.stores()
        found = explain_config(config, path, stores)
        return found if sample_id is None else explain_sample(found, path, stores, sample_id)

    def folders(self) -> list[Path]:
        """Return the folders of all stores under this root, by name; opens nothing in them."""
        try:
            return [child for child in sorted(self.root.iterdir()) if is_store(child)]
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise StorageError(f"{self.root} is a file; a cache root is a folder") from None
        except OSError as error:
            raise StorageError(
                f"{self.root} can't be listed ({error.strerror}). Check its permissions, or choose "
                "another cache root"
            ) from None


def _check_unused(found: StoreInfo, seen: object) -> None:
    if users := users_of(found):
        raise StorageError(f"in use by {', '.join(users)}")
    names = ("last_touched", "num_embeddings", "is_damaged")
    if isinstance(seen, StoreInfo) and any(
        getattr(found, name) != getattr(seen, name) for name in names
    ):
        raise StorageError("used or changed since it was looked at")

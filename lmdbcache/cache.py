"""`EmbeddingCache`: all stores under one root."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import platformdirs

from lmdbcache.config import CacheConfig
from lmdbcache.errors import (
    CacheError,
    CacheNotFoundError,
    InvalidEmbeddingError,
    InvalidSampleIdError,
    ReadOnlyCacheError,
    StorageError,
)
from lmdbcache.storage.compaction import CompactionResult, compact
from lmdbcache.storage.generations import current_generation, remove_store, write_lock
from lmdbcache.storage.integrity import IntegrityReport, verify
from lmdbcache.storage.layout import canonical_sample_id, split_sample_id
from lmdbcache.storage.reader import EmbeddingReader
from lmdbcache.storage.writer import EmbeddingWriter, OnDuplicate

__all__ = ["ROOT_VARIABLE", "Coverage", "EmbeddingCache", "StoreInfo", "read_store_info"]

ROOT_VARIABLE: Final = "LMDBCACHE_ROOT"


@dataclass(frozen=True)
class StoreInfo:
    """What one store holds.

    Args:
        path: The store's folder.
        config: Its identity; None if the store is too damaged to tell.
        num_embeddings: Embeddings of the newest commit.
        size_bytes: Allocated on disk.
        embedding_shape: Shape of one embedding, None in front if the first dimension is free.
        creation_time: ISO 8601, UTC.
        dataset_root: Folder that the first writer read from.
        provenance: Weights digest, versions and the like.
        damage: Why the store can't be read, or None.
    """

    path: Path
    config: CacheConfig | None
    num_embeddings: int = 0
    size_bytes: int = 0
    embedding_shape: tuple[int | None, ...] | None = None
    creation_time: str = ""
    dataset_root: str = ""
    provenance: Mapping[str, str] = field(default_factory=dict)
    damage: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": os.fspath(self.path),
            "fingerprint": self.config.fingerprint if self.config else None,
            "config": self.config.to_dict() if self.config else None,
            "num_embeddings": self.num_embeddings,
            "size_bytes": self.size_bytes,
            "embedding_shape": self.embedding_shape,
            "creation_time": self.creation_time,
            "dataset_root": self.dataset_root,
            "provenance": dict(self.provenance),
            "damage": self.damage,
        }


@dataclass(frozen=True)
class Coverage:
    """How much of a list of samples a store holds.

    Args:
        num_asked: Distinct samples asked for.
        missing: The sample ids that aren't stored, in the order asked.
        by_class: Class → (stored, asked).
    """

    num_asked: int
    missing: tuple[str, ...]
    by_class: Mapping[str, tuple[int, int]]

    @property
    def num_present(self) -> int:
        """Samples that are stored."""
        return self.num_asked - len(self.missing)

    @property
    def fraction(self) -> float:
        """Share that is stored, 0 to 1; 1.0 if nothing was asked."""
        return self.num_present / self.num_asked if self.num_asked else 1.0


class EmbeddingCache:
    """All stores under one root, one per config.

    Making one touches nothing on disk; the root is created with the first commit. Picklable; safe
    to use in several processes and threads at once.

    Args:
        root: The cache directory; else `$LMDBCACHE_ROOT`, else the platform's cache directory.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        chosen = root or os.environ.get(ROOT_VARIABLE) or platformdirs.user_cache_dir("lmdbcache")
        self.root: Final = Path(chosen).expanduser().absolute()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({os.fspath(self.root)!r})"

    # ---- one store

    def path(self, config: CacheConfig) -> Path:
        """The folder of this config's store, whether or not it exists."""
        return self.root / f"{config.slug}-{config.fingerprint}"

    def __contains__(self, config: CacheConfig) -> bool:
        return current_generation(self.path(config)) is not None

    def reader(self, config: CacheConfig) -> EmbeddingReader:
        """A Mapping of the stored embeddings.

        Raises:
            CacheNotFoundError: Nothing is stored for this config; names the nearest that is.
        """
        if config not in self:
            raise CacheNotFoundError(self.explain_absence(config))
        return EmbeddingReader(self.path(config), config)

    def writer(
        self,
        config: CacheConfig,
        *,
        on_duplicate: OnDuplicate = "skip",
        ragged: bool = False,
        provenance: Mapping[str, str] | None = None,
        dataset_root: str | Path = "",
        **commit_limits: Any,
    ) -> EmbeddingWriter:
        """A writer; the store is made at its first commit. See `EmbeddingWriter`."""
        return EmbeddingWriter(
            self.path(config),
            config,
            on_duplicate=on_duplicate,
            ragged=ragged,
            provenance=provenance,
            dataset_root=dataset_root,
            **commit_limits,
        )

    def check_writable(self, config: CacheConfig) -> None:
        """Tell before any work is done whether this user may store something.

        Raises:
            ReadOnlyCacheError: The folder can't be written.
        """
        folder = self.path(config)
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ReadOnlyCacheError(
                f"{folder} can't be written by this user. Check its permissions, or choose another "
                f"cache root (--root, ${ROOT_VARIABLE})"
            )

    def info(self, config: CacheConfig) -> StoreInfo:
        """What the store of this config holds.

        Raises:
            CacheNotFoundError: Nothing is stored for this config.
            IntegrityError: The store is damaged.
        """
        if config not in self:
            raise CacheNotFoundError(self.explain_absence(config))
        return read_store_info(self.path(config))

    def size(self, config: CacheConfig | None = None) -> int:
        """Bytes allocated on disk by one store, or by all."""
        folders = [self.path(config)] if config else self._store_folders()
        return sum(_allocated_bytes(folder) for folder in folders)

    def compact(self, config: CacheConfig) -> CompactionResult:
        """Rewrite the store without unused pages. See `lmdbcache.storage.compaction.compact`."""
        return compact(self.path(config))

    def verify(self, config: CacheConfig) -> IntegrityReport:
        """Check every value. See `lmdbcache.storage.integrity.verify`."""
        return verify(self.path(config))

    def coverage(self, config: CacheConfig, sample_ids: Iterable[str]) -> Coverage:
        """How much of these samples is stored, by class. Nothing stored is no error."""
        asked = list(dict.fromkeys(sample_ids))
        missing = asked
        if config in self:
            with EmbeddingReader(self.path(config), config) as reader:
                missing = reader.missing(asked)
        absent = Counter(map(_class_of, missing))
        return Coverage(
            num_asked=len(asked),
            missing=tuple(missing),
            by_class={
                name: (total - absent[name], total)
                for name, total in Counter(map(_class_of, asked)).items()
            },
        )

    def get_or_compute(
        self,
        config: CacheConfig,
        sample_ids: Sequence[str],
        compute: Callable[[list[str]], Sequence[Any] | npt.NDArray[Any]],
    ) -> npt.NDArray[Any]:
        """The embeddings of these samples; what isn't stored is computed once and stored.

        Args:
            config: Identity of the store.
            sample_ids: Sample ids; repeats are fine and computed once.
            compute: Called with the missing sample ids, if there are any; returns one embedding
                for each, in their order (array, tensor, or sequence of these).

        Returns:
            `(len(sample_ids), *embedding_shape)`, stored dtype, in the order asked for. A computed
            embedding comes back as stored, so that every later call returns the same bits.

        Raises:
            InvalidSampleIdError: A sample id can't be stored.
            InvalidEmbeddingError: `compute` returned another number of embeddings, or NaN.
        """
        asked = [canonical_sample_id(sample_id) for sample_id in sample_ids]
        missing = list(self.coverage(config, asked).missing)
        if missing:
            computed = compute(list(missing))
            if len(computed) != len(missing):
                raise InvalidEmbeddingError(
                    f"compute returned {len(computed)} embeddings for {len(missing)} samples"
                )
            with self.writer(config) as writer:
                writer.put_batch(missing, computed)
        if not asked and config not in self:
            return np.empty((0,), np.float32)
        with self.reader(config) as reader:
            return reader.get_batch(asked)

    # ---- all stores

    def stores(self) -> list[StoreInfo]:
        """What is stored under this root, damaged stores included, by folder name."""
        return list(map(_info_or_damage, self._store_folders()))

    def __iter__(self) -> Iterator[CacheConfig]:
        """The configs that something is stored for."""
        return iter([store.config for store in self.stores() if store.config])

    def clear(self, config: CacheConfig | None = None) -> list[StoreInfo]:
        """Remove one store, or all under this root.

        Returns:
            What was removed; nothing stored is no error.

        Raises:
            ReadOnlyCacheError: No permission to remove it.
        """
        folders = [self.path(config)] if config else list(self._store_folders())
        return [self.remove(folder) for folder in folders if _is_store(folder)]

    def remove(self, store: str | Path) -> StoreInfo:
        """Remove the store in this folder, sound or damaged.

        Returns:
            What was removed.

        Raises:
            CacheNotFoundError: The folder isn't a store under this root.
            ReadOnlyCacheError: No permission to remove it.
        """
        folder = Path(store).absolute()
        if folder.parent != self.root or not _is_store(folder):
            raise CacheNotFoundError(f"{folder} isn't a store under {self.root}")
        removed = _info_or_damage(folder)
        with write_lock(folder):
            remove_store(folder)
        return removed

    def nearest(self, config: CacheConfig) -> StoreInfo | None:
        """The stored config with the fewest differing fields; the fullest of several."""
        stores = [store for store in self.stores() if store.config and store.num_embeddings]
        return min(
            stores,
            key=lambda store: (
                len(config.differences(store.config)) if store.config else 0,
                -store.num_embeddings,
            ),
            default=None,
        )

    def explain_absence(self, config: CacheConfig) -> str:
        """Why nothing is found for this config, in one sentence or two."""
        nearest = self.nearest(config)
        if nearest is None or nearest.config is None:
            return f"nothing is stored under {self.root} yet (asked for {config.slug})"
        differences = ", ".join(
            f"{name}: {asked!r} asked, {stored!r} stored"
            for name, (asked, stored) in config.differences(nearest.config).items()
        )
        return (
            f"nothing is stored under {self.root} for this config. Nearest is "
            f"{nearest.path.name} with {nearest.num_embeddings} embeddings; {differences}"
        )

    def _store_folders(self) -> Iterator[Path]:
        try:
            children = sorted(self.root.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StorageError(
                f"{self.root} can't be listed ({error.strerror}). Check its permissions, or choose "
                "another cache root"
            ) from None
        for child in children:
            if _is_store(child):
                yield child


def read_store_info(store: str | Path) -> StoreInfo:
    """What the store in this folder holds.

    Raises:
        CacheNotFoundError: There is no store.
        IntegrityError: The store is damaged.
    """
    store = Path(store).absolute()
    with EmbeddingReader(store) as reader:
        metadata, num_embeddings = reader.metadata, len(reader)
    return StoreInfo(
        path=store,
        config=metadata.config,
        num_embeddings=num_embeddings,
        size_bytes=_allocated_bytes(store),
        embedding_shape=metadata.embedding_shape,
        creation_time=metadata.creation_time,
        dataset_root=metadata.dataset_root,
        provenance=metadata.provenance,
    )


def _is_store(folder: Path) -> bool:
    """Whether the folder is a store, sound or not."""
    try:
        return current_generation(folder) is not None
    except CacheError:
        return True


def _info_or_damage(folder: Path) -> StoreInfo:
    try:
        return read_store_info(folder)
    except (CacheError, OSError) as error:
        return StoreInfo(folder, None, size_bytes=_allocated_bytes(folder), damage=str(error))


def _allocated_bytes(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            # A compaction may remove a file meanwhile.
            with contextlib.suppress(FileNotFoundError):
                total += Path(directory, name).lstat().st_blocks * 512
    return total


def _class_of(sample_id: str) -> str:
    try:
        return split_sample_id(sample_id)[1]
    except InvalidSampleIdError:
        return "(no class)"

"""What one store holds: its metadata, its size, or its damage."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import ClassVar

from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError, FormatVersionError, IntegrityError
from lmdbcache.storage import (
    EmbeddingReader,
    Report,
    current_generation,
    last_used,
    last_written,
    others,
    space_use,
)


@dataclass(frozen=True)
class StoreInfo(Report):
    """The content of one store, or its damage.

    Args:
        path: The store's folder.
        config: Its identity; None if the store is too damaged to read it.
        num_embeddings: Embeddings of the newest commit.
        size_bytes: Allocated on disk.
        embedding_shape: Shape of one embedding, None in front if the first dimension is free.
        creation_time: ISO 8601, UTC.
        dataset_root: Folder that the first writer read from.
        provenance: Weights digest, versions and the like.
        free_bytes: Unused in the file; a compaction gives them back.
        pinned_bytes: Those of them that writers can't reuse, because a process reads an old
            snapshot.
        readers: Process id → how many commits its oldest snapshot is behind, this process
            included; only processes that this user may see.
        damage: Why the store can't be read, or None.
        is_damaged: Whether that is damage: not a missing permission, a network mount, or the
            format of a newer release.
        last_used: When embeddings were last read, give or take an hour; None if never.
        last_written: When the newest commit was made; None if that isn't known.
    """

    derived: ClassVar = ("fingerprint",)

    path: Path
    config: CacheConfig | None
    num_embeddings: int = 0
    size_bytes: int = 0
    embedding_shape: tuple[int | None, ...] | None = None
    creation_time: str = ""
    dataset_root: str = ""
    provenance: Mapping[str, str] = field(default_factory=dict)
    free_bytes: int = 0
    pinned_bytes: int = 0
    readers: Mapping[int, int] = field(default_factory=dict)
    damage: str | None = None
    is_damaged: bool = False
    last_used: datetime | None = None
    last_written: datetime | None = None

    @property
    def created(self) -> datetime | None:
        """`creation_time` as a time; None if it isn't known."""
        with contextlib.suppress(ValueError):
            time = datetime.fromisoformat(self.creation_time)
            return time if time.tzinfo else time.replace(tzinfo=timezone.utc)
        return None

    @property
    def last_touched(self) -> datetime | None:
        """When it was last read or written; None if neither is known."""
        return max(filter(None, (self.last_used, self.last_written)), default=None)

    @property
    def fingerprint(self) -> str | None:
        """The config's fingerprint; None without a config."""
        return self.config.fingerprint if self.config else None


def read_store_info(store: str | Path) -> StoreInfo:
    """Return what the store in this folder holds.

    Raises:
        CacheNotFoundError: The folder has no store.
        IntegrityError: The store is damaged.
    """
    store = Path(store).absolute()
    with EmbeddingReader(store, track_usage=False) as reader:
        metadata, num_embeddings = reader.metadata, len(reader)
        space = reader.read_pinned(space_use)
    return StoreInfo(
        path=store,
        config=metadata.config,
        num_embeddings=num_embeddings,
        size_bytes=allocated_bytes(store),
        embedding_shape=metadata.embedding_shape,
        creation_time=metadata.creation_time,
        dataset_root=metadata.dataset_root,
        provenance=metadata.provenance,
        free_bytes=space.free_bytes,
        pinned_bytes=space.pinned_bytes,
        readers=space.readers,
        last_used=last_used(store),
        last_written=last_written(store),
    )


def users_of(info: StoreInfo) -> list[str]:
    """Return `4711 python` for each other process that has the store open, as far as is known."""
    return others(info.path) or [str(pid) for pid in info.readers if pid != os.getpid()]


def is_store(folder: Path) -> bool:
    """Whether the folder is a store, sound or not."""
    try:
        return current_generation(folder) is not None
    except CacheError:
        return True


def info_or_damage(folder: Path) -> StoreInfo:
    """Return what the store in this folder holds, or why it can't be read."""
    try:
        return read_store_info(folder)
    except (CacheError, OSError) as error:
        size = allocated_bytes(folder)
        return StoreInfo(
            folder,
            None,
            size_bytes=size,
            damage=str(error),
            is_damaged=isinstance(error, IntegrityError)
            and not isinstance(error, FormatVersionError),
            last_used=last_used(folder),
            last_written=last_written(folder),
        )


def allocated_bytes(folder: Path) -> int:
    """Return the bytes that the files under a folder take on disk."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            # A compaction may remove a file in the meantime.
            with contextlib.suppress(FileNotFoundError):
                total += Path(directory, name).lstat().st_blocks * 512
    return total

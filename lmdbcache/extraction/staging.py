"""One store for each rank of an extraction on several machines, to be merged afterwards.

LMDB wants one machine to use a store at a time. Below a staging folder that all machines see, each
store has one process that writes and reads it; others look into it when that process has ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import xxhash

from lmdbcache.cache import EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.errors import CacheError, ConfigError, ReadOnlyCacheError, StorageError
from lmdbcache.exchange import at_rest, held_store
from lmdbcache.extraction.ranks import RankShare
from lmdbcache.files import expand_user
from lmdbcache.storage import check_local_for_writing, network_mount

_logger: Final = logging.getLogger(__name__)

# A batch system may start a task again before the old one has committed and ended.
_PATIENCE_SECONDS: Final = 60.0


def staging_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a staging folder.

    Raises:
        ConfigError: It is a URL.
    """
    if "://" in os.fspath(folder):
        raise ConfigError(f"staging: {os.fspath(folder)!r} is a URL; it has to be a folder")
    return expand_user(folder).absolute()


class Staging:
    """Where a rank writes, and what it leaves out because the root or an earlier run has it.

    The store lies in `FOLDER/world-<W>-batch-<B>-<digest of the clips>/rank-<R>/`, a cache root.
    Ranks of one such group never have a unit in common. What ranks of other groups have stored,
    at another world size, say, is left out.

    Args:
        folder: The staging folder, the same for all ranks.
        root: Where the stores will be merged into.
        config: The store's identity.
        share: Which rank this is.
        sample_ids: All samples of the extraction, those of other ranks included.
        unit_size: Clips of a unit.
        patience: How many seconds to wait for processes that are about to end; None waits a
            minute.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        root: EmbeddingCache,
        config: CacheConfig,
        share: RankShare,
        sample_ids: Iterable[str],
        unit_size: int,
        patience: float | None = None,
    ) -> None:
        self._patience = _PATIENCE_SECONDS if patience is None else patience
        self._folder = staging_folder(folder)
        self._root = root
        self._config = config
        self._share = share
        digest = xxhash.xxh3_64()
        for sample_id in sorted(sample_ids):
            digest.update(sample_id.encode("utf-8", "surrogatepass") + b"\n")
        name = f"world-{share.world_size}-batch-{unit_size}-{digest.hexdigest()}"
        self._group = self._folder / name
        self.cache: Final = EmbeddingCache(self._group / f"rank-{share.rank}")
        self._others: list[EmbeddingCache] = []

    @property
    def root_store(self) -> Path:
        """The store that this one will be merged into."""
        return self._root.path(self._config)

    @property
    def num_stores(self) -> int:
        """How many such stores are filled on the same disk, as far as that is known."""
        share = self._share
        return share.world_size if network_mount(self._folder) else share.local_world_size

    def stored(self, sample_ids: Collection[str]) -> set[str]:
        """Those of the samples that the root or a rank of another group has stored.

        What can't be read there counts as not stored.

        Raises:
            CacheError: The root can't be read.
        """
        missing = set(self._root.coverage(self._config, sample_ids).missing)
        self._others = [self._root]
        deadline = time.monotonic() + self._patience
        for other in sorted(self._folder.glob("world-*/rank-*")):
            if not missing or other.parent == self._group:
                continue
            cache = EmbeddingCache(other)
            try:
                with at_rest(cache.path(self._config), deadline):
                    if self._config in cache:
                        missing = set(cache.coverage(self._config, missing).missing)
                        self._others.append(cache)
            except (CacheError, OSError) as error:
                _logger.warning("what %s holds is computed again: %s", other, error)
        return set(sample_ids) - missing

    def shape(self) -> tuple[int | None, ...] | None:
        """The embeddings' shape, by the first of the others that knows it."""
        for cache in [self._root, *self._others]:
            if self._config in cache:
                with cache.reader(self._config, track_usage=False) as reader:
                    if reader.embedding_shape is not None:
                        return reader.embedding_shape
        return None

    def check_provenance(self, provenance: Mapping[str, str]) -> None:
        """Refuse now what a merge would refuse after hours.

        Raises:
            ProvenanceMismatchError: The root was filled with other weights or features.
        """
        if self._config in self._root:
            with self._root.reader(self._config, track_usage=False) as reader:
                reader.metadata.with_provenance(provenance, self.root_store)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep this rank's store to this process.

        Raises:
            StorageError: The same rank runs already.
            ReadOnlyCacheError: The folder can't be written.
        """
        store = self.cache.path(self._config)
        check_local_for_writing(store.parent)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held_store(store, self._patience))
            except StorageError as error:
                raise StorageError(
                    f"{self._share} runs already ({error}) and writes to {store.parent}. Wait for "
                    "it or end it; each rank runs once, and not while its store is merged"
                ) from None
            except OSError as error:
                raise ReadOnlyCacheError(
                    f"{store.parent} can't be written ({error.strerror}); choose another staging "
                    "folder"
                ) from None
            yield

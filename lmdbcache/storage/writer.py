"""Writing one store: transactional batches, in turn with other processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from lmdbcache.config import CacheConfig
from lmdbcache.errors import ConfigError, DuplicateSampleError, InvalidEmbeddingError, StorageError
from lmdbcache.storage.layout import sample_key
from lmdbcache.storage.values import as_stored, check_shape
from lmdbcache.storage.writing.collecting import CollectedEmbeddings
from lmdbcache.storage.writing.committing import BeforeCommit, Committer
from lmdbcache.storage.writing.pending import CommitLimits

__all__ = ["EmbeddingWriter", "OnDuplicate"]

OnDuplicate = Literal["skip", "overwrite", "error"]

_COMMITTED_AT_ONCE_BYTES: Final = 8 << 20
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 256, 8 << 20


class EmbeddingWriter(CollectedEmbeddings):
    """Collects embeddings and commits them in transactions.

    A commit happens when enough has been collected, by bytes, count or time, at `commit`, and at a
    clean exit of the `with` block; an exception discards what wasn't committed. Committed
    embeddings survive a killed process and a power cut. Nothing is created before the first commit.

    A commit of much data that `put` starts goes on in a thread while more is collected; the next
    one, `commit` and `close` wait for it, and raise what went wrong with it.

    Several processes may write to one store: each commit waits for its turn. Threads may share a
    writer. It belongs to the process that made it and doesn't pickle.

    Args:
        store: The store's folder; made when needed.
        config: The store's identity.
        on_duplicate: For a sample that is stored already: `"skip"` keeps the stored one,
            `"overwrite"` replaces it, `"error"` refuses it.
        ragged: Let the first dimension differ between embeddings. Only looked at when the store
            is new.
        provenance: Kept in the metadata; other weights than the store's are refused.
        without_provenance: Add to a store with a `weights_digest` although `provenance` states
            none. Otherwise that is refused, as the embeddings could be another model's.
        dataset_root: Kept in the metadata of a new store.
        commit_bytes: Commit when this much is collected.
        commit_records: Commit when this many embeddings are collected.
        commit_seconds: Commit at the first `put` this long after the oldest uncommitted one.
        replace: Sample ids that are overwritten whatever `on_duplicate` says.
        before_commit: Called inside each commit, maybe from a thread, maybe again for the same
            samples: sample id → (checksum of the embedding it replaces or None, of the new one).
    """

    def __init__(
        self,
        store: str | Path,
        config: CacheConfig,
        *,
        on_duplicate: OnDuplicate = "skip",
        ragged: bool = False,
        provenance: Mapping[str, str] | None = None,
        without_provenance: bool = False,
        dataset_root: str | Path = "",
        commit_bytes: int = 64 << 20,
        commit_records: int = 2048,
        commit_seconds: float = 10.0,
        replace: Iterable[str] = (),
        before_commit: BeforeCommit | None = None,
    ) -> None:
        if on_duplicate not in ("skip", "overwrite", "error"):
            raise ConfigError(
                f"on_duplicate: {on_duplicate!r}; known are 'skip', 'overwrite', 'error'"
            )
        self._config = config
        self._on_duplicate = on_duplicate
        self._ragged = ragged
        self._replaced = frozenset(sample_key(sample_id) for sample_id in replace)
        folder = Path(store).absolute()
        committer = Committer(
            folder,
            config,
            on_duplicate=on_duplicate,
            provenance={str(name): str(value) for name, value in (provenance or {}).items()},
            without_provenance=without_provenance,
            dataset_root=str(dataset_root),
            replaced=self._replaced,
            before_commit=before_commit,
        )
        limits = CommitLimits(commit_bytes, commit_records, commit_seconds)
        super().__init__(folder, committer, limits)

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._store

    @property
    def config(self) -> CacheConfig:
        """The store's identity."""
        return self._config

    def check_provenance(self) -> None:
        """Refuse before anything is computed what `put` would refuse: unstated weights.

        Raises:
            ProvenanceMismatchError: The store has a `weights_digest`, and `provenance` states none.
        """
        with self._usable():
            self._committer.check_stated()

    def put(self, sample_id: str, embedding: Any) -> bool:
        """Add one embedding to the next commit.

        Args:
            sample_id: `file_id:class`.
            embedding: numpy array or torch tensor (any device, with or without grad) of the
                store's shape; cast to the stored dtype.

        Returns:
            False if the sample is stored already and is skipped.

        Raises:
            InvalidSampleIdError: Not a usable sample id.
            InvalidEmbeddingError: NaN, Inf, or another shape than the store's.
            DuplicateSampleError: Stored already, with `on_duplicate="error"`.
            ProvenanceMismatchError: See `check_provenance`.
        """
        key = sample_key(sample_id)
        with self._usable():
            if not self._replaces(key) and self._known([key]):
                if self._on_duplicate == "error":
                    raise DuplicateSampleError(
                        f"{sample_id} is stored in {self._store} already. Leave it out, or write "
                        "with on_duplicate='skip' or 'overwrite'"
                    )
                return False
            self._committer.check_stated()
            value = as_stored(sample_id, embedding, self._config.dtype, copy=not self._borrows)
            self._check_shape(sample_id, value.shape)
            self._pending.put(key, value)
            self._commit_if_due()
            return True

    def put_batch(self, sample_ids: Iterable[str], embeddings: Iterable[Any]) -> int:
        """Add several embeddings. From 8 MiB on they are committed before this returns.

        They may be committed in several transactions. Inside `together` they are committed in one,
        at the end of its block or later.

        Args:
            sample_ids: `(n,)` sample ids.
            embeddings: One for each. An array or tensor `(n, *embedding_shape)` is checked and
                cast as a whole; for small embeddings that is several times faster than one by one.

        Returns:
            How many weren't stored already.

        Raises:
            InvalidEmbeddingError: Not as many embeddings as sample ids, or a sparse tensor; and see
                `put`.
        """
        sample_ids = list(sample_ids)
        if not hasattr(embeddings, "shape"):
            embeddings = list(embeddings)
        elif not hasattr(embeddings, "itemsize"):  # a table: iterating it gives its columns' names
            embeddings = np.asarray(embeddings)
        elif str(getattr(embeddings, "layout", "")).startswith("torch.sparse"):
            raise InvalidEmbeddingError(
                "embeddings: a sparse tensor; give a dense one (`to_dense`)"
            )
        if len(embeddings) != len(sample_ids):  # type: ignore[arg-type]
            raise InvalidEmbeddingError(
                f"{len(embeddings)} embeddings for {len(sample_ids)} sample ids"  # type: ignore[arg-type]
            )
        with self._usable(), self._borrowing(embeddings):
            if isinstance(embeddings, list):
                pairs = zip(sample_ids, embeddings, strict=True)
                return sum([self.put(sample_id, row) for sample_id, row in pairs])
            row_bytes = 4 * math.prod(embeddings.shape[1:])
            step = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(1, row_bytes)))
            added = 0
            for start in range(0, len(sample_ids), step):
                part = slice(start, start + step)
                added += self._put_rows(sample_ids[part], embeddings[part])  # type: ignore[index]
            return added

    def _put_rows(self, sample_ids: list[str], rows: Any) -> int:
        keys = [sample_key(sample_id) for sample_id in sample_ids]
        known = self._known([key for key in keys if not self._replaces(key)])
        if len(known) < len(set(keys)):
            self._committer.check_stated()
        try:
            if known and self._on_duplicate == "error":
                raise InvalidEmbeddingError
            first, copy = f"{sample_ids[0]} …", not self._borrows
            values = as_stored(first, rows, self._config.dtype, copy=copy)
        except InvalidEmbeddingError:  # one by one, the culprit is named
            return sum([self.put(i, row) for i, row in zip(sample_ids, rows, strict=True)])
        self._check_shape(sample_ids[0], values.shape[1:])
        before = self._pending.num_put
        for key, value in zip(keys, values, strict=True):
            if key not in known:
                self._pending.put(key, value, replace=self._replaces(key))
        added = self._pending.num_put - before
        self._commit_if_due()
        return added

    @contextlib.contextmanager
    def _borrowing(self, embeddings: Any) -> Iterator[None]:
        """Collect large embeddings without a copy, and commit them while they are the caller's."""
        if isinstance(embeddings, list):
            num_bytes = sum(map(_num_bytes, embeddings))
        else:
            num_bytes = _num_bytes(embeddings)
        if num_bytes < _COMMITTED_AT_ONCE_BYTES or self._borrows or self._is_together:
            yield
            return
        self._borrows = True
        try:
            yield
            self.commit()
        except BaseException:
            self._pending.own()
            raise
        finally:
            self._borrows = False

    def remove(self, sample_ids: Iterable[str]) -> int:
        """Remove embeddings with their checksums in one transaction; durable when this returns.

        What was collected of them is dropped, too. Readers in other processes keep what their
        snapshot has. Later commits reuse the space; `compact` gives it back.

        Returns:
            How many were stored; others are passed over.

        Raises:
            CacheFullError: No room for the pages that change; nothing was removed.
            StorageError: Called inside `together`.
        """
        keys = {sample_key(sample_id) for sample_id in sample_ids}
        with self._usable():
            if self._is_together:
                raise StorageError(
                    f"{self._store}: remove() inside together() would be a separate transaction. "
                    "Call it before or after the block"
                )
            self._settle()
            removed = self._committer.remove(keys)
            self._pending.drop(keys)
            return removed

    def __enter__(self) -> EmbeddingWriter:
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._store)!r}, {self.num_pending} pending)"

    def __reduce__(self) -> Any:
        raise TypeError("a writer doesn't pickle; open one in the process that writes")

    def _replaces(self, key: bytes) -> bool:
        return self._on_duplicate == "overwrite" or key in self._replaced

    def _check_shape(self, sample_id: str, shape: tuple[int, ...]) -> None:
        if self._shape is None:
            self._shape = (None, *shape[1:]) if self._ragged and shape else shape
        check_shape(sample_id, shape, self._shape)


def _num_bytes(value: Any) -> int:
    # Not its nbytes: that of a sparse tensor raises.
    return math.prod(getattr(value, "shape", ())) * getattr(value, "itemsize", 0)

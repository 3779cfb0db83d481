"""What a dataset has loaded: embeddings in memory over those of a store, and a store by class."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lmdbcache.storage import EmbeddingReader, join_sample_id
from lmdbcache.training import TensorMapping


class EmbeddingOverlay(MutableMapping[str, Any]):
    """Embeddings in memory, by sample id, over a Mapping that stays as it is.

    What is assigned hides what lies below; what is removed is gone from here only.

    Args:
        below: Such as a `TensorMapping` of a store; None: nothing.

    Attributes:
        below: As given; may be replaced.
        memory: What was assigned.
    """

    def __init__(self, below: Mapping[str, Any] | None = None) -> None:
        self.memory: dict[str, Any] = {}
        self._removed: set[str] = set()
        self.below = below

    @property
    def is_changed(self) -> bool:
        """Whether it differs from what lies below."""
        return bool(self.memory or self._removed)

    def __getitem__(self, sample_id: str) -> Any:
        if sample_id in self.memory:
            return self.memory[sample_id]
        if self.below is None or sample_id in self._removed:
            raise KeyError(sample_id)
        return self.below[sample_id]

    def __setitem__(self, sample_id: str, embedding: Any) -> None:
        self.memory[sample_id] = embedding

    def __delitem__(self, sample_id: str) -> None:
        if sample_id not in self:
            raise KeyError(sample_id)
        self.memory.pop(sample_id, None)
        self._removed.add(sample_id)

    def clear(self) -> None:
        """Hold nothing, not even what lies below."""
        self.put_over(None)
        self.memory.clear()

    def put_over(self, below: Mapping[str, Any] | None) -> None:
        """Replace what lies below, and keep what was assigned."""
        self.below = below
        self._removed.clear()

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self.memory or self._is_below(sample_id)

    def __iter__(self) -> Iterator[str]:
        yield from list(self.memory)
        for sample_id in self.below or ():
            if sample_id not in self.memory and sample_id not in self._removed:
                yield sample_id

    def __len__(self) -> int:
        if not self.below:
            return len(self.memory)
        hidden = sum(name in self.below for name in self.memory.keys() | self._removed)
        return len(self.memory) + len(self.below) - hidden

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.memory)} in memory over {self.below!r})"

    def _is_below(self, sample_id: object) -> bool:
        return self.below is not None and sample_id not in self._removed and sample_id in self.below


class StoredClass(Mapping[str, Any]):
    """The embeddings of one class of a store, in the form of a manifest with chunks.

    Nothing is read before it is asked for. The file ids are those of when it was made.

    - `"manifest"`: dict of `class_name`, `total_samples`, `embedding_shape` (list), `chunks` (list
      of dicts with `file`, `num_samples` and `shape`) and `file_id_to_index`;
    - `"index_map"`: dict of file id → [chunk, offset];
    - `"chunks"`: list of one `StoredChunk`, (total_samples, *embedding_shape).

    Args:
        embeddings: All of the store.
        class_name: In canonical form.
        file_ids: Of this class.
    """

    def __init__(self, embeddings: TensorMapping, class_name: str, file_ids: list[str]) -> None:
        self.embeddings, self._class_name, self._file_ids = embeddings, class_name, file_ids

    @functools.cached_property
    def _values(self) -> dict[str, Any]:
        arrays: Any = self.embeddings.arrays
        ids = [join_sample_id(file_id, self._class_name) for file_id in self._file_ids]
        chunk = StoredChunk(arrays, ids)
        index_map = {file_id: [0, offset] for offset, file_id in enumerate(self._file_ids)}
        stated: dict[str, Any] = {
            "file": str(arrays.path),
            "num_samples": len(ids),
            "shape": list(chunk.shape),
        }
        manifest = {
            "class_name": self._class_name,
            "total_samples": len(ids),
            "embedding_shape": stated["shape"][1:],
            "chunks": [stated],
            "file_id_to_index": index_map,
        }
        return {"manifest": manifest, "chunks": [chunk], "index_map": index_map}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_values"}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._class_name!r}, {len(self._file_ids)} embeddings)"


class StoredChunk(Sequence[npt.NDArray[Any]]):
    """Embeddings of a store as an array (n, *embedding_shape); each is read when it is indexed.

    Args:
        reader: Of the store.
        sample_ids: Of the rows.
    """

    def __init__(self, reader: EmbeddingReader, sample_ids: Sequence[str]) -> None:
        self._reader, self._sample_ids = reader, sample_ids
        self._rows = np.arange(len(sample_ids))

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Shape of all; None where embeddings differ."""
        return (len(self), *(self._reader.embedding_shape or ()))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return self._reader.dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return len(self._sample_ids)

    def __getitem__(self, index: Any) -> Any:
        """Read-only copies, as an array would give them; at least the first axis is indexed.

        Raises:
            IndexError: As of an array.
            SampleNotFoundError: One was removed from the store.
        """
        first, *others = index if isinstance(index, tuple) else (index,)
        rows = self._rows[first]
        if rows.ndim == 0:
            found = self._reader[self._sample_ids[int(rows)]][tuple(others)]
        else:
            found = self._reader.get_batch([self._sample_ids[row] for row in rows])
            of_all = (slice(None), *others)
            found = found[of_all]
        found.setflags(write=False)
        return found

    def __array__(
        self,
        dtype: npt.DTypeLike | None = None,
        copy: bool | None = None,  # noqa: FBT001
    ) -> npt.NDArray[Any]:
        return np.array(self[:], dtype=dtype)


def classes_in(embeddings: TensorMapping, classes: Collection[str]) -> dict[str, StoredClass]:
    """Return class name → its embeddings, of those classes of which a store has any."""
    file_ids: dict[str, list[str]] = {name: [] for name in classes}
    for sample_id in embeddings:
        file_id, _, class_name = sample_id.rpartition(":")
        if class_name in file_ids:
            file_ids[class_name].append(file_id)
    return {name: StoredClass(embeddings, name, ids) for name, ids in file_ids.items() if ids}

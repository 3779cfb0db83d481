"""Stored arrays as torch tensors, one by one: a lazy Mapping."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from lmdbcache.errors import InvalidSampleIdError
from lmdbcache.storage import NUMPY_DTYPES, split_sample_id

_BFLOAT16: Final = NUMPY_DTYPES["bfloat16"]


def as_tensor(array: npt.NDArray[Any] | torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor over the memory of an owned, writable array; bfloat16 included."""
    if isinstance(array, torch.Tensor):
        return array
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class TensorMapping(Mapping[str, torch.Tensor]):
    """A Mapping of arrays as one of CPU tensors; each is read when it is asked for.

    Picklable if the arrays' Mapping is; works in forked and spawned workers as that does.

    Args:
        arrays: Sample id → array, such as an `EmbeddingReader`.
        classes: Narrow it to sample ids of these classes.
    """

    def __init__(
        self, arrays: Mapping[str, npt.NDArray[Any]], classes: Collection[str] | None = None
    ) -> None:
        self._arrays = arrays
        self._classes = None if classes is None else frozenset(name.lower() for name in classes)
        self._counted: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Sorted: a set has another order in each process, and the same should pickle the same.
        classes = None if self._classes is None else sorted(self._classes)
        return {"arrays": self._arrays, "classes": classes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TensorMapping.__init__(self, state["arrays"], state["classes"])

    @property
    def arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """The Mapping underneath, not narrowed."""
        return self._arrays

    @property
    def is_narrowed(self) -> bool:
        """Whether it has some classes only."""
        return self._classes is not None

    def __getitem__(self, sample_id: str) -> torch.Tensor:
        if self._classes is not None and not self._admits(sample_id):
            raise KeyError(sample_id)
        return as_tensor(self._arrays[sample_id])

    def __contains__(self, sample_id: object) -> bool:
        return self._admits(sample_id) and sample_id in self._arrays

    def __iter__(self) -> Iterator[str]:
        return (sample_id for sample_id in self._arrays if self._admits(sample_id))

    def __len__(self) -> int:
        total = len(self._arrays)
        if self._classes is None:
            return total
        # Counting walks over all keys; once is enough while nothing is added.
        if self._counted is None or self._counted[0] != total:
            self._counted = (total, sum(1 for _ in self))
        return self._counted[1]

    def __repr__(self) -> str:
        narrowed = "" if self._classes is None else f", classes={sorted(self._classes)}"
        return f"{type(self).__name__}({self._arrays!r}{narrowed})"

    def _admits(self, sample_id: object) -> bool:
        if self._classes is None:
            return True
        try:
            return split_sample_id(sample_id)[1] in self._classes  # type: ignore[arg-type]
        except InvalidSampleIdError:
            return False

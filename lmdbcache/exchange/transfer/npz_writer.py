"""A .npz file of embeddings, written without holding them in memory."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmdbcache.exchange.transfer.npz_source import LENGTHS
from lmdbcache.exchange.transfer.parts import Embeddings

__all__ = ["NpzPart"]


class NpzPart:
    """Writes `sample_ids`, `metadata` (JSON) and `embeddings` of shape (n, *embedding_shape).

    Where the first dimension differs, the embeddings lie one behind the other along it, and
    `lengths` has the length of each. bfloat16 is written as float32.

    Args:
        path: The file.
        description: For `metadata`.
        sample_ids: Of all embeddings, in order.
        lengths: First dimension of each embedding, where that differs.
    """

    def __init__(
        self,
        path: Path,
        description: dict[str, Any],
        sample_ids: Sequence[str],
        lengths: Sequence[int] | None,
    ) -> None:
        self._dtype = np.dtype("f2" if description["dtype"] == "float16" else "f4")
        self._raw = path.open("wb")
        self._archive = zipfile.ZipFile(self._raw, "w", allowZip64=True)
        rest = description["embedding_shape"][0 if lengths is None else 1 :]
        self._put("metadata", np.array(json.dumps(description)))
        self._put("sample_ids", np.array(sample_ids))
        if lengths is not None:
            self._put(LENGTHS, np.array(lengths, np.int64))
        self._file = self._archive.open("embeddings.npy", "w", force_zip64=True)
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (len(sample_ids) if lengths is None else sum(lengths), *rest),
        }
        np.lib.format.write_array_header_2_0(self._file, header)

    def _put(self, name: str, array: npt.NDArray[Any]) -> None:
        with self._archive.open(f"{name}.npy", "w") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)

    def add(self, sample_ids: Sequence[str], embeddings: Embeddings) -> None:  # noqa: ARG002 - the names are there already
        """Write some embeddings."""
        for array in embeddings:
            self._file.write(np.ascontiguousarray(array, self._dtype).tobytes())

    def close(self) -> None:
        """Write the archive's directory."""
        self._file.close()
        self._archive.close()
        self._raw.close()

    def abandon(self) -> None:
        """Close the file; what goes wrong with that doesn't matter any more."""
        for opened in (self._file, self._archive, self._raw):
            with contextlib.suppress(OSError, ValueError):
                opened.close()

"""`.npz` files: an array for each name, or one array and its names."""

from __future__ import annotations

import contextlib
import json
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import TransferError
from lmdbcache.exchange.formats.base import (
    CLASSES,
    EMBEDDINGS,
    IDS,
    METADATA,
    Description,
    Embeddings,
    ForwardRows,
    Part,
    Rows,
    Samples,
    Source,
    describe,
    description_of_json,
    first_of,
    numbers,
    text_list,
)
from lmdbcache.exchange.formats.keys import KeyChoice
from lmdbcache.storage import NUMPY_DTYPES

# Of embeddings that lie one behind the other: the first dimension of each.
_LENGTHS: Final = "lengths"
_BLOCK_BYTES: Final = 8 << 20
_BROKEN: Final = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def read_npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, whether it is in Fortran order, dtype) of an .npy file, read at its beginning.

    Raises:
        ValueError: It isn't one, or of a version that isn't known here.
    """
    version = np.lib.format.read_magic(file)
    reads = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in reads:
        raise ValueError(f"version {version} of numpy's format")
    try:
        shape, is_fortran, dtype = reads[version](file)
    except (tokenize.TokenError, SyntaxError) as error:  # numpy lets these through
        raise ValueError(f"its header can't be read ({error})") from None
    # numpy writes bfloat16 as two bytes without a meaning.
    return shape, is_fortran, NUMPY_DTYPES["bfloat16"] if dtype == np.dtype("V2") else dtype


# ---- reading


def read(path: Path, files: Sequence[Path], choice: KeyChoice) -> Source:
    """List the embeddings of a file.

    Raises:
        TransferError: Not a whole .npz file.
    """
    source = Source(path, ".npz file", files)
    archive = _Archive(path)
    beside = [*IDS, *CLASSES, *METADATA, _LENGTHS]
    small = {name: archive.whole(name) for name in beside if name in archive.headers}
    scalars = {
        name: archive.whole(name)[()]
        for name, (shape, _) in archive.headers.items()
        if shape == () and name not in small
    }
    source.description = _description(small, scalars)
    held = first_of(archive.headers, EMBEDDINGS)
    if held is not None:
        source.add_rows(_rows(archive, held, small, source.description), choice)
        return source
    source.add_named(
        [name for name in archive.headers if name not in small and name not in scalars],
        choice,
        lambda name: (archive.headers[name][0], archive.headers[name][1].name),
        archive.whole,
    )
    return source


class _Archive:
    """A file's arrays by name.

    Raises:
        TransferError: It isn't whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = zipfile.ZipFile(path)
            # A checksum stands behind its member: too late for rows that are read one by one.
            if (damaged := self._file.testzip()) is not None:
                raise ValueError(f"{damaged} doesn't have its checksum")
            self.headers = {
                name.removesuffix(".npy"): self._header(name)
                for name in self._file.namelist()
                if name.endswith(".npy")
            }
        except (*_BROKEN, NotImplementedError) as error:
            raise TransferError(f"{path}: not a whole .npz file ({error})") from None

    def _header(self, member: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        with self._file.open(member) as file:
            shape, is_fortran, dtype = read_npy_header(file)
        if is_fortran and len(shape) > 1:
            raise ValueError(f"{member} is in Fortran order; save it with numpy.ascontiguousarray")
        return shape, dtype

    def label(self, name: str) -> str:
        return f"{self._path.name}[{name!r}]"

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """An array's .npy file."""
        try:
            with self._file.open(f"{name}.npy") as file:
                yield file
        except _BROKEN as error:
            raise TransferError(f"{self.label(name)} can't be read ({error})") from None

    def whole(self, name: str) -> npt.NDArray[Any]:
        """An array."""
        with self.open(name) as file:
            return numbers(np.lib.format.read_array(file, allow_pickle=False))

    def blocks(self, name: str, lengths: Sequence[int] | None) -> Iterator[Sequence[Any]]:
        """The rows of an array in pieces of some MiB, or of one embedding where they differ."""
        with self.open(name) as file:
            shape, _, _ = read_npy_header(file)
            dtype = self.headers[name][1]
            row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
            if lengths is None:
                step = max(1, _BLOCK_BYTES // max(1, row_bytes))
                sizes = [min(step, shape[0] - first) for first in range(0, shape[0], step)]
            else:
                sizes = list(lengths)
            for size in sizes:
                block = np.frombuffer(file.read(size * row_bytes), dtype)
                block = block.reshape(size, *shape[1:])
                yield list(block) if lengths is None else [block]


def _description(small: dict[str, Any], scalars: dict[str, Any]) -> Description:
    name = first_of(small, METADATA)
    if name is not None and small[name].shape == ():
        return description_of_json(str(small[name][()]))
    return describe(scalars)


def _rows(archive: _Archive, held: str, small: dict[str, Any], description: Description) -> Rows:
    shape, dtype = archive.headers[held]
    label = archive.label(held)
    if not shape:
        raise TransferError(f"{label} is a single number")
    lengths = [int(n) for n in small[_LENGTHS]] if _LENGTHS in small else None
    if lengths is not None and (min(lengths, default=1) < 1 or sum(lengths) != shape[0]):
        raise TransferError(f"{label}: {_LENGTHS} don't fit to its {shape[0]} rows")
    num_rows = shape[0] if lengths is None else len(lengths)
    return Rows(
        name=label,
        num_rows=num_rows,
        ids=text_list(small.get(first_of(small, IDS) or "")),
        classes=text_list(small.get(first_of(small, CLASSES) or "")),
        shape=lambda n: shape[1:] if lengths is None else (lengths[n], *shape[1:]),
        dtype=dtype.name,
        load=ForwardRows(partial(archive.blocks, held, lengths), num_rows),
        is_exact=description.is_export,
    )


# ---- writing


class NpzPart(Part):
    """Writes `sample_ids`, `metadata` (JSON) and `embeddings` of shape (n, *embedding_shape).

    Where the first dimension differs, the embeddings lie one behind the other along it, and
    `lengths` has the length of each. bfloat16 is written as float32. Memory stays small.
    """

    def __init__(self, path: Path, samples: Samples) -> None:
        description, lengths = samples.description, samples.lengths
        self._dtype = np.dtype("f2" if description["dtype"] == "float16" else "f4")
        self._raw = path.open("wb")
        self._archive = zipfile.ZipFile(self._raw, "w", allowZip64=True)
        rest = description["embedding_shape"][0 if lengths is None else 1 :]
        self._put("metadata", np.array(json.dumps(description)))
        self._put("sample_ids", np.array(samples.sample_ids))
        if lengths is not None:
            self._put(_LENGTHS, np.array(lengths, np.int64))
        self._file = self._archive.open("embeddings.npy", "w", force_zip64=True)
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (len(samples.sample_ids) if lengths is None else sum(lengths), *rest),
        }
        np.lib.format.write_array_header_2_0(self._file, header)

    def _put(self, name: str, array: npt.NDArray[Any]) -> None:
        with self._archive.open(f"{name}.npy", "w") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)

    def add(self, sample_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Write some embeddings."""
        for array in embeddings:
            self._file.write(np.ascontiguousarray(array, self._dtype).tobytes())

    def close(self) -> None:
        """Write the archive's directory."""
        with self._raw, self._archive, self._file:
            pass

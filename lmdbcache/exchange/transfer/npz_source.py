"""Embeddings in .npz files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import TransferError
from lmdbcache.exchange.transfer.descriptions import Description, describe, description_of_json
from lmdbcache.exchange.transfer.entries import Listing, Source, numbers
from lmdbcache.exchange.transfer.forms import (
    CLASSES,
    EMBEDDINGS,
    IDS,
    METADATA,
    KeyChoice,
    Rows,
    add_rows,
    first_of,
    text_list,
)
from lmdbcache.exchange.transfer.forward import ForwardRows
from lmdbcache.exchange.transfer.npy_header import meant_dtype, read_npy_header

__all__ = ["LENGTHS", "read_npz_source"]

LENGTHS: Final = "lengths"
_BLOCK_BYTES: Final = 8 << 20
_BROKEN: Final = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def read_npz_source(path: Path, choice: KeyChoice) -> Source:
    """List the embeddings of a file: one array with names beside it, or an array for each name.

    Raises:
        TransferError: Not a whole .npz file.
    """
    try:
        archive = zipfile.ZipFile(path)
        members = {
            name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")
        }
        # A checksum stands behind its member: too late for rows that are read one by one.
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} doesn't have its checksum")
        headers = {name: _header(archive, member) for name, member in members.items()}
    except (*_BROKEN, NotImplementedError) as error:
        raise TransferError(f"{path}: not a whole .npz file ({error})") from None
    beside = [*IDS, *CLASSES, *METADATA, LENGTHS]
    small = {name: _whole(path, archive, members[name]) for name in beside if name in members}
    scalars = {
        name: _whole(path, archive, members[name])[()]
        for name, (shape, _) in headers.items()
        if shape == () and name not in small
    }
    source = Source(path, ".npz file", _description(small, scalars), Listing(), files=[path])
    is_exact = source.description.is_export
    held = first_of(members, EMBEDDINGS)
    if held is not None:
        rows = _rows(path, archive, members[held], headers[held], small)
        source.notes += add_rows(source.listing, rows, choice)
        return source
    names = [name for name in members if name not in small and name not in scalars]
    reader = choice.reader(names, is_exact=is_exact)
    source.notes += reader.notes
    for name in names:
        shape, dtype = headers[name]
        source.listing.add(
            name,
            partial(reader.sample_id, name),
            shape,
            dtype.name,
            partial(_whole, path, archive, members[name]),
        )
    return source


def _description(small: dict[str, Any], scalars: dict[str, Any]) -> Description:
    name = first_of(small, METADATA)
    if name is not None and small[name].shape == ():
        return description_of_json(str(small[name][()]))
    return describe(scalars)


def _header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with archive.open(member) as file:
        shape, is_fortran, dtype = read_npy_header(file)
    if is_fortran and len(shape) > 1:
        raise ValueError(f"{member} is in Fortran order; save it with numpy.ascontiguousarray")
    return shape, meant_dtype(dtype)


def _whole(path: Path, archive: zipfile.ZipFile, member: str) -> npt.NDArray[Any]:
    try:
        with archive.open(member) as file:
            return numbers(np.lib.format.read_array(file, allow_pickle=False))
    except _BROKEN as error:
        raise TransferError(f"{path.name}: {member} can't be read ({error})") from None


def _rows(
    path: Path,
    archive: zipfile.ZipFile,
    member: str,
    header: tuple[tuple[int, ...], np.dtype[Any]],
    small: dict[str, Any],
) -> Rows:
    shape, dtype = header
    if not shape:
        raise TransferError(f"{path}: {member} is a single number")
    lengths = [int(n) for n in small[LENGTHS]] if LENGTHS in small else None
    if lengths is not None and (min(lengths, default=1) < 1 or sum(lengths) != shape[0]):
        raise TransferError(f"{path}: {LENGTHS} and {member} don't fit together")
    num_rows = shape[0] if lengths is None else len(lengths)
    return Rows(
        name=f"{path.name}[{member.removesuffix('.npy')!r}]",
        num_rows=num_rows,
        ids=text_list(small.get(first_of(small, IDS) or "")),
        classes=text_list(small.get(first_of(small, CLASSES) or "")),
        shape=lambda n: shape[1:] if lengths is None else (lengths[n], *shape[1:]),
        dtype=dtype.name,
        load=ForwardRows(partial(_blocks, path, archive, member, lengths), num_rows),
        is_exact=_description(small, {}).is_export,
    )


def _blocks(
    path: Path, archive: zipfile.ZipFile, member: str, lengths: Sequence[int] | None
) -> Iterator[Sequence[npt.NDArray[Any]]]:
    """The rows of an array in pieces of some MiB, or of one embedding where they differ."""
    try:
        with archive.open(member) as file:
            shape, _, dtype = read_npy_header(file)
            row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
            if lengths is None:
                step = max(1, _BLOCK_BYTES // max(1, row_bytes))
                sizes = [min(step, shape[0] - first) for first in range(0, shape[0], step)]
            else:
                sizes = list(lengths)
            for size in sizes:
                content = file.read(size * row_bytes)
                block = numbers(np.frombuffer(content, dtype).reshape(size, *shape[1:]))
                rows: Sequence[npt.NDArray[Any]] = list(block) if lengths is None else [block]
                yield rows
    except _BROKEN as error:
        raise TransferError(f"{path.name}: {member} can't be read ({error})") from None

"""Embeddings in tar files, as webdataset keeps them: `KEY.npy`, perhaps with `KEY.json`."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import TransferError
from lmdbcache.exchange.transfer.checksums import CHECKSUM, check
from lmdbcache.exchange.transfer.descriptions import Description, description_of_json
from lmdbcache.exchange.transfer.entries import Listing, Source, numbers
from lmdbcache.exchange.transfer.forms import EMBEDDINGS, KeyChoice, Rows, add_rows, first_of
from lmdbcache.exchange.transfer.npy_header import meant_dtype, read_npy_header
from lmdbcache.exchange.transfer.webdataset_keys import sample_id_of_key

__all__ = ["read_webdataset_source"]

_ARRAYS: Final = ("npy", "embedding.npy", *(f"{name}.npy" for name in EMBEDDINGS))
_CLASSES: Final = ("class", "class_name", "label", "category")
_MOST_JSON: Final = 1 << 20
_MOST_HEADER: Final = 256


def read_webdataset_source(path: Path, files: Sequence[Path], choice: KeyChoice) -> Source:
    """List the embeddings of one tar file or of several shards; they stay on disk.

    Raises:
        TransferError: A file isn't a whole tar.
    """
    source = Source(path, "webdataset", Description(), Listing(), files=files)
    told: list[Description] = []
    for file in files:
        tar = _Tar(file)
        told.append(tar.description)
        for name, reason in tar.refused:
            source.listing.refuse(name, reason)
        source.notes += add_rows(source.listing, tar.rows(), choice)
    if any(one.facts != told[0].facts for one in told):
        raise TransferError(f"{path}: its files name different configs; import them one by one")
    source.description = told[0]
    return source


@dataclass
class _Sample:
    """Where a sample's embedding lies, and what its JSON says."""

    name: str
    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def class_name(self) -> str | None:
        name = self.facts.get(first_of(self.facts, _CLASSES) or "")
        return name if isinstance(name, str) else None


class _Tar:
    """The samples of one file.

    Args:
        path: The file.

    Raises:
        TransferError: It isn't whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._samples: list[_Sample] = []
        self.refused: list[tuple[str, str]] = []
        try:
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                self.description = description_of_json(archive.pax_headers.get("comment"))
                for key, members in groupby(_members(archive), lambda one: _parts(one.name)[0]):
                    if key:
                        self._add(key, {_parts(one.name)[1]: one for one in members}, file)
                _check_end(file, archive.offset)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise TransferError(f"{path}: not a whole tar file ({error})") from None

    def _add(self, key: str, members: dict[str, tarfile.TarInfo], file: BinaryIO) -> None:
        name = first_of(members, _ARRAYS)
        if name is None:
            self.refused.append((key, f"no .npy, but {', '.join(members)}"))
            return
        member = members[name]
        try:
            shape, dtype = _shape(member, file)
            if dtype.kind not in "fiu" and dtype.name != "bfloat16":
                raise ValueError(f"dtype {dtype.name}; real numbers are needed")
            facts = _facts(members.get("json"), file)
            sample_id = self._sample_id(key, facts)
        except (ValueError, RecursionError) as error:
            self.refused.append((f"{key}.{name}", str(error)))
            return
        self._samples.append(
            _Sample(sample_id, member.offset_data, member.size, shape, dtype, facts)
        )

    def rows(self) -> Rows:
        """The samples, to be listed."""
        samples = self._samples
        is_export = self.description.is_export
        dtypes = {sample.dtype.name for sample in samples}
        return Rows(
            name=self._path.name,
            num_rows=len(samples),
            ids=[sample.name for sample in samples],
            classes=None if is_export else [sample.class_name for sample in samples],
            shape=lambda row: samples[row].shape,
            dtype=dtypes.pop() if len(dtypes) == 1 else None,
            load=self._load,
            is_exact=is_export,
        )

    def _sample_id(self, key: str, facts: dict[str, Any]) -> str:
        if self.description.is_export:
            return sample_id_of_key(key)
        told = facts.get("sample_id")
        return told if isinstance(told, str) else key

    def _load(self, row: int) -> npt.NDArray[Any]:
        sample = self._samples[row]
        with self._path.open("rb") as file:
            file.seek(sample.offset)
            content = io.BytesIO(file.read(sample.size))
        array = numbers(np.lib.format.read_array(content, allow_pickle=False))
        if not self.description.is_export:
            return array
        try:
            expected = int(sample.facts[CHECKSUM], 16)
        except (KeyError, TypeError, ValueError):
            expected = -1
        return check(sample.name, array, expected)


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # they are kept otherwise
        if member.isreg():
            yield member


def _parts(name: str) -> tuple[str, str]:
    """(key, field) as webdataset splits a name: at the first dot behind the last slash."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and extension else ("", "")


def _shape(member: tarfile.TarInfo, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    file.seek(member.offset_data)
    beginning = file.read(min(member.size, _MOST_HEADER))
    # Most have the same header, which ends with a line feed; lengths stand in front of it.
    return _header(beginning[: beginning.find(b"\n", 12) + 1])


@lru_cache(maxsize=64)
def _header(beginning: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    shape, _, dtype = read_npy_header(io.BytesIO(beginning))
    return shape, meant_dtype(dtype)


def _facts(member: tarfile.TarInfo | None, file: BinaryIO) -> dict[str, Any]:
    if member is None or member.size > _MOST_JSON:
        return {}
    file.seek(member.offset_data)
    facts = json.loads(file.read(member.size))
    return facts if isinstance(facts, dict) else {}


def _check_end(file: BinaryIO, offset: int) -> None:
    """Whether the archive's end is there: tarfile takes a damaged header for the end, too."""
    file.seek(offset)
    if any(file.read(tarfile.BLOCKSIZE)) or file.seek(0, io.SEEK_END) < offset + tarfile.BLOCKSIZE:
        raise ValueError("damaged or cut")

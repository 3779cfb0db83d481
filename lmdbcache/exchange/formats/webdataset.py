"""Tar files as webdataset keeps them: `KEY.npy`, perhaps with `KEY.json`."""

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
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import TransferError
from lmdbcache.exchange.formats.base import (
    CHECKSUM,
    EMBEDDINGS,
    Description,
    Embeddings,
    Part,
    Rows,
    Samples,
    Source,
    check,
    checksum_in_file,
    description_of_json,
    first_of,
    numbers,
    optional,
    read_files,
    without_bfloat16,
)
from lmdbcache.exchange.formats.keys import KeyChoice
from lmdbcache.exchange.formats.npz import read_npy_header
from lmdbcache.storage import split_sample_id

_ARRAYS: Final = ("npy", "embedding.npy", *(f"{name}.npy" for name in EMBEDDINGS))
_CLASSES: Final = ("class", "class_name", "label", "category")
_MOST_JSON: Final = 1 << 20
_MOST_HEADER: Final = 256
# Fixed, so that the same embeddings give the same bytes: 2020-01-01.
_TIME: Final = 1577836800


def key_of_sample_id(sample_id: str) -> str:
    """Return a sample id without dots and slashes: webdataset ends a key at the first dot.

    Percent-encoded as in a URL, with the colon as it is: `a/b.wav:dog` is `a%2Fb%2Ewav:dog`, and
    `urllib.parse.unquote` gives it back.
    """
    return quote(sample_id, safe=":").replace(".", "%2E")


def sample_id_of_key(key: str) -> str:
    """Return the sample id of `key_of_sample_id`."""
    return unquote(key, errors="strict")


# ---- reading


def read(path: Path, files: Sequence[Path], choice: KeyChoice) -> Source:
    """List the embeddings of one tar file or of several shards; they stay on disk.

    Raises:
        TransferError: A file isn't a whole tar.
    """

    def add_file(source: Source, file: Path) -> Description:
        tar = _Tar(file, source)
        source.add_rows(tar.rows(), choice)
        return tar.description

    return read_files(path, "webdataset", files, add_file)


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
        source: Where it notes what can't be imported.

    Raises:
        TransferError: It isn't whole.
    """

    def __init__(self, path: Path, source: Source) -> None:
        self._path = path
        self._source = source
        self._samples: list[_Sample] = []
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
            self._source.refuse(key, f"no .npy, but {', '.join(members)}")
            return
        member = members[name]
        try:
            shape, dtype = _shape(member, file)
            if dtype.kind not in "fiu" and dtype.name != "bfloat16":
                raise ValueError(f"dtype {dtype.name}; real numbers are needed")
            facts = _facts(members.get("json"), file)
            sample_id = self._sample_id(key, facts)
        except (ValueError, RecursionError) as error:
            self._source.refuse(f"{key}.{name}", error)
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
        stated = facts.get("sample_id")
        return stated if isinstance(stated, str) else key

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
    return shape, dtype


def _facts(member: tarfile.TarInfo | None, file: BinaryIO) -> dict[str, Any]:
    if member is None or member.size > _MOST_JSON:
        return {}
    file.seek(member.offset_data)
    facts = json.loads(file.read(member.size))
    return facts if isinstance(facts, dict) else {}


def _check_end(file: BinaryIO, offset: int) -> None:
    """Whether the archive's end is there: tarfile also takes a damaged header for the end."""
    file.seek(offset)
    if any(file.read(tarfile.BLOCKSIZE)) or file.seek(0, io.SEEK_END) < offset + tarfile.BLOCKSIZE:
        raise ValueError("damaged or cut")


# ---- writing


class WebDatasetPart(Part):
    """Writes `KEY.json` (sample_id, file_id, class, checksum) and `KEY.npy` for each embedding.

    KEY is the sample id as `key_of_sample_id` gives it. bfloat16 is written as float32. Memory
    stays small.

    Args:
        path: The file.
        samples: What is added, in order. The description is written as JSON in the comment of
            the archive, which readers skip.
    """

    def __init__(self, path: Path, samples: Samples) -> None:
        library = optional("webdataset", "writing webdataset shards")
        self._file = path.open("wb")
        # A file among the others would be a sample to some readers.
        comment = {"comment": json.dumps(samples.description)}
        self._file.write(tarfile.TarInfo.create_pax_global_header(comment))
        self._writer = library.TarWriter(self._file, mtime=_TIME, mode=0o644, format="PAX_FORMAT")

    def add(self, sample_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Write some embeddings."""
        for sample_id, embedding in zip(sample_ids, embeddings, strict=True):
            file_id, class_name = split_sample_id(sample_id)
            array = without_bfloat16(embedding)
            names = {"sample_id": sample_id, "file_id": file_id, "class": class_name}
            checksum = f"{checksum_in_file(sample_id, array):016x}"
            self._writer.write(
                {
                    "__key__": key_of_sample_id(sample_id),
                    "json": {**names, CHECKSUM: checksum},
                    "npy": array,
                }
            )

    def close(self) -> None:
        """Write the archive's end."""
        with self._file:
            self._writer.close()

"""Folders of .npy files: chunks with a manifest for each class, or a file for each embedding."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lmdbcache.errors import DatasetError, TransferError
from lmdbcache.exchange.formats.base import (
    Description,
    Source,
    description_of_json,
    dtype_name,
    first_of,
    numbers,
)
from lmdbcache.exchange.formats.keys import (
    KeyChoice,
    KeyReader,
    sample_id_in_class,
    with_colon,
    without_extension,
)

__all__ = ["MANIFEST", "read", "read_with_manifests"]

MANIFEST: Final = "manifest.json"
_ABOUT: Final = ("metadata.json", "config.json")
_NUMBERED: Final = re.compile(r"(\d+)\.npy")
_CHUNK: Final = re.compile(r"(embeddings|chunk|shard|part)[-_]?\d+\.npy")
_CHUNK_WORDS: Final = (
    *("chunk", "chunk_id", "chunk_idx", "chunk_index"),
    *("file", "chunk_file", "filename", "shard"),
)
_OFFSET_WORDS: Final = ("offset", "index", "idx", "row", "position")
_MAPPED_AT_ONCE: Final = 16


def read(path: Path, files: Sequence[Path], choice: KeyChoice) -> Source:
    """List `<class>/<file_id>.npy`, and `<file_id>:<class>.npy` or `<file_id>__<class>.npy`."""
    reader = KeyReader(
        [_flat_key(file) for file in files if file.parent == path], choice, is_exact=False
    )
    source = Source(path, "folder of files", files, _about(path), notes=reader.notes)
    for file in files:
        shown = str(file.relative_to(path))
        if _CHUNK.fullmatch(file.name):
            source.refuse(shown, f"a chunk of several embeddings, and there is no {MANIFEST}")
            continue
        try:
            embedding = _read_file(file)
        except (TransferError, DatasetError) as error:
            source.refuse(shown, error)
            continue
        sample_id = (
            partial(reader.sample_id, _flat_key(file))
            if file.parent == path
            else partial(sample_id_in_class, file.name, file.parent.name)
        )
        shape, dtype = tuple(embedding.shape), dtype_name(embedding)
        source.add(shown, sample_id, shape, dtype, partial(_read_file, file))
    if deeper := list(path.glob("*/*/**/*.npy")):
        source.notes.append(
            f"not looked at: {len(deeper)} files deeper than <class>/<file_id>.npy, such as "
            f"{deeper[0].relative_to(path)}; import that folder by itself"
        )
    return source


def _flat_key(file: Path) -> str:
    return with_colon(without_extension(file.name))


def _read_file(file: Path) -> Any:
    """The one embedding of a file, on disk until it is looked at."""
    if file.suffix == ".npy":
        return _read_npy(file)
    from lmdbcache.training import read_torch_file, unwrapped

    embedding = unwrapped(read_torch_file(file, mmap=True))
    if not hasattr(embedding, "shape"):
        raise TransferError(f"holds a {type(embedding).__name__}; expected a tensor")
    return embedding


def _read_npy(path: Path) -> npt.NDArray[Any]:
    """A file's array, mapped; nothing in it is ever unpickled.

    Raises:
        TransferError: Not a whole .npy file of numbers.
    """
    try:
        return numbers(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        if not path.stat().st_size:
            raise TransferError(f"{path.name} is empty") from None
        reason = str(error).replace("mmap length is greater than file size", "it is cut short")
        raise TransferError(f"{path.name} can't be read: {reason}") from None


def _about(path: Path) -> Description:
    """What a JSON file next to the embeddings says of them."""
    for name in _ABOUT:
        if (path / name).is_file():
            return description_of_json((path / name).read_bytes())
    return Description()


# ---- chunks with manifests


def read_with_manifests(path: Path, manifests: Sequence[Path], choice: KeyChoice) -> Source:
    """List `<class>/embeddings_NNN.npy` by `<class>/manifest.json`, or those of one folder."""
    files: list[Path] = []
    source = Source(path, "manifest and chunks", files, _about(path))
    for manifest in manifests:
        folder = manifest.parent
        class_name = choice.class_name if folder == path else folder.name
        opened = _ManifestFolder(folder, class_name, choice, source)
        try:
            opened.add_all()
        except TransferError as error:
            source.refuse(f"{folder.name}/{MANIFEST}", error)
        files += [manifest, *opened.chunks.values()]
    return source


class _ManifestFolder:
    """One class's chunks."""

    def __init__(
        self, folder: Path, class_name: str | None, choice: KeyChoice, source: Source
    ) -> None:
        self._folder = folder
        self._class_name = class_name
        self._choice = choice
        self._source = source
        self.chunks = {file.name: file for file in sorted(folder.glob("*.npy"))}
        self._by_number: dict[int, list[str]] = {}
        for name in self.chunks:
            if found := _NUMBERED.search(name):
                self._by_number.setdefault(int(found[1]), []).append(name)
        self._mapped = lru_cache(_MAPPED_AT_ONCE)(lambda name: _read_npy(self.chunks[name]))
        self._open = lru_cache(None)(self._open_chunk)

    def add_all(self) -> None:
        """Add the embeddings, in the order of the chunks."""
        places = _places(self._folder / MANIFEST)
        reader = KeyReader([] if self._class_name else list(places), self._choice, is_exact=False)
        self._source.notes += reader.notes
        found = []
        for key, place in places.items():
            try:
                name, offset = self._place(place)
                shape, dtype, problem = self._open(name)
                if problem:
                    raise TransferError(problem)
                if not 0 <= offset < shape[0]:
                    raise TransferError(f"offset {offset} in {name}, which has {shape[0]} rows")
            except TransferError as error:
                self._source.refuse(f"{self._folder.name}/{key}", error)
                continue
            found.append((name, offset, key, shape[1:], dtype))
        for name, offset, key, shape, dtype in sorted(found, key=lambda one: one[:2]):
            self._source.add(
                f"{self._folder.name}/{key}",
                partial(sample_id_in_class, key, self._class_name)
                if self._class_name
                else partial(reader.sample_id, key),
                shape,
                dtype,
                partial(self._row, name, offset),
            )

    def _row(self, name: str, offset: int) -> npt.NDArray[Any]:
        row: npt.NDArray[Any] = self._mapped(name)[offset]
        return row

    def _open_chunk(self, name: str) -> tuple[tuple[int, ...], str, str]:
        """(shape, dtype, why it can't be read) of a chunk; the reason concerns each embedding."""
        try:
            chunk = self._mapped(name)
        except TransferError as error:
            return (), "", str(error)
        return chunk.shape, chunk.dtype.name, "" if chunk.ndim else f"{name} is a single number"

    def _place(self, place: Any) -> tuple[str, int]:
        """(chunk's file name, row) of a manifest's value."""
        if isinstance(place, Mapping):
            words = first_of(place, _CHUNK_WORDS), first_of(place, _OFFSET_WORDS)
            place = [place[word] for word in words if word]
        if not isinstance(place, list) or len(place) != 2 or type(place[1]) is not int:
            raise TransferError(
                f"{json.dumps(place)[:60]} in {MANIFEST} isn't [chunk, offset] or a dict of both"
            )
        chunk, offset = place
        return self._chunk_name(chunk), offset

    def _chunk_name(self, chunk: Any) -> str:
        if isinstance(chunk, str):
            if chunk in self.chunks:
                return chunk
            outside = " lies outside of its folder" if "/" in chunk or "\\" in chunk else ""
            raise TransferError(f"{MANIFEST} names {chunk!r}, which{outside or ' is not there'}")
        names = self._by_number.get(chunk, []) if type(chunk) is int else []
        if len(names) == 1:
            return names[0]
        if names:
            raise TransferError(f"chunk {chunk} may be {' or '.join(names)}")
        raise TransferError(f"{MANIFEST} names chunk {chunk!r}, which is not there")


def _places(path: Path) -> Mapping[str, Any]:
    """File id → place."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TransferError(f"can't be read as JSON ({error})") from None
    if isinstance(content, dict):
        wrapped = first_of(content, ("entries", "files", "manifest"))
        if wrapped and isinstance(content[wrapped], dict):
            content = content[wrapped]
    if not isinstance(content, dict):
        raise TransferError("isn't a JSON object of file id and [chunk, offset]")
    return content

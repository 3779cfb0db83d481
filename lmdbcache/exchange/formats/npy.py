"""Folders of .npy or .pt files: chunks and manifests by class, or a file for each embedding."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    optional,
)
from lmdbcache.exchange.formats.keys import (
    KeyChoice,
    KeyReader,
    sample_id_in_class,
    with_colon,
    without_extension,
)
from lmdbcache.files import few
from lmdbcache.storage import canonical_class

MANIFEST: Final = "manifest.json"
_ABOUT: Final = ("metadata.json", "config.json")
_SUFFIXES: Final = (".npy", ".pt")
_NUMBERED: Final = re.compile(r"(\d+)\.(npy|pt)")
_CHUNK: Final = re.compile(r"(embeddings|chunk|shard|part)[-_]?\d+\.(npy|pt)")
_CHUNK_WORDS: Final = (
    *("chunk", "chunk_id", "chunk_idx", "chunk_index"),
    *("file", "chunk_file", "filename", "shard"),
)
_OFFSET_WORDS: Final = ("offset", "index", "idx", "row", "position")
_INDEX: Final = "file_id_to_index"
_WRAPPERS: Final = (_INDEX, "entries", "files", "manifest")
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
    _note_deeper(source)
    return source


def _note_deeper(source: Source) -> None:
    if deeper := sorted(source.path.glob("*/*/**/*.npy")):
        source.notes.append(
            f"not looked at: {len(deeper)} files deeper than <class>/<file>.npy, such as "
            f"{deeper[0].relative_to(source.path)}; import that folder by itself"
        )


def _flat_key(file: Path) -> str:
    return with_colon(without_extension(file.name))


def _read_file(file: Path) -> Any:
    """The array or tensor of a file, on disk until it is looked at; no code in it is run.

    Raises:
        TransferError: Not a whole .npy file of numbers, or no tensor in a .pt file.
        DatasetError: The .pt file can't be read without running code.
    """
    if file.suffix == ".npy":
        return _read_npy(file)
    optional("torch", "reading a file of torch.save")
    from lmdbcache.training import read_torch_file, unwrapped

    embedding = unwrapped(read_torch_file(file, mmap=True))
    if not hasattr(embedding, "shape"):
        raise TransferError(f"{file.name} holds a {type(embedding).__name__}; expected a tensor")
    return embedding


def _read_npy(path: Path) -> npt.NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if not path.stat().st_size:
            raise TransferError(f"{path.name} is empty") from None
        reason = str(error).replace("mmap length is greater than file size", "it is cut short")
        raise TransferError(f"{path.name} can't be read: {reason}") from None
    if not isinstance(array, np.memmap):
        raise TransferError(f"{path.name} is an .npz file by its content; rename it")
    if more := path.stat().st_size - array.offset - array.nbytes:
        raise TransferError(f"{path.name} is {more} bytes longer than its array")
    return numbers(array)


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
        opened = _ManifestFolder(manifest.parent, choice, source)
        try:
            opened.add_all()
        except TransferError as error:
            source.refuse(f"{manifest.parent.name}/{MANIFEST}", error)
        files += [manifest, *opened.chunks.values()]
    _refuse_without_manifest(source, [manifest.parent for manifest in manifests])
    _note_deeper(source)
    return source


def _refuse_without_manifest(source: Source, listed: Sequence[Path]) -> None:
    for folder in sorted(filter(Path.is_dir, source.path.iterdir())):
        if folder not in listed and (found := _array_files(folder)):
            source.refuse(
                folder.name,
                f"has no {MANIFEST} for {few([file.name for file in found], 3)}; restore it, or if "
                "each file is one embedding, import this folder by itself",
            )
    if source.path not in listed and (loose := _array_files(source.path)):
        names = few([file.name for file in loose], 3)
        source.notes.append(f"not looked at: {names}; import such a file by itself")


def _array_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix in _SUFFIXES]


@dataclass(frozen=True)
class _Manifest:
    """What a manifest says.

    Args:
        places: File id → place.
        chunks: File name → what is said of that chunk, in the order of their numbers; None if the
            numbers are those in the files' names.
        class_name: None if it isn't stated.
        num_embeddings: None if it isn't stated.
    """

    places: Mapping[str, Any]
    chunks: Mapping[str, Mapping[str, Any]] | None = None
    class_name: str | None = None
    num_embeddings: int | None = None


class _ManifestFolder:
    """One class's chunks."""

    def __init__(self, folder: Path, choice: KeyChoice, source: Source) -> None:
        self._folder = folder
        self._choice = choice
        self._source = source
        self._shown = f"{folder.name}/{MANIFEST}"
        self.chunks = {file.name: file for file in _array_files(folder)}
        self._by_number: dict[int, list[str]] = {}
        self._stated: Mapping[str, Mapping[str, Any]] = {}
        self._mapped = lru_cache(_MAPPED_AT_ONCE)(lambda name: _read_file(self.chunks[name]))
        self._open = lru_cache(None)(self._open_chunk)

    def add_all(self) -> None:
        """Add the embeddings, in the order of the chunks.

        Raises:
            TransferError: The manifest can't be read, or contradicts itself or its folder.
        """
        manifest = _read_manifest(self._folder / MANIFEST)
        class_name = self._class_name(manifest)
        self._number_chunks(manifest)
        reader = KeyReader(
            [] if class_name else list(manifest.places), self._choice, is_exact=False
        )
        self._source.notes += reader.notes
        for (name, offset), keys in sorted(self._found(manifest).items()):
            shape, dtype, _ = self._open(name)
            for key in keys:
                self._source.add(
                    f"{self._folder.name}/{key}",
                    partial(sample_id_in_class, key, class_name)
                    if class_name
                    else partial(reader.sample_id, key),
                    shape[1:],
                    dtype,
                    partial(self._row, name, offset),
                )

    def _class_name(self, manifest: _Manifest) -> str | None:
        is_source = self._folder == self._source.path
        known = self._choice.class_name if is_source else self._folder.name
        stated = manifest.class_name
        if known and stated and canonical_class(known) != canonical_class(stated):
            raise TransferError(
                f"says class_name {stated!r}, and "
                + (
                    f"{known!r} is given. Leave `class_name` out"
                    if is_source
                    else "lies in the folder of another class. Correct one of them"
                )
            )
        return known or stated

    def _number_chunks(self, manifest: _Manifest) -> None:
        if manifest.chunks is not None:
            self._stated = manifest.chunks
            self._by_number = {number: [name] for number, name in enumerate(manifest.chunks)}
            return
        for name in self.chunks:
            if found := _NUMBERED.search(name):
                self._by_number.setdefault(int(found[1]), []).append(name)

    def _found(self, manifest: _Manifest) -> dict[tuple[str, int], list[str]]:
        """(chunk's file name, row) → file ids; what isn't as stated is refused."""
        found: dict[tuple[str, int], list[str]] = {}
        named = set()
        for key, place in manifest.places.items():
            try:
                name, offset = self._place(place)
                named.add(name)
                shape, _, problem = self._open(name)
                if problem:
                    raise TransferError(problem)
                if not 0 <= offset < shape[0]:
                    raise TransferError(f"offset {offset} in {name}, which has {shape[0]} rows")
            except TransferError as error:
                self._source.refuse(f"{self._folder.name}/{key}", error)
                continue
            found.setdefault((name, offset), []).append(key)
        for name in sorted(set(self.chunks) - named):
            self._source.refuse(
                f"{self._folder.name}/{name}", f"{self._shown} names no embedding in it"
            )
        if manifest.chunks is not None:
            self._refuse_shared(found)
        self._count(manifest, {name for name, _ in found}, len(found))
        return found

    def _refuse_shared(self, found: dict[tuple[str, int], list[str]]) -> None:
        """Each embedding has its own row: of two file ids of one row, one is wrong."""
        for place, keys in found.items():
            if len(keys) > 1:
                for key in keys:
                    self._source.refuse(
                        f"{self._folder.name}/{key}",
                        f"{few(keys, 3)} all have offset {place[1]} in {place[0]}",
                    )
                keys.clear()

    def _count(self, manifest: _Manifest, chunks: Iterable[str], num_found: int) -> None:
        """Note what a manifest leaves out of its sound chunks, or counts and doesn't name."""
        named = len(manifest.places)
        num_rows = sum(self._open(name)[0][0] for name in chunks)
        if num_found < num_rows:
            self._source.notes.append(
                f"{self._shown} names {num_found} of the {num_rows} embeddings in its chunks"
            )
        if manifest.num_embeddings not in (None, named):
            self._source.notes.append(
                f"{self._shown} says total_samples {manifest.num_embeddings}, and names {named}"
            )

    def _row(self, name: str, offset: int) -> Any:
        return self._mapped(name)[offset]

    def _open_chunk(self, name: str) -> tuple[tuple[int, ...], str | None, str]:
        """(shape, dtype, why it can't be used) of a chunk; the reason concerns each embedding."""
        try:
            chunk = self._mapped(name)
        except (TransferError, DatasetError) as error:
            return (), "", f"{self._folder.name}: {error}"
        shape = tuple(chunk.shape)
        return shape, dtype_name(chunk), self._problem(name, shape)

    def _problem(self, name: str, shape: tuple[int, ...]) -> str:
        if not shape:
            return f"{self._folder.name}/{name} is a single number"
        stated = self._stated.get(name, {})
        for word, there in (("num_samples", shape[0]), ("shape", list(shape))):
            if stated.get(word, there) != there:
                # Two processes that wrote one chunk leave the rows of one and the names of both.
                return (
                    f"{self._shown} says {word} {stated[word]} of {name}, which has {there}: "
                    "none of its rows is taken"
                )
        return ""

    def _place(self, place: Any) -> tuple[str, int]:
        """(chunk's file name, row) of a manifest's value."""
        if isinstance(place, Mapping):
            words = first_of(place, _CHUNK_WORDS), first_of(place, _OFFSET_WORDS)
            place = [place[word] for word in words if word]
        if not isinstance(place, list) or len(place) != 2 or type(place[1]) is not int:
            raise TransferError(
                f"{json.dumps(place)[:60]} in {self._shown} isn't [chunk, offset] or a dict of both"
            )
        chunk, offset = place
        return self._chunk_name(chunk), offset

    def _chunk_name(self, chunk: Any) -> str:
        if type(chunk) is int:
            names = self._by_number.get(chunk, [])
            if len(names) > 1:
                raise TransferError(f"chunk {chunk} may be {' or '.join(names)}")
            chunk = names[0] if names else chunk
        if isinstance(chunk, str) and chunk in self.chunks:
            return chunk
        outside = " lies outside of its folder" if _is_path(chunk) else " is not there"
        raise TransferError(f"{self._shown} names chunk {chunk!r}, which{outside}")


def _is_path(name: Any) -> bool:
    return isinstance(name, str) and ("/" in name or "\\" in name)


def _read_manifest(path: Path) -> _Manifest:
    """Read a manifest of either form, which may be damaged or hostile.

    Raises:
        TransferError: It isn't one.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TransferError(f"can't be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise TransferError("isn't a JSON object of file id and [chunk, offset]")
    wrapped = first_of(content, _WRAPPERS)
    if wrapped is None or not isinstance(content[wrapped], dict):
        if wrapped == _INDEX:
            raise TransferError(f"{_INDEX} isn't a JSON object of file id and [chunk, offset]")
        return _Manifest(content)
    if wrapped != _INDEX:
        return _Manifest(content[wrapped])
    name, number = content.get("class_name"), content.get("total_samples")
    return _Manifest(
        content[_INDEX],
        _listed(content["chunks"]) if "chunks" in content else None,
        name if isinstance(name, str) else None,
        number if type(number) is int else None,
    )


def _listed(chunks: Any) -> dict[str, Mapping[str, Any]]:
    """File name → what is said of the chunk."""
    listed: dict[str, Mapping[str, Any]] = {}
    for chunk in chunks if isinstance(chunks, list) else [chunks]:
        name = chunk.get("file") if isinstance(chunk, dict) else None
        if not isinstance(name, str):
            raise TransferError(f"chunks has {json.dumps(chunk)[:60]}; expected a dict with file")
        if _is_path(name):
            raise TransferError(f"names chunk {name!r}, which lies outside of its folder")
        if name in listed:
            raise TransferError(f"lists chunk {name!r} twice")
        listed[name] = chunk
    return listed

"""What a file or folder to import is, and what it holds, before its values are read."""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lmdbcache.errors import CacheError, InvalidEmbeddingError, TransferError
from lmdbcache.exchange.formats import FORMATS, npy
from lmdbcache.exchange.formats.base import Entry, Source
from lmdbcache.exchange.formats.keys import KeyChoice
from lmdbcache.exchange.formats.lance import VERSIONS
from lmdbcache.exchange.intake import Refusal
from lmdbcache.files import few
from lmdbcache.storage import check_shape, split_sample_id

__all__ = ["Shape", "Survey", "inspect_source", "misfit", "open_source", "squeezed"]

Shape = tuple[int | None, ...]

_URL: Final = re.compile(r"[a-z][a-z0-9+]+:/")  # a Path has one slash
_KNOWN: Final = (
    "a .pt file with a dict, a .safetensors, .npz, .parquet or .tar file, a Lance dataset, or a "
    "folder with <class>/manifest.json, <class>/<file_id>.npy, <file_id>__<class>.npy, "
    "*.safetensors, *.parquet or *.tar"
)


# ---- which kind


def open_source(path: str | Path, choice: KeyChoice) -> Source:
    """List what a file or folder holds; its embeddings aren't read yet.

    Raises:
        TransferError: Missing, damaged, empty, or of no known form.
        MissingDependencyError: A package is needed to read it.
    """
    path = Path(path)
    try:
        source = _folder(path, choice) if path.is_dir() else _file(path, choice)
    except OSError as error:
        raise TransferError(f"{path} can't be read ({error.strerror or error})") from None
    if not (source.entries or source.refused):
        raise TransferError(f"{path} ({source.kind}) holds no embeddings")
    return source


def _file(path: Path, choice: KeyChoice) -> Source:
    if not path.is_file():
        is_url = _URL.match(str(path))
        raise TransferError(
            f"{path} is on another machine; copy it to this one, then import that"
            if is_url
            else f"{path} isn't there; expected {_KNOWN}"
        )
    suffix = path.suffix.lower()
    for format_ in FORMATS.values():
        if suffix in format_.suffixes:
            return format_.read(path, [path], choice)
    if _is_torch_archive(path):
        return FORMATS["pt"].read(path, [path], choice)
    if suffix == ".npy":
        raise TransferError(
            f"{path}: one .npy file; give the folder that it is in (with {npy.MANIFEST}, if it "
            "holds several embeddings)"
        )
    raise TransferError(f"{path}: a file of an unknown kind; expected {_KNOWN}")


def _folder(path: Path, choice: KeyChoice) -> Source:
    if (path / VERSIONS).is_dir():
        return FORMATS["lance"].read(path, sorted(filter(Path.is_file, path.rglob("*"))), choice)
    folders = [path, *sorted(filter(Path.is_dir, path.iterdir()))]
    manifests = [folder / npy.MANIFEST for folder in folders]
    if manifests := [file for file in manifests if file.is_file()]:
        return npy.read_with_manifests(path, manifests, choice)
    for format_ in FORMATS.values():
        if format_.is_sharded and (shards := sorted(path.glob(f"*{format_.suffixes[0]}"))):
            return format_.read(path, shards, choice)
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    files = [
        file
        for file in files
        if file.suffix == ".npy" or (file.suffix == ".pt" and file.parent != path)
    ]
    if files:
        return npy.read(path, files, choice)
    torch_files = [file for file in path.iterdir() if file.suffix in FORMATS["pt"].suffixes]
    if torch_files:
        names = few(sorted(file.name for file in torch_files), 5)
        raise TransferError(f"{path}: give the file itself: {names}")
    deeper = next(path.glob("*/*/**/*.npy"), None)
    hint = (
        f"; {deeper.parent} has .npy files: give that folder and a `class_name`" if deeper else ""
    )
    raise TransferError(f"{path}: no embeddings are found in it; expected {_KNOWN}{hint}")


def _is_torch_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


# ---- what it holds


@dataclass(frozen=True)
class Survey:
    """What a source holds.

    Args:
        source: Where it comes from.
        classes: Class → number of samples.
        dtypes: numpy's name → number of embeddings; None where it isn't known before reading.
        shape: The shape that a new store would have: most have it; None if it isn't known before.
    """

    source: Source
    classes: Counter[str]
    dtypes: Counter[str | None]
    shape: Shape | None


def inspect_source(source: Source, *, squeeze: bool = False, ragged: bool = False) -> Survey:
    """Count what a source holds.

    Args:
        source: An opened source.
        squeeze: Take off a leading dimension of size 1.
        ragged: The first dimension may differ between embeddings.
    """
    entries = source.entries.values()
    if squeeze:
        for entry in (*entries, *source.repeated):
            entry.shape = None if entry.shape is None else squeezed(entry.shape)
    shapes = Counter(entry.shape for entry in entries if entry.shape is not None)
    shape = source.description.embedding_shape
    if shape is None and not shapes:
        shape = _first_shape(entries, squeeze=squeeze, ragged=ragged)
    return Survey(
        source,
        Counter(split_sample_id(entry.sample_id)[1] for entry in entries),
        Counter(entry.dtype for entry in entries),
        shape if shape is not None else _usual(shapes, ragged=ragged),
    )


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape without the leading dimension of a batch of one; one dimension stays."""
    return tuple(shape[1:] if len(shape) > 1 and shape[0] == 1 else shape)


def misfit(entry: Entry, shape: Shape | None) -> Refusal | None:
    """Return why an embedding doesn't go with the others, as far as its shape shows."""
    if entry.shape is None:
        return None
    try:
        check_shape(entry.sample_id, entry.shape, shape)
    except InvalidEmbeddingError:
        hint = ""
        if shape and len(shape) == len(entry.shape) > 1 and shape[1:] == entry.shape[1:]:
            hint = "; `ragged=True` lets the first dimension differ"
        expected = ", ".join("any" if size is None else str(size) for size in shape or ())
        reason = f"shape {entry.shape}, where ({expected}) is expected{hint}"
        return Refusal(entry.name, entry.sample_id, reason)
    return None


def _first_shape(entries: Iterable[Entry], *, squeeze: bool, ragged: bool) -> Shape | None:
    """The shape of the first that can be read, where it isn't known before reading."""
    for entry in entries:
        # What is wrong with it is reported when it is imported.
        with contextlib.suppress(CacheError, OSError, ValueError, IndexError):
            value = entry.load()
            if value is not None:
                shape = squeezed(value.shape) if squeeze else tuple(value.shape)
                return (None, *shape[1:]) if ragged else shape
    return None


def _usual(shapes: Counter[tuple[int, ...]], *, ragged: bool) -> Shape | None:
    if not shapes:
        return None
    if not ragged:
        return shapes.most_common(1)[0][0]
    rests: Counter[tuple[int, ...]] = Counter()
    for shape, number in shapes.items():
        rests[shape[1:]] += number
    return (None, *rests.most_common(1)[0][0])

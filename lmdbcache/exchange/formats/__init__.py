"""The file formats that import reads and export writes: one module each, and the table of them.

To add a format, write a module with a `read` function and a `Part` class, and add a line here.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lmdbcache.errors import TransferError
from lmdbcache.exchange.formats import lance, npy, npz, parquet, safetensors, torch, webdataset
from lmdbcache.exchange.formats.base import Embeddings, Part, Samples, Source
from lmdbcache.exchange.formats.keys import KeyChoice
from lmdbcache.files import few

_URL: Final = re.compile(r"[a-z][a-z0-9+]+:/")  # a Path has one slash
_KNOWN: Final = (
    "a .pt file with a dict, a .safetensors, .npz, .parquet or .tar file, a Lance dataset, or a "
    "folder with <class>/manifest.json, <class>/<file_id>.npy, <file_id>__<class>.npy, "
    "*.safetensors, *.parquet or *.tar"
)


@dataclass(frozen=True)
class Format:
    """A file format.

    Args:
        suffixes: Endings of its files; the first is the one that is written.
        read: Lists the embeddings of a path, which consists of these files.
        part: Writes one file.
        write_dataset: Writes a folder as a whole instead; see `lance.write_dataset`.
        is_sharded: Whether a folder of such files is one source, and may be one export.
        is_in_memory: Whether a single file is put together in memory.
        has_bfloat16: Whether it knows bfloat16; else that becomes float32, exactly.
        bytes_beside: Bytes that a file takes for each embedding besides its values.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Path, Sequence[Path], KeyChoice], Source]
    part: Callable[[Path, Samples], Part] | None = None
    write_dataset: (
        Callable[[Path, dict[str, Any], Iterable[tuple[Sequence[str], Embeddings]], int], int]
        | None
    ) = None
    is_sharded: bool = False
    is_in_memory: bool = False
    has_bfloat16: bool = False
    bytes_beside: int = 0


FORMATS: Final[dict[str, Format]] = {
    "pt": Format(
        (".pt", ".pth", ".bin", ".pkl", ".ckpt", ".torch"),
        torch.read,
        torch.TorchPart,
        is_in_memory=True,
        has_bfloat16=True,
    ),
    "safetensors": Format(
        (".safetensors",),
        safetensors.read,
        safetensors.SafetensorsPart,
        is_sharded=True,
        is_in_memory=True,
        has_bfloat16=True,
    ),
    "npz": Format((".npz",), npz.read, npz.NpzPart),
    "parquet": Format((".parquet",), parquet.read, parquet.ParquetPart, is_sharded=True),
    "lance": Format((), lance.read, write_dataset=lance.write_dataset),
    # Two headers, the JSON and its padding.
    "webdataset": Format(
        (".tar",), webdataset.read, webdataset.WebDatasetPart, is_sharded=True, bytes_beside=5 * 512
    ),
}


# ---- which one a file or folder is in


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
    if (path / lance.VERSIONS).is_dir():
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
    hint = ""
    if manifest := next(path.glob(f"*/*/**/{npy.MANIFEST}"), None):
        hint = f"; {manifest.parent.parent} has <class>/{npy.MANIFEST}: give that folder"
    elif deeper := next(path.glob("*/*/**/*.npy"), None):
        hint = f"; {deeper.parent} has .npy files: give that folder and a `class_name`"
    raise TransferError(f"{path}: no embeddings are found in it; expected {_KNOWN}{hint}")


def _is_torch_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False

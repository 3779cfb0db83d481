"""Which kind of old cache a file or folder is."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Final

from lmdbcache.errors import TransferError
from lmdbcache.exchange.transfer.entries import Source
from lmdbcache.exchange.transfer.forms import KeyChoice
from lmdbcache.exchange.transfer.lance_source import is_lance_dataset, read_lance_source
from lmdbcache.exchange.transfer.npy_source import (
    MANIFEST,
    read_folder_source,
    read_manifest_source,
)
from lmdbcache.exchange.transfer.npz_source import read_npz_source
from lmdbcache.exchange.transfer.optional import optional
from lmdbcache.exchange.transfer.parquet_source import read_parquet_source
from lmdbcache.exchange.transfer.safetensors_source import read_safetensors_source
from lmdbcache.exchange.transfer.webdataset_source import read_webdataset_source
from lmdbcache.files import few

__all__ = ["open_source"]

_TORCH: Final = (".pt", ".pth", ".bin", ".pkl", ".ckpt", ".torch")
_URL: Final = re.compile(r"[a-z][a-z0-9+]+:/")  # a Path has one slash
_KNOWN: Final = (
    "a .pt file with a dict, a .safetensors, .npz, .parquet or .tar file, a Lance dataset, or a "
    "folder with <class>/manifest.json, <class>/<file_id>.npy, <file_id>__<class>.npy, "
    "*.safetensors, *.parquet or *.tar"
)


def open_source(path: str | Path, choice: KeyChoice) -> Source:
    """List what a file or folder holds; its embeddings aren't read yet.

    Raises:
        TransferError: Missing, damaged, empty, or of no form that is known here.
        MissingDependencyError: A package is needed to read it.
    """
    path = Path(path)
    try:
        source = _folder(path, choice) if path.is_dir() else _file(path, choice)
    except OSError as error:
        raise TransferError(f"{path} can't be read ({error.strerror or error})") from None
    if not (source.listing.entries or source.listing.refused):
        raise TransferError(f"{path} ({source.kind}) holds no embeddings")
    return source


def _file(path: Path, choice: KeyChoice) -> Source:
    if not path.is_file() and _URL.match(str(path)):
        raise TransferError(f"{path} is on another machine; copy it to this one, then import that")
    if not path.is_file():
        raise TransferError(f"{path} isn't there; expected {_KNOWN}")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return read_safetensors_source(path, [path], choice)
    if suffix == ".npz":
        return read_npz_source(path, choice)
    if suffix == ".parquet":
        return read_parquet_source(path, [path], choice)
    if suffix == ".tar":
        return read_webdataset_source(path, [path], choice)
    if suffix in _TORCH or _is_torch_archive(path):
        optional("torch", "reading a file of torch.save")
        from lmdbcache.exchange.transfer.torch_source import read_torch_source

        return read_torch_source(path, choice)
    if suffix == ".npy":
        raise TransferError(
            f"{path}: one .npy file; give the folder that it is in (with {MANIFEST}, if it holds "
            "several embeddings)"
        )
    raise TransferError(f"{path}: a file of an unknown kind; expected {_KNOWN}")


def _folder(path: Path, choice: KeyChoice) -> Source:
    if is_lance_dataset(path):
        return read_lance_source(path, choice)
    if any(path.glob(f"*/{MANIFEST}")) or (path / MANIFEST).is_file():
        return read_manifest_source(path, choice)
    if shards := sorted(path.glob("*.safetensors")):
        return read_safetensors_source(path, shards, choice)
    if shards := sorted(path.glob("*.parquet")):
        return read_parquet_source(path, shards, choice)
    if shards := sorted(path.glob("*.tar")):
        return read_webdataset_source(path, shards, choice)
    if any(path.glob("*.npy")) or any(path.glob("*/*.npy")) or any(path.glob("*/*.pt")):
        return read_folder_source(path, choice)
    if found := sorted(file.name for file in path.iterdir() if file.suffix in _TORCH):
        raise TransferError(f"{path}: give the file itself: {few(found, 5)}")
    deeper = next(path.glob("*/*/**/*.npy"), None)
    hint = f"; {deeper.parent} has .npy files: give that folder, with --class" if deeper else ""
    raise TransferError(f"{path}: no embeddings are found in it; expected {_KNOWN}{hint}")


def _is_torch_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False

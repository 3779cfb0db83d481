"""The file formats that import reads and export writes: one module each, and this table.

To add a format, write a module with a `read` function and a `Part` class, and add a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lmdbcache.exchange.formats import lance, npz, parquet, safetensors, torch, webdataset
from lmdbcache.exchange.formats.base import Embeddings, Part, Samples, Source
from lmdbcache.exchange.formats.keys import KeyChoice

__all__ = ["FORMATS", "Format"]


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

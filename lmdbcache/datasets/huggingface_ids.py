"""File ids of the rows of a Hugging Face dataset: the id column, or the content. No torch here.

A row's id depends on the row alone, not on its number or on the other rows, so that `select`,
`shuffle`, `filter` and `train_test_split` give each clip the id that it has in the whole dataset.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import xxhash

from lmdbcache.audio import shown
from lmdbcache.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["column_ids", "content_ids", "opened_file", "paths_of"]

_ROWS_AT_ONCE: Final = 32
_PIECE_BYTES: Final = 1 << 20
_LARGE_BYTES: Final = 1 << 30

_logger = logging.getLogger(__name__)


def column_ids(
    splits: Mapping[str, Any], audio: Mapping[str, Any], column: str, root: str
) -> dict[str, list[str]]:
    """Return split → the id column's value in each row, as text.

    Args:
        splits: Split → its rows.
        audio: Split → its audio column alone, undecoded.
        column: The id column, or `<audio column>.path`: the names of the files, without suffix.
        root: The dataset, for messages.

    Raises:
        DatasetError: A row has none.
    """
    found = {}
    for split, table in splits.items():
        is_path = column not in table.features
        flat = audio[split].flatten() if is_path else table.with_format(None)
        values = flat.select_columns([column])[:][column]
        if None in values:
            raise DatasetError(
                f"{shown(root)}: column {column!r} is empty in row {values.index(None)}"
            )
        found[split] = [Path(value).stem if is_path else str(value) for value in values]
    return found


def content_ids(
    audio: Mapping[str, Any], column: str, wanted: Mapping[str, Sequence[bool]], root: str
) -> dict[str, list[str]]:
    """Return split → a digest of each row's audio file, 32 hexadecimal digits.

    All of the audio is read, but none of it decoded. A row whose file can't be read has an id that
    begins with `unreadable-`: its clip fails, so that nothing is stored under it.

    Args:
        audio: Split → its audio column alone, undecoded.
        column: That column's name.
        wanted: Split → whether each row's id is needed; the others' are empty.
        root: The dataset, for messages.
    """
    if sum(table.data.nbytes for table in audio.values()) > _LARGE_BYTES:
        _logger.warning(
            "%s: no id column is given, so every clip is read for an id from its content; with "
            "id_column this isn't necessary",
            shown(root),
        )
    return {split: list(_digests(table, column, wanted[split])) for split, table in audio.items()}


def opened_file(path: str) -> BinaryIO:
    """Open a file that a row names.

    Raises:
        OSError: It can't be read, or is something else than a file, such as a pipe.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise OSError(f"{shown(path)} is not a regular file")
    return Path(path).open("rb")


def paths_of(audio: Mapping[str, Any], column: str) -> Iterator[str]:
    """Yield the path of each row that has one; no audio is read."""
    name = f"{column}.path"
    for table in audio.values():
        yield from filter(None, table.flatten().select_columns([name])[:][name])


def _digests(table: Any, column: str, wanted: Sequence[bool]) -> Iterator[str]:
    rows = 0
    for batch in table.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        structs = batch[column].combine_chunks()
        for value, path in zip(structs.field("bytes"), structs.field("path"), strict=True):
            yield _digest(value, path.as_py(), rows) if wanted[rows] else ""
            rows += 1


def _digest(value: Any, path: str | None, row: int) -> str:
    """The digest of a row's bytes, or of the file that it names."""
    if value.is_valid:
        return xxhash.xxh3_128_hexdigest(value.as_buffer())
    if not path:
        return f"unreadable-row-{row}"
    digest = xxhash.xxh3_128()
    try:
        with opened_file(path) as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    except (OSError, ValueError):  # ValueError: NUL in the path
        return f"unreadable-{xxhash.xxh3_128_hexdigest(os.fsencode(path))}"
    return digest.hexdigest()

"""The dicts in which scripts keep embeddings, from whichever file they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from lmdbcache.errors import TransferError
from lmdbcache.exchange.transfer.entries import Listing
from lmdbcache.exchange.transfer.keys import KeyReader, sample_id_in_class

__all__ = [
    "CLASSES",
    "EMBEDDINGS",
    "IDS",
    "METADATA",
    "KeyChoice",
    "Rows",
    "add_rows",
    "first_of",
    "text_list",
]

# Under one of these names lies what a dict holds beside other things.
EMBEDDINGS: Final = ("embeddings", "audio_embs", "embedding", "features")
IDS: Final = ("sample_ids", "keys", "ids", "file_ids", "filenames", "file_names", "names")
CLASSES: Final = ("classes", "class_names", "labels")
METADATA: Final = ("metadata", "meta", "config")


@dataclass(frozen=True)
class KeyChoice:
    """What a caller says about a source's names: see `KeyReader`."""

    order: Any = "auto"
    class_name: str | None = None

    def reader(
        self, keys: Sequence[Any], hints: Mapping[Any, str] | None = None, *, is_exact: bool = False
    ) -> KeyReader:
        """What reads these names."""
        return KeyReader(
            keys, hints, order=self.order, class_name=self.class_name, is_exact=is_exact
        )


def first_of(values: Mapping[Any, Any], names: Sequence[str]) -> str | None:
    """The first of these names that the mapping has."""
    return next((name for name in names if name in values), None)


def text_list(value: Any) -> list[str] | None:
    """A list or array of text as a list; None for anything else."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return list(value)
    return None


@dataclass(frozen=True)
class Rows:
    """Embeddings that lie in one array, and where their names are.

    Args:
        name: Of the array, for messages.
        num_rows: Its length.
        ids: Their names.
        classes: Their classes, where the names don't say.
        shape: Of one of them; None if they differ.
        dtype: numpy's name.
        load: Gives the row of a number.
    """

    name: str
    num_rows: int
    ids: Sequence[str] | None
    classes: Sequence[str | None] | None
    shape: Callable[[int], tuple[int, ...] | None]
    dtype: str | None
    load: Callable[[int], Any]
    is_exact: bool = field(default=False)


def add_rows(listing: Listing, rows: Rows, choice: KeyChoice) -> list[str]:
    """List the rows of an array.

    Returns:
        Notes.

    Raises:
        TransferError: There are no names, or not as many as rows.
    """
    if rows.ids is None:
        raise TransferError(
            f"{rows.name} is one array of {rows.num_rows} embeddings without a list of their "
            f"names; expected one under {', '.join(repr(name) for name in IDS[:3])}"
        )
    for what, names in (("names", rows.ids), ("classes", rows.classes)):
        if names is not None and len(names) != rows.num_rows:
            raise TransferError(
                f"{rows.name}: {rows.num_rows} embeddings and {len(names)} {what}; one for each "
                "is needed"
            )
    # Rows may share a name where the class tells them apart.
    classes: Sequence[str | None] = rows.classes or [None] * rows.num_rows
    classes = [None if ":" in name else one for name, one in zip(rows.ids, classes, strict=True)]
    unclassed = [name for name, one in zip(rows.ids, classes, strict=True) if one is None]
    reader = choice.reader(unclassed, is_exact=rows.is_exact)
    for number, (name, class_name) in enumerate(zip(rows.ids, classes, strict=True)):
        listing.add(
            name if class_name is None else f"{name}:{class_name}",
            partial(reader.sample_id, name)
            if class_name is None
            else partial(sample_id_in_class, name, class_name),
            rows.shape(number),
            rows.dtype,
            partial(rows.load, number),
        )
    return reader.notes

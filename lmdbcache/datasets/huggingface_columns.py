"""Which columns of a Hugging Face dataset hold audio, class and id, and the classes in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lmdbcache.embedders.audio_source import shown
from lmdbcache.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Columns", "choose_columns", "labels_of"]

_LABEL_NAMES: Final = ("label", "labels", "class", "class_name", "category", "target")


@dataclass(frozen=True)
class Columns:
    """Names of the columns; `id` is None where rows have no id of their own."""

    audio: str
    label: str
    id: str | None


def choose_columns(
    features: Mapping[str, Any],
    root: str,
    audio_column: str | None,
    label_column: str | None,
    id_column: str | None,
) -> Columns:
    """The columns asked for, or the ones that can be meant.

    Args:
        features: Column → feature.
        root: The dataset, for messages.
        audio_column: None chooses.
        label_column: None chooses.
        id_column: None is none.

    Raises:
        DatasetError: There is no such column, or not exactly one that can be meant.
    """
    audio = audio_column or _only(features, root, "audio", ("Audio",), ("audio",))
    label = label_column or _only(features, root, "label", ("ClassLabel",), _LABEL_NAMES)
    for name, column in (("audio", audio), ("label", label), ("id", id_column)):
        if column is not None and column not in features:
            raise DatasetError(
                f"{shown(root)}: {name}_column {column!r} isn't a column; there are "
                f"{', '.join(features)}"
            )
    return Columns(audio, label, id_column)


def _only(
    features: Mapping[str, Any],
    root: str,
    role: str,
    types: tuple[str, ...],
    names: tuple[str, ...],
) -> str:
    typed = [name for name, feature in features.items() if type(feature).__name__ in types]
    named = [name for name in names if name in features]
    found = typed or named
    if len(found) != 1:
        what = f"{', '.join(found)} can all be meant" if found else "none can be meant"
        raise DatasetError(
            f"{shown(root)}: which column is the {role}? {what}; say it with {role}_column "
            f"(--{role}-column). There are {', '.join(features)}"
        )
    return found[0]


def labels_of(
    splits: Mapping[str, Any], column: str, root: str
) -> tuple[dict[str, int], dict[str, list[str | None]]]:
    """(class → label, split → the class of each row, None where it has no label).

    Raises:
        DatasetError: The column holds something else than names or whole numbers, or a
            `ClassLabel` differs between splits.
    """
    features = {split: table.features[column] for split, table in splits.items()}
    values = {
        split: table.with_format(None).select_columns([column])[:][column]
        for split, table in splits.items()
    }
    names = [getattr(feature, "names", None) for feature in features.values()]
    if any(each != names[0] for each in names):
        raise DatasetError(f"{shown(root)}: the splits name the classes of {column!r} differently")
    if names[0]:
        classes = list(names[0])
        return (
            {name: label for label, name in enumerate(classes)},
            {split: [_named(classes, value) for value in part] for split, part in values.items()},
        )
    known = [value for part in values.values() for value in part if value is not None]
    odd = [value for value in known if type(value) not in (str, int)]
    if odd or len({type(value) for value in known}) > 1:
        raise DatasetError(
            f"{shown(root)}: column {column!r} holds {str((odd or known)[0])!r:.60}; labels are "
            "all text or all whole numbers"
        )
    found = sorted(set(known))
    by_number = bool(found) and type(found[0]) is int
    labels = {str(value): value if by_number else place for place, value in enumerate(found)}
    return labels, {
        split: [None if value is None else str(value) for value in part]
        for split, part in values.items()
    }


def _named(classes: list[str], value: int | None) -> str | None:
    """The library writes -1 where there is no label."""
    return None if value is None or not 0 <= value < len(classes) else classes[value]

"""Which columns of a Hugging Face dataset hold audio, class and id, and the classes in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmdbcache.audio import shown
from lmdbcache.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["MULTILABEL", "Columns", "Labels", "choose_columns", "labels_of"]

_LABEL_NAMES: Final = ("label", "labels", "class", "class_name", "category", "target")


MULTILABEL: Final = "multilabel"


@dataclass(frozen=True)
class Columns:
    """Names of the columns; `id` is None where rows have no id of their own."""

    audio: str
    label: str
    id: str | None


@dataclass(frozen=True)
class Labels:
    """What a label column says.

    Args:
        class_labels: Class → label.
        classes: Split → the class of each row, None where it has no label.
        target_names: What the places of a target stand for; empty with one label in a row.
        targets: Split → each row's target, bool `(len(target_names),)`; None likewise.
    """

    class_labels: dict[str, int]
    classes: dict[str, list[str | None]]
    target_names: tuple[str, ...] = ()
    targets: dict[str, list[NDArray[np.bool_]]] | None = None


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
        known = column in features or (name == "id" and column == f"{audio}.path")
        if column is not None and not known:
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
    typed = typed or [
        name for name, feature in features.items() if type(_of_list(feature)).__name__ in types
    ]
    named = [name for name in names if name in features]
    found = typed or named
    if len(found) != 1:
        what = f"{', '.join(found)} can all be meant" if found else "none can be meant"
        raise DatasetError(
            f"{shown(root)}: which column is the {role}? {what}; say it with {role}_column "
            f"(--{role}-column). There are {', '.join(features)}"
        )
    return found[0]


def labels_of(splits: Mapping[str, Any], column: str, root: str) -> Labels:
    """Return the classes of a label column.

    Raises:
        DatasetError: The column holds something else than names or whole numbers, or lists of
            names, or a `ClassLabel` differs between splits.
    """
    features = [table.features[column] for table in splits.values()]
    values = {
        split: table.with_format(None).select_columns([column])[:][column]
        for split, table in splits.items()
    }
    inner = [_of_list(feature) for feature in features]
    names = [
        getattr(feature if part is None else part, "names", None)
        for feature, part in zip(features, inner, strict=True)
    ]
    if any(each != names[0] for each in names):
        raise DatasetError(f"{shown(root)}: the splits name the classes of {column!r} differently")
    if inner[0] is not None:
        return _several(values, names[0], f"{shown(root)}: column {column!r}", inner[0])
    if names[0]:
        classes = list(names[0])
        return Labels(
            {name: label for label, name in enumerate(classes)},
            {split: [_named(classes, value) for value in part] for split, part in values.items()},
        )
    known = [value for part in values.values() for value in part if value is not None]
    odd = [value for value in known if type(value) not in (str, int)]
    if odd or len({type(value) for value in known}) > 1:
        raise DatasetError(
            f"{shown(root)}: column {column!r} holds {str((odd or known)[0])!r:.60}; labels are "
            "all text or all whole numbers, or lists of text or of a ClassLabel"
        )
    found = sorted(set(known))
    by_number = bool(found) and type(found[0]) is int
    return Labels(
        {str(value): value if by_number else place for place, value in enumerate(found)},
        {
            split: [None if value is None else str(value) for value in part]
            for split, part in values.items()
        },
    )


def _of_list(feature: Any) -> Any:
    """What a list's items are, None for what isn't a list."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)


def _named(classes: list[str], value: int | None) -> str | None:
    """The library writes -1 where there is no label."""
    return None if value is None or not 0 <= value < len(classes) else classes[value]


def _several(
    values: Mapping[str, list[list[Any] | None]], names: list[str] | None, where: str, inner: Any
) -> Labels:
    """Of a column with a list of labels in each row."""
    rows: dict[str, list[list[str] | None]] = {
        split: [_known(row, names) for row in part] for split, part in values.items()
    }
    found = [name for part in rows.values() for row in part if row is not None for name in row]
    if names is None and any(type(name) is not str for name in found):
        raise DatasetError(
            f"{where} holds lists of {inner!s:.60}; several labels in a row are lists of text or "
            "of a ClassLabel: cast it, or give another label_column"
        )
    places = {name: place for place, name in enumerate(names or sorted(set(found)))}
    return Labels(
        {MULTILABEL: 0},
        {
            split: [None if row is None else MULTILABEL for row in part]
            for split, part in rows.items()
        },
        tuple(places),
        {split: [_multi_hot(row, places) for row in part] for split, part in rows.items()},
    )


def _known(row: list[Any] | None, names: list[str] | None) -> list[Any] | None:
    """The row's labels without those that stand for none; None if nothing else was there."""
    if row is None:
        return None
    given = row if names is None else [_named(names, value) for value in row]
    known = [name for name in given if name is not None]
    return None if given and not known else known


def _multi_hot(row: list[str] | None, places: Mapping[str, int]) -> NDArray[np.bool_]:
    target = np.zeros(len(places), dtype=np.bool_)
    target[[places[name] for name in row or ()]] = True
    return target

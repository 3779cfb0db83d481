"""Classes that a user names, among those that a dataset knows. No torch here."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from lmdbcache.errors import DatasetError
from lmdbcache.files import few
from lmdbcache.storage import canonical_class

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["chosen_classes"]

_MOST_SHOWN = 60


def chosen_classes(
    classes: str | int | Iterable[str | int] | None,
    class_labels: Mapping[str, int],
    dataset: str,
) -> list[str] | None:
    """Class names of a selection given as names (any case) or labels.

    Args:
        classes: What is asked for.
        class_labels: Class name, in lower case → label.
        dataset: What to call the dataset in an error.

    Returns:
        The names in the order given, or None where nothing was selected.

    Raises:
        DatasetError: A name or label isn't one of the dataset's.
    """
    if classes is None:
        return None
    if isinstance(classes, (str, int)):
        classes = [classes]
    return [_class_name(item, class_labels, dataset) for item in classes] or None


def _class_name(item: Any, class_labels: Mapping[str, int], dataset: str) -> str:
    name: str | None
    if isinstance(item, str):
        name = canonical_class(item.strip())
        name = name if name in class_labels else None
    else:
        names = {label: name for name, label in class_labels.items()}
        try:
            name = None if isinstance(item, bool) else names.get(operator.index(item))
        except TypeError:
            name = None
    if name is None:
        pairs = [f"{name} ({label})" for name, label in class_labels.items()]
        raise DatasetError(
            f"{item!r} isn't a class of {dataset}; names and labels are {few(pairs, _MOST_SHOWN)}"
        )
    return name

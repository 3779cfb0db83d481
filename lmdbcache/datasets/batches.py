"""A batch that a dataset fetches as a whole: values by key, and items for whoever asks for them."""

from __future__ import annotations

import functools
import itertools
from collections import UserList
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

# The values of those items that have a key, in order, `(n, ...)` or n of them; and which have it.
Column: TypeAlias = tuple[Sequence[Any] | torch.Tensor, Sequence[bool]]


class FetchedItems(UserList[dict[str, Any]]):
    """The items of a batch that was fetched as a whole.

    A collate function that reads `columns` costs no more than the batch. For any other this is a
    list of dicts, which are made when something reads the list.

    Args:
        items: Items that are made already.
        columns: Key → values; instead of `items`.
        kind: What an item is, a dict.

    Attributes:
        columns: As given; None from when the items are made, which may be changed.
    """

    def __init__(
        self,
        items: Iterable[dict[str, Any]] = (),
        *,
        columns: Mapping[str, Column] | None = None,
        kind: type[dict[str, Any]] = dict,
    ) -> None:
        self.columns, self._kind = columns, kind
        if columns is None:
            self.data = list(items)

    @functools.cached_property
    def data(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The items."""
        columns, self.columns = self.columns or {}, None
        _, everything = next(iter(columns.values()))
        items = [self._kind() for _ in everything]
        for key, (values, has_key) in columns.items():
            rows = values.unbind(0) if isinstance(values, torch.Tensor) else values
            for item, row in zip(itertools.compress(items, has_key), rows, strict=True):
                item[key] = row
        return items

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self.data,)

    __copy__ = UserList.copy


def column(items: Sequence[dict[str, Any]], key: str) -> Column:
    """Return what the items of a batch have under a key; a deferred value as it is."""
    columns = items.columns if isinstance(items, FetchedItems) else None
    if columns is None:
        has_key = [key in item for item in items]
        return [dict.__getitem__(i, key) for i in itertools.compress(items, has_key)], has_key
    if key not in columns:
        _, everything = next(iter(columns.values()))
        return [], [False] * len(everything)
    return columns[key]


def stacked(values: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    """Return the tensors stacked; those that were fetched as one are that tensor."""
    return values if isinstance(values, torch.Tensor) else torch.stack(list(values))

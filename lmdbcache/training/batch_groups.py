"""Parts of a batch's inputs: the samples whose features have one shape, copies of one sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

__all__ = ["Group", "copies_of", "groups_by_shape", "rows_of", "row_checksums"]

Group = tuple[list[int], list[Any], dict[str, Any]]


def groups_by_shape(inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Group]:
    """(rows, their positional inputs, their named inputs), for each shape of the first input.

    Args:
        inputs: Positional inputs of all samples; the first one a tensor, or a list of tensors of
            one sample each, such as features.
        named: Further inputs by name.
    """
    first = inputs[0]
    alike: dict[Any, list[int]] = {}
    for row, one in enumerate(first):
        alike.setdefault((one.dtype, tuple(one.shape)), []).append(row)
    return [
        (
            rows,
            [torch.stack([torch.as_tensor(first[row]) for row in rows])]
            + [rows_of(one, rows) for one in inputs[1:]],
            {name: rows_of(one, rows) for name, one in named.items()},
        )
        for rows in alike.values()
    ]


def rows_of(value: Any, rows: Sequence[int]) -> Any:
    """An input of these rows; what isn't one for each sample as it is."""
    if isinstance(value, Mapping):
        return {name: rows_of(part, rows) for name, part in value.items()}
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim:
        return value[list(rows)]
    if isinstance(value, (list, tuple)):
        return [value[row] for row in rows]
    return value


def copies_of(value: Any, row: int, number: int) -> Any:
    """An input in which every sample is this one."""
    return rows_of(value, [row] * number)


def row_checksums(value: Any) -> list[int | None]:
    """A checksum for each row of a tensor, None for rows of zeros; empty for anything else."""
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return []
    rows = value.detach().cpu().contiguous().flatten(1) if value.ndim > 1 else value[:, None].cpu()
    return [
        xxhash.xxh3_64_intdigest(row.view(torch.uint8).numpy().data) if row.any() else None
        for row in rows
    ]

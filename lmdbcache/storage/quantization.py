"""Rows of float32 as int8 with one scale for each: a quarter of the bytes.

Stored rows are `(*rows, hidden_size + 4)` int8: the elements, then the four bytes of the row's
scale, a little-endian float32. A number is its element times the scale.

The scale is the row's largest magnitude / 127, rounded up to 17 significant bits. So each product
is exact in float32, on every machine, and rows that were read back quantize to the bytes they came
from: they may go through any number of stores and files.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import groupby, islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt

SCALE_BYTES: Final = 4
_LARGEST_INT: Final = np.float32(127)
_ROUNDED_BITS: Final = np.uint32(127)  # a float32 has 24 significant bits, 127 times one takes 7
_ELEMENTS_AT_ONCE: Final = 1 << 20
_SMALLEST_SCALE: Final = np.finfo(np.float32).tiny
# Beyond, the largest element times the rounded scale would be infinite.
LARGEST_MAGNITUDE: Final = float(np.float32(np.finfo(np.float32).max * (1 - 2.0**-16)))


def quantized(rows: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """Return rows as they are stored.

    Args:
        rows: `(*rows, hidden_size)` float32, no magnitude above `LARGEST_MAGNITUDE`.

    Returns:
        `(*rows, hidden_size + SCALE_BYTES)` int8.
    """
    largest = np.maximum(rows.max(-1, keepdims=True), -rows.min(-1, keepdims=True))
    bits = (largest / _LARGEST_INT).view(np.uint32)
    rounded = ((bits + _ROUNDED_BITS) & ~_ROUNDED_BITS).view(np.float32)
    scale = np.maximum(rounded, _SMALLEST_SCALE)
    stored = np.empty((*rows.shape[:-1], rows.shape[-1] + SCALE_BYTES), np.int8)
    elements = rows / scale
    stored[..., :-SCALE_BYTES] = np.rint(elements, out=elements)
    stored[..., -SCALE_BYTES:] = scale.view(np.int8)
    return stored


def dequantized(
    stored: npt.NDArray[np.int8], out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Return stored rows as float32, `(*rows, hidden_size)`, owned; `out` if it is given."""
    scale = stored[..., -SCALE_BYTES:].view("<f4")
    rows: npt.NDArray[np.float32] = np.multiply(
        stored[..., :-SCALE_BYTES], scale, out=out, dtype=np.float32
    )
    return rows


def quantized_values(
    embeddings: Sequence[npt.NDArray[np.float32]],
) -> tuple[list[npt.NDArray[np.int8]], float]:
    """Quantize embeddings, of whatever shapes.

    Returns:
        What is stored of each, and the largest relative L2 distance of one from its embedding.
    """
    stored: list[npt.NDArray[np.int8]] = []
    error = 0.0
    for shape, alike in groupby(embeddings, key=operator.attrgetter("shape")):
        step = max(1, _ELEMENTS_AT_ONCE // max(1, math.prod(shape)))
        while some := list(islice(alike, step)):
            block = np.stack(some)
            rows = quantized(block)
            error = max(error, _largest_distance(block, dequantized(rows)))
            stored.extend(rows)
    return stored, error


def _largest_distance(exact: npt.NDArray[np.float32], read: npt.NDArray[np.float32]) -> float:
    difference, exact = (one.reshape(len(one), -1) for one in (read - exact, exact))
    squared, norm = (
        np.einsum("ij,ij->i", rows, rows, dtype=np.float64) for rows in (difference, exact)
    )
    return float(np.sqrt((squared / np.maximum(norm, np.finfo(np.float64).tiny)).max()))

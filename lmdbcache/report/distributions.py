"""A set of numbers in a few: quantiles, and a histogram that is ready to be drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Distribution", "distribution_of"]

_NUM_BINS: Final = 60
_PERCENTS: Final = (0, 1, 50, 99, 100)


@dataclass(frozen=True)
class Distribution:
    """How numbers are spread.

    Args:
        count: How many there are.
        mean: Their mean.
        standard_deviation: Of all of them.
        percentiles: Percent → value.
        edges: Of the bins; one more than there are bins.
        counts: Numbers in each bin. What lies beyond the edges is in the outermost bins.
    """

    count: int
    mean: float
    standard_deviation: float
    percentiles: dict[str, float]
    edges: list[float]
    counts: list[int]


def distribution_of(numbers: npt.NDArray[Any], *, trim: float = 0.0) -> Distribution | None:
    """The distribution of some finite numbers; None of none.

    Args:
        numbers: Of any shape.
        trim: Percent at either end that needn't be within the edges, so that a few far values
            don't press all others into one bar.
    """
    flat = np.asarray(numbers, np.float64).reshape(-1)
    if not flat.size:
        return None
    percentiles = np.percentile(flat, _PERCENTS)
    low, high = np.percentile(flat, (trim, 100 - trim))
    # Equal numbers, or nearly so, still get a bar of some width.
    least = max(abs(low), abs(high), 1e-30) * 1e-6
    if high - low < least:
        low, high = low - least, high + least
    counts, edges = np.histogram(flat.clip(low, high), bins=_NUM_BINS, range=(low, high))
    return Distribution(
        count=int(flat.size),
        mean=float(flat.mean()),
        standard_deviation=float(flat.std()),
        percentiles={
            f"{percent} %": float(value)
            for percent, value in zip(_PERCENTS, percentiles, strict=True)
        },
        edges=edges.tolist(),
        counts=counts.tolist(),
    )

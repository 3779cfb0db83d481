"""The fixed units of work that an extraction is cut into."""

from __future__ import annotations

from collections.abc import Collection, Iterable

__all__ = ["units_of"]


def units_of(
    sample_ids: Iterable[str], missing: Collection[str], unit_size: int
) -> list[list[str]]:
    """What is missing, as batches that depend on the samples asked for and on nothing else.

    All samples are cut, sorted, and not only the missing ones: whoever else fills the store, and
    whenever each of them looks, unit 7 is unit 7 for all. The last bits of an embedding depend on
    the batch it was computed in.

    Args:
        sample_ids: All samples of the run.
        missing: Those to be computed.
        unit_size: Clips of a unit.

    Returns:
        The missing samples of each unit; empty where nothing is missing.
    """
    ordered = sorted(sample_ids)
    missing = missing if isinstance(missing, (set, frozenset, dict)) else set(missing)
    return [
        [sample_id for sample_id in ordered[start : start + unit_size] if sample_id in missing]
        for start in range(0, len(ordered), unit_size)
    ]

"""Why a store doesn't have a sample, told from the sample ids that it has."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from lmdbcache.errors import InvalidSampleIdError
from lmdbcache.files import few
from lmdbcache.storage.layout import canonical_sample_id, split_sample_id

__all__ = ["SampleAbsence", "explain_sample_absence"]

_NEIGHBOURS: Final = 500  # file ids on either side that are compared; all of a store would be slow


@dataclass(frozen=True)
class SampleAbsence:
    """Why a sample isn't in a store.

    Args:
        reason: `"invalid_sample_id"`, `"other_class"` (the file id is there under another class),
            `"class_absent"` or `"file_absent"`.
        text: The same in a sentence.
        nearest: What is there instead: sample ids, or class names for `"class_absent"`.
    """

    reason: str
    text: str
    nearest: tuple[str, ...] = ()


def explain_sample_absence(sample_id: str, stored: Iterable[str]) -> SampleAbsence:
    """Why this sample isn't among the stored ones.

    Args:
        sample_id: Not stored.
        stored: All sample ids of the store.
    """
    try:
        sample_id = canonical_sample_id(sample_id)
    except InvalidSampleIdError as error:
        return SampleAbsence("invalid_sample_id", str(error))
    file_id, class_name = split_sample_id(sample_id)
    by_class: dict[str, list[str]] = {}
    elsewhere = []
    for name in stored:
        their_file, _, their_class = name.rpartition(":")
        by_class.setdefault(their_class, []).append(their_file)
        if their_file == file_id:
            elsewhere.append(name)
    if elsewhere:
        return SampleAbsence(
            "other_class",
            f"{sample_id!r} isn't stored; file id {file_id!r} is, under another class: "
            f"{_listed(elsewhere)}",
            tuple(elsewhere[:3]),
        )
    if class_name not in by_class:
        near = difflib.get_close_matches(class_name, by_class, n=1) or sorted(by_class)[:3]
        return SampleAbsence(
            "class_absent",
            f"{sample_id!r} isn't stored, nor is any sample of class {class_name!r}; "
            + (f"nearest class: {_listed(near)}" if near else "the store is empty"),
            tuple(near),
        )
    near = [f"{name}:{class_name}" for name in _nearest(file_id, by_class[class_name])]
    return SampleAbsence(
        "file_absent",
        f"{sample_id!r} isn't stored; {len(by_class[class_name])} others of class {class_name!r} "
        f"are, nearest: {_listed(near)}",
        tuple(near),
    )


def _nearest(file_id: str, names: list[str]) -> list[str]:
    names = sorted(names)
    place = bisect.bisect(names, file_id)
    near = names[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS]
    return difflib.get_close_matches(file_id, near, n=3) or near[:1]


def _listed(names: list[str]) -> str:
    return few(list(map(repr, names)), 3)

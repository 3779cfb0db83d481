"""Whether parts of a dataset share clips: nodes among themselves, train and test. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

from lmdbcache.datasets.base import Sample, sample_id_of, source_of
from lmdbcache.datasets.scanning import content_digest
from lmdbcache.files import few
from lmdbcache.storage import Report

_FEW = 5


@dataclass(frozen=True)
class Overlap:
    """Clips that two parts share.

    Args:
        first: Name of one part.
        second: Name of the other.
        by: `"sample_id"`, or `"content"`: other sample ids, equal bytes.
        samples: Pairs of sample ids, one of each part.
    """

    first: str
    second: str
    by: str
    samples: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        pairs = few([a if a == b else f"{a} = {b}" for a, b in self.samples], _FEW)
        return f"{self.first} and {self.second} share by {self.by.replace('_', ' ')}: {pairs}"


@dataclass(frozen=True)
class OverlapReport(Report):
    """The result of `overlap_audit`.

    Args:
        sizes: Part → number of its samples.
        overlaps: The pairs of parts that share clips; empty if none do.
        by_content: Whether the files' bytes were also compared.
        unreadable: Sample ids whose bytes couldn't be read.
    """

    derived: ClassVar[tuple[str, ...]] = ("is_disjoint",)

    sizes: Mapping[str, int]
    overlaps: tuple[Overlap, ...]
    by_content: bool
    unreadable: tuple[str, ...] = ()

    @property
    def is_disjoint(self) -> bool:
        """Whether no two parts share a clip, as far as could be read."""
        return not self.overlaps

    def __str__(self) -> str:
        lines = list(map(str, self.overlaps))
        if self.is_disjoint:
            by = "sample id or content" if self.by_content else "sample id"
            lines.append(f"no two of {len(self.sizes)} parts share a {by}")
        if self.unreadable:
            lines.append(
                f"{len(self.unreadable)} clips couldn't be read: {few(self.unreadable, _FEW)}"
            )
        return "\n".join(lines)


def overlap_audit(
    parts: Mapping[str, Sequence[Sample]] | Sequence[Sequence[Sample]], *, by_content: bool = False
) -> OverlapReport:
    """Look for clips that are in more than one part.

    Args:
        parts: Name → samples; without names they are called `part 0`, `part 1`, ….
        by_content: Also compare the bytes of the clips' files; reads all of them. Equal sound in
            another encoding isn't noticed.

    Returns:
        The pairs of parts that share clips.
    """
    if not isinstance(parts, Mapping):
        parts = {f"part {number}": samples for number, samples in enumerate(parts)}
    by_id = {name: {sample_id_of(s): sample_id_of(s) for s in part} for name, part in parts.items()}
    overlaps = _shared(by_id, "sample_id")
    digests: dict[str, str | None] = {}
    if by_content:
        sources = {sample_id_of(s): source_of(s) for part in parts.values() for s in part}
        digests = {sample_id: content_digest(source) for sample_id, source in sources.items()}
        by_digest = {
            name: {digest: each for each in ids if (digest := digests[each]) is not None}
            for name, ids in by_id.items()
        }
        overlaps += _shared(by_digest, "content")
    return OverlapReport(
        sizes={name: len(samples) for name, samples in parts.items()},
        overlaps=tuple(overlaps),
        by_content=by_content,
        unreadable=tuple(each for each, digest in digests.items() if digest is None),
    )


def _shared(parts: Mapping[str, Mapping[str, str]], by: str) -> list[Overlap]:
    """Pairs of parts with equal keys; equal sample ids aren't listed again as equal content."""
    found = []
    for first, second in combinations(parts, 2):
        pairs = [
            (parts[first][key], parts[second][key]) for key in parts[first] if key in parts[second]
        ]
        if by == "content":
            pairs = [pair for pair in pairs if pair[0] != pair[1]]
        if pairs:
            found.append(Overlap(first, second, by, tuple(sorted(pairs))))
    return found

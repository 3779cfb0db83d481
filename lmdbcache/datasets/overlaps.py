"""Whether parts of a dataset share clips: nodes among themselves, train and test. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import xxhash

from lmdbcache.audio import AudioSource
from lmdbcache.datasets.base import Sample, sample_id_of, source_of
from lmdbcache.files import few

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Overlap", "OverlapReport", "overlap_audit"]

_CHUNK = 1 << 20


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


@dataclass(frozen=True)
class OverlapReport:
    """What `overlap_audit` found.

    Args:
        sizes: Part → number of its samples.
        overlaps: The pairs of parts that share clips; empty if none do.
        by_content: Whether the files' bytes were compared, too.
        unreadable: Sample ids whose bytes couldn't be read.
    """

    sizes: Mapping[str, int]
    overlaps: tuple[Overlap, ...]
    by_content: bool
    unreadable: tuple[str, ...] = ()

    @property
    def is_disjoint(self) -> bool:
        """Whether no two parts share a clip, as far as could be read."""
        return not self.overlaps

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "is_disjoint": self.is_disjoint,
            "by_content": self.by_content,
            "sizes": dict(self.sizes),
            "overlaps": [
                {**vars(overlap), "samples": [list(pair) for pair in overlap.samples]}
                for overlap in self.overlaps
            ],
            "unreadable": list(self.unreadable),
        }

    def __str__(self) -> str:
        what = "sample id or content" if self.by_content else "sample id"
        lines = []
        if self.is_disjoint:
            lines.append(f"no two of {len(self.sizes)} parts share a {what}")
        for overlap in self.overlaps:
            pairs = few([a if a == b else f"{a} = {b}" for a, b in overlap.samples], 5)
            same = "sample id" if overlap.by == "sample_id" else "content"
            lines.append(f"{overlap.first} and {overlap.second} share by {same}: {pairs}")
        if self.unreadable:
            unreadable = few(self.unreadable, 5)
            lines.append(f"{len(self.unreadable)} clips couldn't be read: {unreadable}")
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
    unreadable: list[str] = []
    if by_content:
        digests: dict[str, str | None] = {}
        by_digest: dict[str, dict[str, str]] = {}
        for name, samples in parts.items():
            by_digest[name] = {}
            for sample in samples:
                sample_id = sample_id_of(sample)
                if sample_id not in digests:
                    digests[sample_id] = _content_digest(source_of(sample))
                digest = digests[sample_id]
                if digest is not None:
                    by_digest[name][digest] = sample_id
        overlaps += _shared(by_digest, "content")
        unreadable = [sample_id for sample_id, digest in digests.items() if digest is None]
    return OverlapReport(
        sizes={name: len(samples) for name, samples in parts.items()},
        overlaps=tuple(overlaps),
        by_content=by_content,
        unreadable=tuple(unreadable),
    )


def _shared(parts: Mapping[str, Mapping[str, str]], by: str) -> list[Overlap]:
    """Pairs of parts with equal keys; equal sample ids aren't told again as equal content."""
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


def _content_digest(source: str | AudioSource) -> str | None:
    if not isinstance(source, AudioSource) and not Path(source).is_file():
        return None  # a pipe would wait for ever
    digest = xxhash.xxh3_128()
    try:
        with source.open_binary() if isinstance(source, AudioSource) else _file(source) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except (OSError, ValueError):
        return None
    return str(digest.hexdigest())


def _file(path: str) -> BinaryIO:
    return Path(path).open("rb")

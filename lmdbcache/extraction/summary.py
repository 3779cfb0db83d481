"""What an extraction did, and the clips that it couldn't use."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lmdbcache.storage.layout import CURRENT_NAME

__all__ = [
    "FAILURES_NAME",
    "ClipFailure",
    "ExtractionSummary",
    "read_failures",
    "update_failures",
]

FAILURES_NAME: Final = "failures.json"


@dataclass(frozen=True)
class ClipFailure:
    """A clip that gave no embedding; it is never cached and tried again by the next run."""

    sample_id: str
    path: str
    reason: str


@dataclass(frozen=True)
class ExtractionSummary:
    """What one run did.

    Args:
        store: The store's folder; None if nothing is stored.
        num_samples: Distinct samples asked for.
        num_cached: Of these, stored before the run, or by another process meanwhile.
        num_extracted: Embeddings added by the run.
        num_silent: Of these, clips of digital silence.
        failures: Clips without an embedding, with reasons.
        seconds: Wall time of the run.
        compute_seconds: Wall time of the model's forward passes.
        built_model: Whether the model had to be loaded.
    """

    store: Path | None
    num_samples: int
    num_cached: int
    num_extracted: int = 0
    num_silent: int = 0
    failures: tuple[ClipFailure, ...] = ()
    seconds: float = 0.0
    compute_seconds: float = 0.0
    built_model: bool = False

    @property
    def exit_code(self) -> int:
        """0, or 1 if a clip failed."""
        return 1 if self.failures else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "store": None if self.store is None else os.fspath(self.store)}

    def __str__(self) -> str:
        rate = f", {self.num_extracted / self.seconds:.1f} clips/s" if self.num_extracted else ""
        counts = f"{self.num_cached} were cached, {self.num_extracted} extracted"
        failed = f"{len(self.failures)} failed ({self.seconds:.1f} s{rate})"
        lines = [f"{self.num_samples} samples: {counts}, {failed}"]
        if self.num_silent:
            lines.append(f"{self.num_silent} of the extracted clips are digital silence")
        shown = 20
        lines += [
            f"failed: {failure.sample_id}: {failure.reason}" for failure in self.failures[:shown]
        ]
        if len(self.failures) > shown:
            has_list = self.store and (self.num_cached or self.num_extracted)
            where = self.store / FAILURES_NAME if self.store and has_list else "`failures` (--json)"
            lines.append(f"… and {len(self.failures) - shown} more in {where}")
        return "\n".join(lines)


def read_failures(store: Path) -> list[ClipFailure]:
    """The clips of this store that failed when last tried; none if there is no list."""
    try:
        entries = json.loads((store / FAILURES_NAME).read_text("utf-8"))["failures"]
        return [ClipFailure(**{k: str(v) for k, v in entry.items()}) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []  # derived: the next run makes it anew


def update_failures(store: Path, tried: Iterable[str], failures: Sequence[ClipFailure]) -> None:
    """Replace what the list says of the tried samples; written at once or not at all.

    Where nothing is stored there is no list: a folder with nothing else in it would look like a
    store. The run's summary has the failures.
    """
    if not (store / CURRENT_NAME).exists():
        return
    tried = set(tried)
    kept = [failure for failure in read_failures(store) if failure.sample_id not in tried]
    entries = sorted([*kept, *failures], key=lambda failure: failure.sample_id)
    path = store / FAILURES_NAME
    if entries == read_failures(store):
        return
    if not entries:
        path.unlink(missing_ok=True)
        return
    # ASCII: a file name that isn't UTF-8 holds lone surrogates.
    text = json.dumps({"failures": [asdict(entry) for entry in entries]}, indent=1)
    temporary = store / f"{FAILURES_NAME}.{os.getpid()}.tmp"
    try:
        temporary.write_text(text, encoding="ascii")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

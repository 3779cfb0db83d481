"""What an extraction did."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from lmdbcache.cache import FAILURES_NAME, ClipFailure
from lmdbcache.files import few

__all__ = ["ExtractionSummary"]

_NUM_NAMED: Final = 5


@dataclass(frozen=True)
class ExtractionSummary:
    """What one run did.

    Args:
        store: The store's folder; None if nothing is stored.
        num_samples: Distinct samples asked for.
        num_cached: Of these, stored before the run, or by another process meanwhile.
        num_extracted: Embeddings added by the run.
        silent: The sample ids of digital silence among them.
        cancelled: Those whose channels cancel when they are mixed to mono: the mix has less than a
            thousandth (-30 dB) of the channels' mean energy.
        equal: Sample ids of extracted clips that have one and the same embedding although they
            sound different, a group for each such embedding.
        failures: Clips without an embedding, with reasons.
        seconds: Wall time of the run.
        compute_seconds: Wall time of the model's forward passes.
        built_model: Whether the model had to be loaded.
        moved_model: How the model's Hub name stands for other weights now than those that filled
            the store; empty if it doesn't, or something had to be computed.
        num_suspects: Cached clips whose file has another size or time than when it was embedded.
        rank: Which of the processes that share the clips, from 0; the figures are its own.
        world_size: How many there are.
        left_out: How much of the dataset is no clip though it looks like one: `count`, and
            `by_kind`, `by_suffix`, `by_class`; empty for clips that aren't a dataset.
    """

    store: Path | None
    num_samples: int
    num_cached: int
    num_extracted: int = 0
    silent: tuple[str, ...] = ()
    cancelled: tuple[str, ...] = ()
    equal: tuple[tuple[str, ...], ...] = ()
    failures: tuple[ClipFailure, ...] = ()
    seconds: float = 0.0
    compute_seconds: float = 0.0
    built_model: bool = False
    moved_model: str = ""
    num_suspects: int = 0
    rank: int = 0
    world_size: int = 1
    left_out: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_silent(self) -> int:
        """Number of extracted clips that are digital silence."""
        return len(self.silent)

    @property
    def num_equal(self) -> int:
        """Clips in `equal`."""
        return sum(map(len, self.equal))

    @property
    def exit_code(self) -> int:
        """0, or 1 if a clip failed."""
        return 1 if self.failures else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        store = None if self.store is None else os.fspath(self.store)
        counts = {"num_silent": self.num_silent, "num_equal": self.num_equal}
        return {**asdict(self), "store": store, **counts}

    def __str__(self) -> str:
        rate = f", {self.num_extracted / self.seconds:.1f} clips/s" if self.num_extracted else ""
        counts = f"{self.num_cached} were cached, {self.num_extracted} extracted"
        failed = f"{len(self.failures)} failed ({self.seconds:.1f} s{rate})"
        who = f"rank {self.rank} of {self.world_size}: " if self.world_size > 1 else ""
        lines = [f"{who}{self.num_samples} samples: {counts}, {failed}"]
        for sample_ids, what in (
            (self.silent, "are digital silence"),
            (self.cancelled, "have channels that cancel when they are mixed to mono"),
            (sum(self.equal, ()), "have the embedding of another one that sounds different"),
        ):
            if sample_ids:
                named = few(sample_ids, _NUM_NAMED)
                lines.append(f"{len(sample_ids)} of the extracted clips {what}: {named}")
        if self.left_out.get("count"):
            lines.append(f"{self.left_out['count']} files or rows of the dataset are left out")
        if self.moved_model:
            lines.append(self.moved_model)
        if self.num_suspects:
            name = self.store.name if self.store else ""
            lines.append(
                f"{self.num_suspects} cached clips have files of another size or time than when "
                f"they were embedded: see `lmdbcache verify {name} --sources`"
            )
        shown = 20
        lines += [
            f"failed: {failure.sample_id}: {failure.reason}" for failure in self.failures[:shown]
        ]
        if len(self.failures) > shown:
            has_list = self.store and (self.num_cached or self.num_extracted)
            where = self.store / FAILURES_NAME if self.store and has_list else "`failures` (--json)"
            lines.append(f"… and {len(self.failures) - shown} more in {where}")
        return "\n".join(lines)

"""Which part of an extraction one of several processes takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lmdbcache.errors import ConfigError
from lmdbcache.machine import available_cores

__all__ = ["RankShare"]


@dataclass(frozen=True)
class RankShare:
    """The units `units[rank::world_size]` of an extraction that several processes do together.

    Args:
        rank: Which of them, from 0.
        world_size: How many there are.
        local_rank: Which of those on this machine, from 0; chooses the GPU.
        local_world_size: How many there are on this machine, which share its cores.
        num_cores: Cores of this process; None divides the machine's.

    Raises:
        ConfigError: No such rank.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    num_cores: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or self.local_rank < 0:
            raise ConfigError(
                f"rank: {self.rank} (local_rank {self.local_rank}) with a world_size of "
                f"{self.world_size}; it must be 0 or more and less than world_size"
            )
        object.__setattr__(
            self, "local_world_size", max(self.local_world_size, self.local_rank + 1)
        )

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"

    @property
    def is_all(self) -> bool:
        """Whether there is nobody to share with."""
        return self.world_size == 1

    def of(self, sample_ids: Iterable[str], unit_size: int) -> list[str]:
        """The samples of this share, sorted.

        They are whole units: cut again, they give the same ones.

        Args:
            sample_ids: All samples of the extraction, in any order.
            unit_size: Clips of a unit.

        Raises:
            ConfigError: Units of no clips.
        """
        if unit_size < 1:
            raise ConfigError(f"batch_size: {unit_size}; it must be 1 or more")
        ordered = sorted(sample_ids)
        starts = range(self.rank * unit_size, len(ordered), self.world_size * unit_size)
        return [sample_id for at in starts for sample_id in ordered[at : at + unit_size]]

    def decoding_processes(self) -> int:
        """Decoding processes that keep a model busy without taking its cores."""
        cores = self.num_cores or available_cores() // self.local_world_size
        return max(1, min(8, cores // 2))

"""The options that share an extraction between processes, and who speaks in their output."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from lmdbcache.cli.command import Option
from lmdbcache.cli.console import speak_for
from lmdbcache.errors import ConfigError
from lmdbcache.extraction import (
    RankShare,
    is_on_several_machines,
    launched_by,
    share_from_environment,
)

_PANEL = "Several processes"
_RAY_PANEL = "Ray"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LaunchChoice:
    """Which of several processes this is, and where it stores."""

    launcher: Annotated[
        str,
        Option(
            help="Take this process's share of the clips: torchrun (accelerate), slurm (srun, job "
            "arrays), auto (whichever has started it), or none: all clips; ray: all clips on the "
            "nodes of a Ray cluster. See docs/cluster.md and docs/ray.md.",
            panel=_PANEL,
        ),
    ] = "none"
    rank: Annotated[
        int | None,
        Option(help="Which process this is, from 0, for any other launcher.", panel=_PANEL),
    ] = None
    world_size: Annotated[
        int | None,
        Option(help="How many processes there are.", panel=_PANEL),
    ] = None
    staging: Annotated[
        str | None,
        Option(
            help="Each process stores in this folder, to be merged into the root later; for "
            "processes on several machines. ray merges by itself and needs a folder that all nodes "
            "share.",
            panel=_PANEL,
        ),
    ] = None
    address: Annotated[
        str | None,
        Option(
            "--ray-address",
            help="Of the cluster's head, or auto; default: $RAY_ADDRESS, else a cluster that runs "
            "on this machine, else one is started here for the run.",
            show_default=False,
            panel=_RAY_PANEL,
        ),
    ] = None
    num_actors: Annotated[
        int | None,
        Option(
            help="Processes that run the model; default: one for each GPU, else for each node.",
            show_default=False,
            panel=_RAY_PANEL,
        ),
    ] = None

    @property
    def is_on_ray(self) -> bool:
        """Whether the nodes of a Ray cluster do the work."""
        return self.launcher == "ray"

    @property
    def ray_options(self) -> dict[str, Any]:
        """Options of `extract_on_ray` alone."""
        return {"address": self.address, "num_actors": self.num_actors}

    def check(self, num_workers: int | None) -> None:
        """Refuse options that nothing would heed.

        Raises:
            ConfigError: There are some.
        """
        if not self.is_on_ray and any(value is not None for value in self.ray_options.values()):
            raise ConfigError("--ray-address and --num-actors: only with --launcher ray")
        if self.is_on_ray and num_workers is not None:
            raise ConfigError("--num-workers: not with --launcher ray, where all CPUs decode")

    @property
    def folder(self) -> str | None:
        """Where the stores of ranks lie, if there are any."""
        return None if self.is_on_ray else self.staging

    @cached_property
    def share(self) -> RankShare:
        """The share of this process. From now on its lines on standard error name it.

        Raises:
            ConfigError: The options or the launcher's variables make no sense.
        """
        if (self.rank is None) != (self.world_size is None):
            raise ConfigError("--rank and --world-size: give both, or --launcher")
        if self.rank is not None and self.world_size is not None:
            if self.launcher != "none":
                raise ConfigError(f"--rank and --world-size: not with --launcher {self.launcher}")
            share = RankShare(self.rank, self.world_size)
        elif self.is_on_ray:
            return RankShare()
        else:
            share = share_from_environment(self.launcher)
            launcher = launched_by() if self.launcher == "none" else None
            if launcher is not None:
                _logger.warning(
                    "started by %s among others, this process takes all clips; --launcher %s takes "
                    "its share",
                    launcher,
                    launcher,
                )
        if not share.is_all:
            speak_for(str(share))
            if self.staging is None and is_on_several_machines():
                _logger.warning(
                    "there are ranks on other machines, and each machine keeps what its own have "
                    "computed; give --staging, a folder that all see, and merge"
                )
        return share

"""The options of an extraction on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from lmdbcache.errors import ConfigError

__all__ = ["RayChoice"]

_PANEL = "Ray"


@dataclass(frozen=True)
class RayChoice:
    """Which cluster, and how much of it."""

    address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            help="Of the cluster's head, or auto; default: $RAY_ADDRESS, else a cluster that runs "
            "on this machine, else one is started here for the run.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    num_actors: Annotated[
        int | None,
        typer.Option(
            help="Processes that run the model; default: one for each GPU, else for each node.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None

    @property
    def options(self) -> dict[str, Any]:
        """For `extract_on_ray`."""
        return {"address": self.address, "num_actors": self.num_actors}

    def check(self, launcher: str, num_workers: int | None) -> None:
        """Refuse options that nothing would heed.

        Raises:
            ConfigError: There are some.
        """
        given = [name for name, value in self.options.items() if value is not None]
        if launcher != "ray" and given:
            raise ConfigError("--ray-address and --num-actors: only with --launcher ray")
        if launcher == "ray" and num_workers is not None:
            raise ConfigError("--num-workers: not with --launcher ray, where all CPUs decode")

"""The options that stand for a dataset and a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from lmdbcache.datasets.vegas_selection import VEGASSelection
from lmdbcache.embedders.audio_source import AudioSource
from lmdbcache.extraction.samples import clips_of

__all__ = ["DatasetChoice"]


# typer reads these at run time, on Python 3.10, too: hence Optional.
@dataclass(frozen=True)
class DatasetChoice:
    """A dataset, and which of its clips."""

    data_dir: Annotated[Path, typer.Argument(help="Folder with <class>/audios/*.wav.")]
    classes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--class", help="Only this class; may be given several times."),
    ] = None
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--exclude-class", help="Not this class; may be given several times."),
    ] = None
    split: Annotated[str, typer.Option(help="all, train, val or test.")] = "all"
    samples_per_class: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Only the first so many of each class."),
    ] = None
    node_split_id: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Only this node's samples, from 0."),
    ] = None
    num_nodes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Number of nodes that share the samples."),
    ] = None
    samples_per_node: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Samples of each class that a node has."),
    ] = None

    @property
    def namespace(self) -> str:
        """The dataset's name in a config."""
        return VEGASSelection.namespace

    def clips(self) -> list[tuple[str, str | AudioSource]]:
        """(sample id, audio file) of the clips that are chosen.

        Raises:
            DatasetError: The folder or a choice can't be used.
        """
        selection = VEGASSelection(
            self.data_dir,
            selected_classes=self.classes,
            excluded_classes=self.exclude,
            split=self.split,
            num_samples_per_class=self.samples_per_class,
            node_split_id=self.node_split_id,
            num_nodes=self.num_nodes,
            samples_per_node=self.samples_per_node,
        )
        return clips_of(selection.samples)

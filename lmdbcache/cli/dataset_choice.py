"""The options that choose a dataset and a part of it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final

from lmdbcache.audio import AudioSource
from lmdbcache.cache import EmbeddingCache, left_out_counts
from lmdbcache.cli.command import Argument, Option, PathOrUrl
from lmdbcache.cli.options import Decoder
from lmdbcache.config import CacheConfig
from lmdbcache.datasets import (
    NODE_SEED,
    AudioDataset,
    LeftOut,
    Narrowing,
    Sample,
    check_namespace,
    open_dataset,
    sample_id_of,
    split_names,
    split_of,
)
from lmdbcache.errors import DatasetError
from lmdbcache.extraction import to_clips
from lmdbcache.files import is_url, without_secrets

_PART: Final = "Part of the dataset"
_NODES: Final = "Nodes"
_LAYOUT: Final = "Layout"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetChoice:
    """A dataset, and which of its clips."""

    data_dir: Annotated[
        PathOrUrl, Argument(help="The dataset's folder; or a tar shard, or a URL of either.")
    ]
    kind: Annotated[
        str,
        Option(
            "--layout",
            "--dataset",
            help="auto, vegas, esc50, vggsound, folder, huggingface or webdataset; see "
            "docs/datasets.md.",
            panel=_LAYOUT,
        ),
    ] = "auto"
    csv: Annotated[
        Path | None,
        Option(help="VGGSound's table; default: in the folder.", panel=_LAYOUT),
    ] = None
    audio_column: Annotated[
        str | None,
        Option(help="Of a Hugging Face dataset.", panel=_LAYOUT),
    ] = None
    label_column: Annotated[
        str | None,
        Option(help="Of a Hugging Face dataset.", panel=_LAYOUT),
    ] = None
    id_column: Annotated[
        str | None,
        Option(help="Of a Hugging Face dataset.", panel=_LAYOUT),
    ] = None
    given_namespace: Annotated[
        str | None,
        Option(
            "--namespace",
            help="Keeps equal sample ids of two datasets apart; default: the dataset's own, or "
            "made from the folder's name.",
            panel=_LAYOUT,
        ),
    ] = None
    decoder: Decoder = None
    classes: Annotated[
        list[str] | None,
        Option("--class", help="Only this class; may be given several times.", panel=_PART),
    ] = None
    exclude: Annotated[
        list[str] | None,
        Option(
            "--exclude-class",
            help="Not this class; may be given several times.",
            panel=_PART,
        ),
    ] = None
    split: Annotated[str, Option(help="all, train, val or test.", panel=_PART)] = "all"
    split_by: Annotated[
        str,
        Option(
            help="own (the dataset's), folds, ratios (0.7, 0.1, 0.2), or auto: the first that it "
            "has.",
            panel=_PART,
        ),
    ] = "auto"
    split_method: Annotated[
        str,
        Option(
            help="hash, or sklearn: draws ratios and nodes as scikit-learn and NumPy do.",
            panel=_PART,
        ),
    ] = "hash"
    folds: Annotated[
        list[int] | None,
        Option("--fold", help="Only this fold; may be given several times.", panel=_PART),
    ] = None
    samples_per_class: Annotated[
        int | None,
        Option(help="Only the first so many of each class.", panel=_PART),
    ] = None
    node_split_id: Annotated[
        int | None,
        Option(
            help="Only this node's samples, from 0; needs --num-nodes or --samples-per-node.",
            panel=_NODES,
        ),
    ] = None
    num_nodes: Annotated[
        int | None,
        Option(help="Number of nodes that share the samples.", panel=_NODES),
    ] = None
    samples_per_node: Annotated[
        int | None,
        Option(
            help="Samples of each class that a node has; partition also needs --num-nodes.",
            panel=_NODES,
        ),
    ] = None
    node_shares: Annotated[
        str | None,
        Option(help="Each node's share, such as 0.5,0.3,0.2.", panel=_NODES),
    ] = None
    dirichlet: Annotated[
        float | None,
        Option(
            help="Draw each class's shares with this alpha; 0.1 is very uneven.",
            panel=_NODES,
        ),
    ] = None
    min_per_node: Annotated[int, Option(help="Samples that a node has at least.", panel=_NODES)] = 0
    node_seed: Annotated[
        int,
        Option(
            "--node-seed",
            "--seed",
            help="Of the division between nodes; the same on all of them.",
            panel=_NODES,
        ),
    ] = NODE_SEED

    @cached_property
    def opened(self) -> AudioDataset:
        """The whole dataset.

        Raises:
            DatasetError: The folder or an option can't be used.
        """
        return open_dataset(
            self.data_dir,
            self.kind,
            table=self.csv,
            audio_column=self.audio_column,
            label_column=self.label_column,
            id_column=self.id_column,
            namespace=self.given_namespace,
            decoder=self.decoder or "soundfile",
        )

    @property
    def root(self) -> str:
        """The folder's absolute path, or the URL without a password."""
        if is_url(self.data_dir):
            return without_secrets(self.data_dir)
        return os.path.abspath(self.data_dir)  # noqa: PTH100 - a link keeps its name

    @property
    def namespace(self) -> str:
        """The dataset's name in a config."""
        return self.opened.namespace

    @property
    def left_out(self) -> list[LeftOut]:
        """Files and rows of the dataset that are not samples."""
        return list(getattr(self.opened, "left_out", ()))

    @property
    def narrowing(self) -> Narrowing:
        """Which part.

        Raises:
            DatasetError: The shares aren't numbers.
        """
        own = {field.name: getattr(self, field.name) for field in fields(Narrowing)}
        return Narrowing(**{**own, "node_shares": _numbers(self.node_shares)})

    def split_of(self, samples: list[Sample], split: str, node: int | None) -> list[Sample]:
        """The samples of one split, of those of a node or of the whole dataset.

        Raises:
            DatasetError: They can't be divided.
        """
        return split_of(
            samples,
            split,
            self.split_by,
            whole=self.opened.samples,
            split_method=self.split_method,
            node=node,
        )

    def samples(self) -> list[Sample]:
        """The samples that are chosen.

        Raises:
            DatasetError: The folder or a choice can't be used.
        """
        samples = self.narrowing.of(self.opened)
        self._warn_of_left_out()
        return samples

    def _warn_of_left_out(self) -> None:
        if self.left_out:
            _logger.warning(
                "%s; `lmdbcache dataset … --left-out` lists what is left out", self.opened
            )

    @property
    def left_out_counts(self) -> dict[str, Any]:
        """How much is left out, by kind, suffix and class."""
        return left_out_counts(self.left_out)

    def clips(self) -> list[tuple[str, str | AudioSource]]:
        """(sample id, audio file or source) of the clips that are chosen.

        Raises:
            DatasetError: The folder or a choice can't be used.
        """
        return to_clips(self.samples())

    def ids_by_split(self, *, each: bool) -> dict[str, list[str]]:
        """Split → the sample ids that are chosen; of each of the dataset's, or of the one chosen.

        Raises:
            DatasetError: The folder or a choice can't be used.
        """
        names = split_names(self.opened.samples, self.split_by) if each else ()
        parts = {name: replace(self.narrowing, split=name) for name in names or (self.split,)}
        self._warn_of_left_out()
        return {
            name: [sample_id_of(sample) for sample in part.of(self.opened)]
            for name, part in parts.items()
        }

    def check_namespace(self, cache: EmbeddingCache, config: CacheConfig) -> None:
        """Refuse a store that another folder of the same name has filled.

        Raises:
            DatasetError: See `lmdbcache.datasets.namespaces.check_namespace`.
        """
        check_namespace(cache, config, self.opened)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise DatasetError(
            f"node_shares: {text!r}; give numbers with commas between them, such as 0.5,0.3,0.2"
        ) from None

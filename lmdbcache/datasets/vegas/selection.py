"""Which of the VEGAS clips a data set holds: classes, node and split. No torch here."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdbcache.datasets.base import sample_id_of
from lmdbcache.datasets.listed import summary_of
from lmdbcache.datasets.namespaces import chosen_namespace
from lmdbcache.datasets.narrowing import NODE_SEED, SPLIT_SEED, first_of_each_class
from lmdbcache.datasets.reopening import reopening_options
from lmdbcache.datasets.scanning import LeftOut, PassedOver
from lmdbcache.datasets.splits import SPLITS, node_split, normalised_ratios, split_samples
from lmdbcache.datasets.vegas.layout import CLASS_LABELS, NAMESPACE, list_samples, resolve_classes
from lmdbcache.errors import DatasetError
from lmdbcache.files import expand_user

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lmdbcache.datasets.base import Sample

__all__ = ["SelectionMixin", "VEGASSelection", "checked_splits", "split_ratios"]

_logger = logging.getLogger(__name__)


class SelectionMixin:
    """Lists the clips, then narrows them: per class, to this node, to this split.

    Attributes are the arguments of `VEGASDataset` of the same names, `root`, the absolute path of
    `root_dir`, and `left_out`, the audio below it that is passed over.
    """

    root_dir: str
    root: str
    namespace: str = NAMESPACE
    audio_duration: float
    captions: dict[str, Any]
    num_samples_per_class: int | None
    node_split_id: int | None
    num_nodes: int | None
    samples_per_node: int | None
    node_split_seed: int
    split: str
    splits_to_load: list[str] | None
    stratify: bool
    train_ratio: float
    val_ratio: float
    test_ratio: float

    class_labels: Mapping[str, int] = CLASS_LABELS
    decoder: str = "soundfile"
    samples: list[Sample]
    left_out: list[LeftOut]
    active_classes: dict[str, int]
    _node_samples: list[Sample]
    _selected_classes: list[str] | None
    _excluded_classes: list[str] | None

    @property
    def selected_classes(self) -> list[str] | None:
        """Names of the classes to use, None for all; setting it reloads the samples."""
        return self._selected_classes

    @selected_classes.setter
    def selected_classes(self, classes: str | int | Iterable[str | int] | None) -> None:
        self._selected_classes = resolve_classes(classes)
        self._reload()

    @property
    def excluded_classes(self) -> list[str] | None:
        """Names of the classes to leave out; setting it reloads the samples."""
        return self._excluded_classes

    @excluded_classes.setter
    def excluded_classes(self, classes: str | int | Iterable[str | int] | None) -> None:
        self._excluded_classes = resolve_classes(classes)
        self._reload()

    @property
    def sample_ids(self) -> list[str]:
        """`file_id:class` of every sample, in the order of `samples`."""
        return [sample_id_of(sample) for sample in self.samples]

    @property
    def command_line_options(self) -> dict[str, str]:
        """Option → value: how the command line opens the folder, without the selection."""
        namespace = None if self.namespace == NAMESPACE else self.namespace
        return reopening_options(NAMESPACE, namespace, self.decoder)

    def load_samples(self) -> list[Sample]:
        """List the files anew and give the samples of this node and split."""
        return self._of_split(self._of_node(self._list_files()))

    _load_samples = load_samples

    def _reload(self) -> None:
        self.active_classes = {
            name: label
            for name, label in CLASS_LABELS.items()
            if (not self._selected_classes or name in self._selected_classes)
            and name not in (self._excluded_classes or ())
        }
        self._node_samples = self._of_node(self._list_files())
        self.samples = self._of_split(self._node_samples)
        for part in self._parts():
            part._selected_classes = self._selected_classes  # noqa: SLF001
            part._excluded_classes = self._excluded_classes  # noqa: SLF001
            part.active_classes = self.active_classes
            part.samples = part._of_split(self._node_samples)  # noqa: SLF001
        _logger.info(
            "VEGAS: %d samples, split %s, classes %s",
            len(self.samples),
            self.split,
            ", ".join(self.active_classes),
        )

    def _list_files(self) -> list[Sample]:
        passed_over = PassedOver(self.decoder)
        samples = list_samples(
            Path(self.root),
            self.active_classes,
            audio_duration=self.audio_duration,
            captions=self.captions,
            leave_out=passed_over,
        )
        self.left_out = passed_over.items
        if self.samples_per_node is not None:
            return samples
        return first_of_each_class(samples, self.num_samples_per_class)

    def _of_node(self, samples: list[Sample]) -> list[Sample]:
        divided = self.num_nodes is not None or self.samples_per_node is not None
        if self.node_split_id is None or not divided:
            return samples
        return node_split(
            samples, self.node_split_id, self.num_nodes, self.samples_per_node, self.node_split_seed
        )

    def _of_split(self, samples: list[Sample]) -> list[Sample]:
        wanted = [self.split] if self.splits_to_load is None else self.splits_to_load
        if "all" in wanted:
            return list(samples)
        ratios = (self.train_ratio, self.val_ratio, self.test_ratio)
        found: list[Sample] = []
        for split in SPLITS:
            if split in wanted:
                found += split_samples(
                    samples, split, *ratios, stratify=self.stratify, seed=SPLIT_SEED
                )
        return found

    def _make_parts(self) -> None:
        parts = {}
        for split in SPLITS:
            part = copy.copy(self)
            part.split = split
            if self.splits_to_load is not None:
                listed = split in self.splits_to_load or "all" in self.splits_to_load
                part.splits_to_load = [split] if listed else []
            part.samples = part._of_split(self._node_samples)  # noqa: SLF001
            parts[split] = part
        self.train, self.val, self.test = parts.values()

    def _parts(self) -> list[Any]:
        return [vars(self)[split] for split in SPLITS if split in vars(self)]


class VEGASSelection(SelectionMixin):
    """The clips of a selection alone: what listing and extracting need, without torch.

    Args:
        root_dir: Folder with `<class>/audios/*.wav`.
        selected_classes: Names or labels; None for all.
        excluded_classes: Names or labels to leave out.
        split: `"train"`, `"val"`, `"test"` or `"all"`, by the ratios 0.7, 0.1 and 0.2.
        num_samples_per_class: Use the first samples of each class only.
        node_split_id: This node, from 0.
        num_nodes: Divide every class between so many nodes.
        samples_per_node: Samples of each class that a node has.
        namespace: Another name than `vegas`.
        decoder: What the clips are to be decoded by: files that it doesn't read are left out.

    Raises:
        DatasetError: The folder or an argument can't be used.
    """

    kind = "vegas"

    def __init__(
        self,
        root_dir: str | Path,
        *,
        selected_classes: Iterable[str | int] | None = None,
        excluded_classes: Iterable[str | int] | None = None,
        split: str | None = None,
        num_samples_per_class: int | None = None,
        node_split_id: int | None = None,
        num_nodes: int | None = None,
        samples_per_node: int | None = None,
        namespace: str | None = None,
        decoder: str = "soundfile",
    ) -> None:
        self.decoder = decoder
        self.root_dir = str(expand_user(root_dir))
        self.root = str(Path(self.root_dir).absolute())
        if namespace is not None:
            self.namespace = chosen_namespace(namespace, self.kind)
        self.split, self.splits_to_load = checked_splits(split, None)
        self.stratify, self.node_split_seed = True, NODE_SEED
        self.train_ratio, self.val_ratio, self.test_ratio = 0.7, 0.1, 0.2
        self.num_samples_per_class = num_samples_per_class
        self.node_split_id, self.num_nodes = node_split_id, num_nodes
        self.samples_per_node = samples_per_node
        self.audio_duration, self.captions = 0.0, {}
        self._selected_classes = resolve_classes(selected_classes)
        self._excluded_classes = resolve_classes(excluded_classes)
        self._reload()

    def __str__(self) -> str:
        counted = {sample["class_name"] for sample in self.samples}
        text = (
            f"{self.kind}: {len(self.samples)} clips of {len(counted)} classes in {self.root_dir}"
        )
        return f"{text}; {summary_of(self.left_out)}" if self.left_out else text


def checked_splits(
    split: str | None, splits_to_load: Sequence[str] | None
) -> tuple[str, list[str] | None]:
    """Check the names of splits; no split means all samples.

    Raises:
        DatasetError: A name isn't one of a split.
    """
    for name in [split or "all", *(splits_to_load or ())]:
        if name not in (*SPLITS, "all"):
            raise DatasetError(f"split: {name!r}; use 'train', 'val', 'test' or 'all'")
    return split or "all", None if splits_to_load is None else list(splits_to_load)


def split_ratios(
    train: float, val: float, test: float, split_ratio: float | None
) -> tuple[float, float, float]:
    """The ratios of train, val and test, normalised; `split_ratio` overrides the first and last.

    Raises:
        DatasetError: Ratios that are negative or all zero.
    """
    if split_ratio is None:
        return normalised_ratios(train, val, test)
    _logger.warning("split_ratio is deprecated; use train_ratio, val_ratio and test_ratio")
    return normalised_ratios(split_ratio * (1 - val), split_ratio * val, 1 - split_ratio)

"""VEGAS: clips of ten classes, with their cached embeddings, for a training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, Subset

from lmdbcache.datasets.ast_cached.base import WITHOUT_EFFECT, ASTCachedDataset
from lmdbcache.datasets.ast_cached.items import vegas_collate_fn
from lmdbcache.datasets.base import ListedDataset
from lmdbcache.datasets.vegas import CLASS_LABELS, LABEL_TO_CLASS, NAMESPACE, VEGASFolder

_vegas_collate_fn = vegas_collate_fn  # the name by which older scripts import it


class VEGASDataset(ASTCachedDataset):
    """The VEGAS clips under a folder, `<root_dir>/<class>/audios/video_00001.wav`.

    A sample needs its audio file only. Labels are those of `CLASS_LABELS` under any selection.
    Arguments, items and errors are those of the base class. `use_folds` and the folds are accepted
    without effect: VEGAS has no folds.
    """

    CLASS_LABELS = CLASS_LABELS
    LABEL_TO_CLASS = LABEL_TO_CLASS

    namespace = NAMESPACE
    class_labels: Mapping[str, int] = CLASS_LABELS
    _without_effect: ClassVar[Mapping[str, Any]] = {
        **WITHOUT_EFFECT,
        "use_folds": False,
        "train_folds": None,
        "val_folds": None,
        "test_folds": None,
    }

    def _list_clips(self) -> ListedDataset:
        return VEGASFolder(self.root, classes=list(self.active_classes))


def create_vegas_dataloader(
    dataset: ASTCachedDataset | Subset[dict[str, Any]],
    batch_size: int = 32,
    shuffle: bool = True,  # noqa: FBT001, FBT002
    num_workers: int = 4,
    pin_memory: bool | None = None,  # noqa: FBT001
    **options: Any,
) -> DataLoader[Mapping[str, Any]]:
    """Return a `DataLoader` over a dataset.

    Args:
        dataset: The dataset, or a `Subset` of it.
        batch_size: Items per batch.
        shuffle: Another order in every epoch.
        num_workers: Worker processes.
        pin_memory: Batches in page-locked memory; None means if there is a CUDA device.
        options: Further arguments of `DataLoader`.
    """
    whole: Any = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    if "collate_fn" not in options:
        given = getattr(whole, "get_collate_fn", None)
        options["collate_fn"] = vegas_collate_fn if given is None else given()
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        **options,
    )

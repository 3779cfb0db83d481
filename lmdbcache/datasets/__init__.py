"""Data sets of audio clips, ready for extraction and for a training loop.

Names load on first use, so that `lmdbcache.datasets.base` and `.splits` stay free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdbcache.datasets.base import AudioDataset, sample_id_of
    from lmdbcache.datasets.cached_audio import CachedAudioDataset, collate_mixed
    from lmdbcache.datasets.narrowing import Narrowing
    from lmdbcache.datasets.opening import open_dataset
    from lmdbcache.datasets.overlaps import overlap_audit
    from lmdbcache.datasets.partitions import partition_samples
    from lmdbcache.datasets.splits import node_split, split_samples
    from lmdbcache.datasets.vegas import VEGASDataset
    from lmdbcache.datasets.vegas_collate import create_vegas_dataloader, vegas_collate_fn

__all__ = [
    "AudioDataset",
    "CachedAudioDataset",
    "Narrowing",
    "VEGASDataset",
    "collate_mixed",
    "create_vegas_dataloader",
    "node_split",
    "open_dataset",
    "overlap_audit",
    "partition_samples",
    "sample_id_of",
    "split_samples",
    "vegas_collate_fn",
]

_HOMES = {
    "AudioDataset": "base",
    "CachedAudioDataset": "cached_audio",
    "Narrowing": "narrowing",
    "VEGASDataset": "vegas",
    "collate_mixed": "cached_audio",
    "create_vegas_dataloader": "vegas_collate",
    "node_split": "splits",
    "open_dataset": "opening",
    "overlap_audit": "overlaps",
    "partition_samples": "partitions",
    "sample_id_of": "base",
    "split_samples": "splits",
    "vegas_collate_fn": "vegas_collate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

"""From a list of VEGAS items to one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, default_collate

from lmdbcache.datasets.vegas.deferred import DeferredAudio, DeferredStack, LazyDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmdbcache.datasets.vegas.dataset import VEGASDataset

__all__ = ["create_vegas_dataloader", "vegas_collate_fn"]

_METADATA = {
    "class_names": "class_name",
    "video_ids": "video_id",
    "file_ids": "file_id",
    "sample_indices": "sample_idx",
    "ytids": "ytid",
    "start_seconds": "start_second",
    "end_seconds": "end_second",
    "captions": "caption",
}

Item = dict[str, Any]


def vegas_collate_fn(batch: Sequence[Item]) -> dict[str, Any]:
    """Make one batch of items of a `VEGASDataset`.

    Args:
        batch: Items; they needn't all have the same keys.

    Returns:
        A dict with

        - `labels`: int64 (batch,);
        - `audio`: (batch, num_samples), if every item has it. While it holds clips whose embedding
          was cached, it is decoded on first access;
        - `audio_num_valid`: int64 (misses,), samples of `audio` that aren't padding, of the items
          without a cached embedding;
        - `audio_emb`: (hits, *embedding_shape) of the items that have one, in their order, and
          `audio_emb_mask`: bool (batch,), which items those are. Where all have one, `audio_emb`
          is (batch, *embedding_shape);
        - `image` and `image_mask`: likewise;
        - `video`: (batch, frames, 3, height, width), shorter ones repeat their last frame, absent
          ones are zeros, and `video_mask`: bool (batch,); both None where no item has a video;
        - `text_emb`: stacked, if every item has one;
        - `metadata`: dict of lists; `class_name`, `file_id`, `audio_filename`: lists.
    """
    output = LazyDict(labels=torch.stack([item["label"] for item in batch]))
    if all("audio" in item for item in batch):
        output["audio"] = _stack_audio(batch)
        if any("audio_num_valid" in item for item in batch):
            output["audio_num_valid"] = torch.stack(
                [item["audio_num_valid"] for item in batch if "audio_num_valid" in item]
            )
    for key in ("image", "audio_emb"):
        if any(key in item for item in batch):
            output[key] = torch.stack([item[key] for item in batch if key in item])
            output[f"{key}_mask"] = torch.tensor([key in item for item in batch])
    if all("text_emb" in item for item in batch):
        output["text_emb"] = default_collate([item["text_emb"] for item in batch])
    if any("video" in item for item in batch):
        output["video"], output["video_mask"] = _stack_videos([item.get("video") for item in batch])
    metadata = {name: [item.get(key, "") for item in batch] for name, key in _METADATA.items()}
    output["metadata"] = metadata
    output["class_name"] = metadata["class_names"]
    output["file_id"] = metadata["file_ids"]
    output["audio_filename"] = [item["audio_filename"] for item in batch]
    return output


def _stack_audio(batch: Sequence[Item]) -> torch.Tensor | DeferredStack:
    parts = tuple(
        item.peek("audio") if isinstance(item, LazyDict) else item["audio"] for item in batch
    )
    if any(isinstance(part, DeferredAudio) for part in parts):
        return DeferredStack(parts)
    return torch.stack(parts)


def _stack_videos(
    videos: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    present = [video for video in videos if video is not None]
    if not present:
        return None, None
    longest = max(present, key=len)
    rows = [torch.zeros_like(longest) if video is None else video for video in videos]
    padded = [
        torch.cat([row, row[-1:].repeat(len(longest) - len(row), *[1] * (row.dim() - 1))])
        for row in rows
    ]
    return torch.stack(padded), torch.tensor([video is not None for video in videos])


def create_vegas_dataloader(
    dataset: VEGASDataset,
    batch_size: int = 32,
    shuffle: bool = True,  # noqa: FBT001, FBT002
    num_workers: int = 4,
    pin_memory: bool | None = None,  # noqa: FBT001
    **options: Any,
) -> DataLoader[Mapping[str, Any]]:
    """A `DataLoader` over a VEGAS data set.

    Args:
        dataset: The data set.
        batch_size: Items per batch.
        shuffle: Another order in every epoch.
        num_workers: Worker processes.
        pin_memory: Batches in page-locked memory; None means if there is a CUDA device.
        options: Further arguments of `DataLoader`.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        collate_fn=options.pop("collate_fn", vegas_collate_fn),
        **options,
    )

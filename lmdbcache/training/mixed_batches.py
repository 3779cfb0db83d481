"""Batches of which a part is cached: embeddings of the hits, inputs of the misses.

Two conventions: that of `collate_mixed` (`mask`, `embeddings`, `waveforms` with `num_valid`, or
`features`) and that of VEGAS (`audio_emb`, `audio_emb_mask`, `audio` with `audio_num_valid`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lmdbcache.errors import ConfigError
from lmdbcache.storage import join_sample_id

__all__ = ["MixedBatch"]


@dataclass
class MixedBatch:
    """A batch in one form.

    Args:
        sample_ids: Of all samples, in order.
        mask: `(batch,)` bool, True for a hit.
        embeddings: `(hits, *embedding_shape)`, or None.
        inputs: Of the misses, in order: a tensor or a list of tensors; None if it has none.
        are_features: Whether these have been through the front end.
        num_valid: `(misses,)` int64, how many samples of each waveform aren't padding; None if
            the batch doesn't tell.
    """

    sample_ids: list[str]
    mask: torch.Tensor
    embeddings: torch.Tensor | None
    inputs: Any
    are_features: bool
    num_valid: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> MixedBatch:
        """Understand either convention; no promise in the batch is kept that isn't needed.

        Raises:
            ConfigError: It follows neither.
        """
        if "mask" in batch and "sample_ids" in batch:
            name = "features" if "features" in batch else "waveforms"
            return cls(
                sample_ids=list(batch["sample_ids"]),
                mask=batch["mask"],
                embeddings=batch.get("embeddings"),
                inputs=batch.get(name),
                are_features=name == "features",
                num_valid=batch.get("num_valid"),
            )
        if "file_id" in batch and "class_name" in batch:
            return _of_vegas(batch)
        raise ConfigError(
            f"batch: it has {', '.join(sorted(map(str, batch)))}; expected one of collate_mixed "
            "(mask, sample_ids) or of a VEGASDataset's collate function (file_id, class_name)"
        )

    @property
    def missing_ids(self) -> list[str]:
        """Sample ids of the misses, in order."""
        is_hit = self.mask.tolist()
        return [i for i, hit in zip(self.sample_ids, is_hit, strict=True) if not hit]

    def completed(self, computed: torch.Tensor) -> torch.Tensor:
        """The whole batch in order, given the embeddings of the misses."""
        if self.embeddings is None:
            return computed
        mask = self.mask.to(computed.device)
        whole = computed.new_empty((len(mask), *computed.shape[1:]))
        whole[mask] = self.embeddings.to(computed)
        whole[~mask] = computed
        return whole


def _of_vegas(batch: Mapping[str, Any]) -> MixedBatch:
    names = zip(batch["file_id"], batch["class_name"], strict=True)
    sample_ids = [join_sample_id(file_id, class_name) for file_id, class_name in names]
    mask = batch.get("audio_emb_mask")
    if mask is None:
        mask = torch.zeros(len(sample_ids), dtype=torch.bool)
    inputs = None
    if "audio" in batch and not mask.all():
        # A hit's waveform isn't decoded yet, and needn't be: look at it as it is.
        peek = getattr(batch, "peek", batch.__getitem__)
        waveforms = peek("audio")
        rows = getattr(waveforms, "parts", waveforms)
        inputs = [rows[position] for position in torch.nonzero(~mask).flatten().tolist()]
    return MixedBatch(
        sample_ids,
        mask,
        batch.get("audio_emb"),
        inputs,
        are_features=False,
        num_valid=batch.get("audio_num_valid"),
    )

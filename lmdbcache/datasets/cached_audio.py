"""Any audio data set with its cached embeddings: hits without decoding, waveforms of the misses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from lmdbcache.audio import decoder_of, load_clip, shown
from lmdbcache.cache import ClipFailure, EmbeddingCache
from lmdbcache.datasets.base import AudioDataset, sample_id_of, source_of
from lmdbcache.embedders import clip_features
from lmdbcache.errors import AudioDecodeError, ConfigError, SampleNotFoundError
from lmdbcache.training import StoredEmbeddings, Targets, as_tensor, target_tensor

if TYPE_CHECKING:
    from lmdbcache.config import CacheConfig

__all__ = ["CachedAudioDataset", "collate_mixed"]

OnDecodeError = Literal["raise", "skip"]


class CachedAudioDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The clips of a data set: the embedding where one is cached, else the waveform.

    An item is a dict with `sample_id`, `label` and

    - `embedding`, `(*embedding_shape)` in the stored dtype, where one is cached: nothing is
      decoded;
    - else `waveform`, float32 `(num_samples,)`, or `features` with a front end, and `num_valid`,
      int64: how many samples of the waveform came from the clip, the rest is padding;
    - or `failure`, a `ClipFailure`, for a clip that can't be decoded (`on_decode_error="skip"`).

    Batches of both kinds are made by `collate_mixed` and completed by `CachedEncoder.complete`.
    Embeddings that are committed meanwhile, by any process, are found. Works with any
    `num_workers` and start method.

    Args:
        dataset: The clips: files, or whatever else their `audio_source` opens.
        cache: The cache, or its root; nothing needs to be stored yet.
        config: Identity of the embeddings; clips are decoded with its sample rate and duration.
        front_end: Waveform → features, computed where the clip is decoded; for a model known by
            its name or folder, `encoder.front_end`.
        on_decode_error: For a clip that gives no usable waveform: `"raise"`, or `"skip"` leaves it
            out of its batch, with the reason in the batch's `failures`. It is never cached.
        labels: As for `EmbeddingDataset`; None takes the samples' `target`, else `class_label`.

    Raises:
        ConfigError: An unknown `on_decode_error`, or labels that can't be one tensor.
        MissingLabelError: A sample has no label.
        InvalidSampleIdError: A clip's sample id can't be stored.
    """

    def __init__(
        self,
        dataset: AudioDataset,
        cache: EmbeddingCache | str | os.PathLike[str],
        config: CacheConfig,
        *,
        front_end: Callable[[Any], Any] | None = None,
        on_decode_error: OnDecodeError = "raise",
        labels: Targets | None = None,
    ) -> None:
        if on_decode_error not in ("raise", "skip"):
            raise ConfigError(f"on_decode_error: {on_decode_error!r}; known are 'raise', 'skip'")
        self.dataset: Final = dataset
        self.config: Final = config
        self.front_end: Final = front_end
        self.on_decode_error: Final[OnDecodeError] = on_decode_error
        self.sample_ids: Final = [sample_id_of(sample) for sample in dataset.samples]
        if labels is None:
            labels = [sample.get("target", sample["class_label"]) for sample in dataset.samples]
        self.labels: Final = target_tensor(self.sample_ids, labels)
        self._stored = StoredEmbeddings(
            cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache), config
        )

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One item; see the class.

        Raises:
            AudioDecodeError: No embedding is cached and the clip gives no usable waveform.
        """
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several items; the cached ones are fetched in one call."""
        indices = [int(index) for index in indices]
        hits, is_hit = self._stored.find([self.sample_ids[index] for index in indices])
        embeddings = None if hits is None else as_tensor(hits)
        rows = iter(()) if embeddings is None else iter(embeddings.unbind(0))
        items = _Items(
            self._item(index, {"embedding": next(rows)} if hit else None)
            for index, hit in zip(indices, is_hit.tolist(), strict=True)
        )
        items.embeddings = embeddings
        return items

    def close(self) -> None:
        """Give back the store; the next item opens it again."""
        self._stored.close()

    def _item(self, index: int, hit: dict[str, Any] | None) -> dict[str, Any]:
        item = _Item(sample_id=self.sample_ids[index], label=self.labels[index])
        item.update(self._decoded(index) if hit is None else hit)
        return item

    def _decoded(self, index: int) -> dict[str, Any]:
        source, rate = source_of(self.dataset.samples[index]), self.config.sample_rate
        try:
            waveform, num_valid, _ = load_clip(
                source, rate, self.config.duration, decoder_of(self.config.front_end)
            )
            if self.front_end is None:
                found = {"waveform": torch.from_numpy(waveform)}
            else:
                features = clip_features(
                    self.front_end, waveform, num_valid, sample_rate=rate, name=shown(source)
                )
                found = {"features": torch.as_tensor(features)}
        except AudioDecodeError as error:
            if self.on_decode_error == "raise":
                raise
            return {"failure": ClipFailure(self.sample_ids[index], str(source), str(error))}
        return {**found, "num_valid": torch.tensor(num_valid, dtype=torch.long)}


class _Items(list[dict[str, Any]]):
    """Items with the embeddings of the hits among them, stacked already."""

    embeddings: torch.Tensor | None = None


class _Item(dict[str, Any]):
    """An item that says what to do where torch's default collate looks for what it hasn't."""

    def __missing__(self, key: str) -> Any:
        if key not in ("embedding", "waveform", "features", "num_valid"):
            raise KeyError(key)
        raise SampleNotFoundError(
            f"{super().__getitem__('sample_id')} has no {key!r} but {', '.join(self)}: some "
            "samples are cached and some aren't. Use DataLoader(..., collate_fn=collate_mixed)"
        )


def collate_mixed(items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Make one batch of items of a `CachedAudioDataset`; the `collate_fn` for its DataLoader.

    Args:
        items: In the order of the batch.

    Returns:
        A dict with

        - `sample_ids`: list of the samples, in order, without those that failed;
        - `labels`: `(batch, *label_shape)`, int64 `(batch,)` for labels by class;
        - `mask`: bool `(batch,)`, True where an embedding was cached;
        - `embeddings`: `(hits, *embedding_shape)` of these, in order, if there are any;
        - `waveforms`: float32 `(misses, num_samples)`, or `features`, of the others, in order, if
          there are any; features whose shapes differ are a list of tensors;
        - `num_valid`: int64 `(misses,)`, how many samples of each waveform came from the clip;
        - `failures`: list of `ClipFailure`: clips that were left out.
    """
    fetched = items.embeddings if isinstance(items, _Items) else None
    items = list(items)
    usable = [item for item in items if "failure" not in item]
    batch: dict[str, Any] = {
        "sample_ids": [item["sample_id"] for item in usable],
        "labels": target_tensor(
            [item["sample_id"] for item in usable], [item["label"] for item in usable]
        ),
        "mask": torch.tensor(["embedding" in item for item in usable], dtype=torch.bool),
        "failures": [item["failure"] for item in items if "failure" in item],
    }
    for name, key in (
        ("embeddings", "embedding"),
        ("waveforms", "waveform"),
        ("features", "features"),
        ("num_valid", "num_valid"),
    ):
        rows = [item[key] for item in usable if key in item]
        if rows:
            stacked = fetched if name == "embeddings" and fetched is not None else None
            is_ragged = name == "features" and len({(row.dtype, row.shape) for row in rows}) > 1
            batch[name] = rows if is_ragged else torch.stack(rows) if stacked is None else stacked
    return batch

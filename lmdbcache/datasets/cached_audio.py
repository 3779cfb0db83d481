"""Any audio dataset with its cached embeddings: hits without decoding, waveforms of the misses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal

import torch

from lmdbcache.audio import decoder_of, load_clip, shown
from lmdbcache.cache import ClipFailure, EmbeddingCache
from lmdbcache.config import CacheConfig
from lmdbcache.datasets.base import AudioDataset, sample_id_of, source_of
from lmdbcache.datasets.batches import Column, FetchedItems, column, stacked
from lmdbcache.embedders import clip_features
from lmdbcache.errors import (
    AudioDecodeError,
    CacheNotFoundError,
    ConfigError,
    SampleNotFoundError,
)
from lmdbcache.storage import Selection
from lmdbcache.training import StoredEmbeddings, Targets, as_tensor, target_tensor

OnDecodeError = Literal["raise", "skip"]


class CachedAudioDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The clips of a dataset: the embedding where one is cached, else the waveform.

    An item is a dict with `sample_id`, `label` and

    - `embedding`, `(*embedding_shape)` in the stored dtype, where one is cached: nothing is
      decoded;
    - else `waveform`, float32 `(num_samples,)`, or `features` with a front end, and `num_valid`,
      int64: how many samples of the waveform came from the clip, the rest is padding;
    - or `failure`, a `ClipFailure`, for a clip that can't be decoded (`on_decode_error="skip"`).

    Batches of both kinds are made by `collate_mixed` and completed by `CachedEncoder.complete`.
    Embeddings that any process commits later are found. Works with any `num_workers` and start
    method.

    Args:
        cache: The cache, or its root; nothing needs to be stored yet.
        config: Identity of the embeddings; clips are decoded with its sample rate and duration.
        dataset: The clips: files, or whatever else their `audio_source` opens.
        front_end: Waveform → features, computed where the clip is decoded; for a model known by
            its name or folder, `encoder.front_end`.
        on_decode_error: For a clip that gives no usable waveform: `"raise"`, or `"skip"` leaves it
            out of its batch, with the reason in the batch's `failures`. It is never cached.
        labels: As for `EmbeddingDataset`; None takes the samples' `target`, else `class_label`.

    Raises:
        ConfigError: An unknown `on_decode_error`, labels that can't be one tensor, or a config
            with windows.
        MissingLabelError: A sample has no label.
        InvalidSampleIdError: A clip's sample id can't be stored.
    """

    def __init__(
        self,
        cache: EmbeddingCache | str | os.PathLike[str],
        config: CacheConfig,
        dataset: AudioDataset,
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
        self._selection: Selection | None = None
        self._are_all_stored = True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_selection": None}

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One item; see the class.

        Raises:
            AudioDecodeError: No embedding is cached and the clip gives no usable waveform.
        """
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        """Several items; the cached ones are fetched in one call."""
        indices = [int(index) for index in indices]
        hits, is_hit = self._find(indices)
        everything = [True] * len(indices)
        columns: dict[str, Column] = {
            "sample_id": ([self.sample_ids[index] for index in indices], everything),
            "label": (self.labels[indices], everything),
            "embedding": ([] if hits is None else hits, is_hit),
        }
        if not all(is_hit):
            decoded = [
                {} if hit else self._decoded(index)
                for index, hit in zip(indices, is_hit, strict=True)
            ]
            keys = ("waveform", "features", "num_valid", "failure")
            columns |= {key: column(decoded, key) for key in keys}
        return FetchedItems(columns=columns, kind=_Item)

    def close(self) -> None:
        """Give back the store; the next item opens it again."""
        self._selection = None
        self._stored.close()

    def _find(self, indices: list[int]) -> tuple[torch.Tensor | None, list[bool]]:
        """The stored embeddings of these samples, and which samples have one."""
        # By position where the last batch was complete: looked up once, not in every batch. New
        # commits would have all samples looked up again.
        are_refused = False
        if self._are_all_stored and (reader := self._stored.reader()) is not None:
            if self._selection is None or self._selection.reader is not reader:
                self._selection = reader.select(self.sample_ids)
            try:
                return as_tensor(self._selection.get_batch(indices)), [True] * len(indices)
            except SampleNotFoundError:
                are_refused = True
            except CacheNotFoundError:
                pass
        sample_ids = [self.sample_ids[index] for index in indices]
        hits, found = self._stored.find(sample_ids, are_refused=are_refused)
        is_hit: list[bool] = found.tolist()
        self._are_all_stored = all(is_hit)
        return None if hits is None else as_tensor(hits), is_hit

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


class _Item(dict[str, Any]):
    """An item that says what to do where torch's default collate looks for a key it lacks."""

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
    items = items if isinstance(items, FetchedItems) else list(items)
    failures, has_failed = column(items, "failure")
    if any(has_failed):
        items = [item for item, failed in zip(items, has_failed, strict=True) if not failed]
    sample_ids = list(column(items, "sample_id")[0])
    labels, _ = column(items, "label")
    _, is_cached = column(items, "embedding")
    batch: dict[str, Any] = {
        "sample_ids": sample_ids,
        "labels": labels if isinstance(labels, torch.Tensor) else target_tensor(sample_ids, labels),
        "mask": torch.tensor(is_cached, dtype=torch.bool),
        "failures": list(failures),
    }
    for name, key in (
        ("embeddings", "embedding"),
        ("waveforms", "waveform"),
        ("features", "features"),
        ("num_valid", "num_valid"),
    ):
        rows, has_key = column(items, key)
        if any(has_key):
            is_ragged = name == "features" and len({(row.dtype, row.shape) for row in rows}) > 1
            batch[name] = rows if is_ragged else stacked(rows)
    return batch

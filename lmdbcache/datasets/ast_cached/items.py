"""Items of a `VEGASDataset` and batches of them, with waveforms that are decoded when read.

A clip whose embedding is cached seldom needs its waveform, and decoding it would cost more than
everything else about the item. So a hit's `"audio"` is deferred until it is first read.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from lmdbcache.audio import load_clip
from lmdbcache.datasets.batches import column, stacked

if TYPE_CHECKING:
    from collections.abc import Callable, ItemsView, Iterable, Iterator, Sequence, ValuesView

__all__ = ["DeferredAudio", "DeferredStack", "LazyDict", "vegas_collate_fn"]


@dataclass(slots=True)  # not frozen: one is made for each item, in half the time
class DeferredAudio:
    """A clip's waveform that isn't decoded yet; calling it decodes.

    Args:
        path: Audio file.
        sample_rate: Of the result, in Hz.
        duration: Length that the clip is cut or zero-padded to, in seconds.
        transform: Applied to the waveform (1, num_samples).
    """

    path: str
    sample_rate: int
    duration: float
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self) -> torch.Tensor:
        """Return the waveform, float32 (num_samples,), or the transform's result.

        Raises:
            AudioDecodeError: The file gives no usable waveform.
        """
        return self.decode()[0]

    def decode(self) -> tuple[torch.Tensor, int | None]:
        """Return the same, and how many samples aren't padding; None if a transform changed it."""
        samples, num_valid, _ = load_clip(self.path, self.sample_rate, self.duration)
        waveform = torch.from_numpy(samples).unsqueeze(0)
        if self.transform is None:
            return waveform.squeeze(0), num_valid
        return self.transform(waveform).squeeze(0), None

    def can_travel(self) -> bool:
        """Return whether another process can decode it."""
        if self.transform is None:
            return True
        try:
            pickle.dumps(self.transform)
        except (pickle.PicklingError, AttributeError, TypeError):
            return False
        return True


@dataclass(frozen=True)
class DeferredStack:
    """The waveforms of a batch, not all decoded yet; calling it stacks them, (batch, …)."""

    parts: tuple[torch.Tensor | DeferredAudio, ...]

    def __call__(self) -> torch.Tensor:
        """Return all waveforms, stacked."""
        return torch.stack([part() if callable(part) else part for part in self.parts])

    def can_travel(self) -> bool:
        """Return whether another process can decode it."""
        # The clips of a batch share one transform.
        first = next(part for part in self.parts if isinstance(part, DeferredAudio))
        return first.can_travel()


_DEFERRED = (DeferredAudio, DeferredStack)


class LazyDict(dict[str, Any]):
    """A dict that decodes its `DeferredAudio` and `DeferredStack` values when they are read.

    Whatever reads a value (`[]`, `get`, `items`, `values`, `dict(item)`, `==`, …) sees the real
    tensor; `in`, `len` and `keys` decode nothing. A copy, and what arrives in another process,
    still decodes on first access.
    """

    def is_deferred(self, key: str) -> bool:
        """Return whether this value is deferred."""
        return isinstance(super().get(key), _DEFERRED)

    def peek(self, key: str) -> Any:
        """Return the value as it is, also a deferred one."""
        return super().__getitem__(key)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, _DEFERRED):
            value = value()
            self[key] = value
        return value

    def __iter__(self) -> Iterator[str]:
        # With its own __iter__, dict(item) and {**item} go through __getitem__.
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value, or the default."""
        return self[key] if key in self else default  # noqa: SIM401

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """Return all pairs, decoded."""
        self._decode_all()
        return super().items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """Return all values, decoded."""
        self._decode_all()
        return super().values()

    def pop(self, key: str, *default: Any) -> Any:
        """Remove a key and return its value."""
        if key in self:
            self[key]
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        """Remove the last pair and return it."""
        key = next(reversed(self))
        return key, self.pop(key)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value; without one, store the default."""
        if key not in self:
            self[key] = default
        return self[key]

    def copy(self) -> LazyDict:
        """Return a shallow copy; deferred values stay deferred."""
        return LazyDict(self._pairs())

    def __copy__(self) -> LazyDict:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyDict:
        return LazyDict((key, copy.deepcopy(value, memo)) for key, value in self._pairs())

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def __eq__(self, other: object) -> bool:
        return dict(self) == other

    __hash__ = None  # as of any dict

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        pairs = [
            (key, value() if isinstance(value, _DEFERRED) and not value.can_travel() else value)
            for key, value in self._pairs()
        ]
        return (LazyDict, (pairs,)) if any(map(self.is_deferred, self)) else (dict, (pairs,))

    def pin_memory(self) -> LazyDict:
        """Return a copy with its tensors in page-locked memory; deferred values stay deferred."""
        return LazyDict(
            (key, value if isinstance(value, _DEFERRED) else _pinned(value))
            for key, value in self._pairs()
        )

    def _decode_all(self) -> None:
        for key in self:
            self[key]

    def _pairs(self) -> Iterable[tuple[str, Any]]:
        return list(super().items())


def _pinned(value: Any) -> Any:
    return pin_memory(value)  # type: ignore[no-untyped-call]


# ---- batches

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
    labels, _ = column(batch, "label")
    output = LazyDict(labels=stacked(labels))
    waveforms, has_audio = column(batch, "audio")
    if all(has_audio):
        is_deferred = any(isinstance(one, DeferredAudio) for one in waveforms)
        output["audio"] = DeferredStack(tuple(waveforms)) if is_deferred else stacked(waveforms)
        num_valid, have_num_valid = column(batch, "audio_num_valid")
        if any(have_num_valid):
            output["audio_num_valid"] = stacked(num_valid)
    for key in ("image", "audio_emb"):
        tensors, has_key = column(batch, key)
        if any(has_key):
            output[key] = stacked(tensors)
            output[f"{key}_mask"] = torch.tensor(has_key)
    texts, has_text = column(batch, "text_emb")
    if all(has_text):
        output["text_emb"] = default_collate(list(texts))
    if any(column(batch, "video")[1]):
        output["video"], output["video_mask"] = _stack_videos(_filled(batch, "video", None))
    output["metadata"] = {name: _filled(batch, key, "") for name, key in _METADATA.items()}
    output["class_name"] = output["metadata"]["class_names"]
    output["file_id"] = output["metadata"]["file_ids"]
    output["audio_filename"] = _filled(batch, "audio_filename", "")
    return output


def _filled(batch: Sequence[Item], key: str, default: Any) -> list[Any]:
    """Return a value for each item."""
    values, has_key = column(batch, key)
    rows = iter(values)
    return [next(rows) if has else default for has in has_key] if not all(has_key) else list(values)


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

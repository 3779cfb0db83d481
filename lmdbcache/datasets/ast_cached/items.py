"""Items of a `VEGASDataset` and batches of them, with waveforms that are decoded when read.

A clip whose embedding is cached seldom needs its waveform, and decoding it would cost more than
everything else about the item. So a hit's `"audio"` is deferred until it is first read.
"""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from collections.abc import Callable, ItemsView, Iterable, Iterator, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch.utils.data._utils.pin_memory import pin_memory

from lmdbcache.audio import load_clip
from lmdbcache.datasets.batches import column, stacked
from lmdbcache.errors import DatasetError


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
        return torch.stack([waveform for waveform, _ in self.decoded])

    @functools.cached_property
    def decoded(self) -> list[tuple[torch.Tensor, int | None]]:
        """See `DeferredAudio.decode`; None for what was decoded before."""
        return [
            part.decode() if isinstance(part, DeferredAudio) else (part, None)
            for part in self.parts
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts}

    def can_travel(self) -> bool:
        """Return whether another process can decode it."""
        # The clips of a batch share one transform.
        first = next(part for part in self.parts if isinstance(part, DeferredAudio))
        return first.can_travel()


@dataclass(frozen=True)
class DeferredCounts:
    """How many samples of each waveform aren't padding, int64 (batch,), as of `DeferredAudio`.

    Args:
        stack: The waveforms.
        known: The number for each; None where `stack` knows it.
    """

    stack: DeferredStack
    known: tuple[torch.Tensor | None, ...]

    def __call__(self) -> torch.Tensor:
        """Return all numbers, which decodes the waveforms."""
        counts = zip(self.known, self.stack.decoded, strict=True)
        return torch.tensor([one if known is None else int(known) for known, (_, one) in counts])

    def can_travel(self) -> bool:
        """Return whether another process can decode it."""
        return self.stack.can_travel()


_DEFERRED = (DeferredAudio, DeferredStack, DeferredCounts)


class LazyDict(dict[str, Any]):
    """A dict that decodes its deferred values (`DeferredAudio`, …) when they are read.

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

_logger = logging.getLogger(__name__)

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
Partial: TypeAlias = Literal["omit", "mask"]


def check_partial(partial: str) -> None:
    """Refuse another value.

    Raises:
        DatasetError: It isn't one of the two.
    """
    if partial not in get_args(Partial):
        raise DatasetError(f'partial: {partial!r}; use `partial="omit"` or `partial="mask"`')


def vegas_collate_fn(batch: Sequence[Item], partial: Partial = "omit") -> dict[str, Any]:
    """Make one batch of items of a dataset with a cache, such as `VEGASDataset`.

    Args:
        batch: Items; they needn't all have the same keys.
        partial: What a batch holds if only some of its items have an embedding: `"omit"`, no
            `audio_emb`, or `"mask"`, zeros for the others.

    Returns:
        A dict with

        - `labels`: int64 (batch,);
        - `audio`: (batch, num_samples), if every item has it. While it holds clips whose embedding
          was cached, it is decoded on first access;
        - `audio_num_valid`: int64 (batch,), samples of `audio` that aren't padding, if an item has
          no cached embedding; likewise decoded on first access. Absent if the `audio` of a cached
          item was read before;
        - `audio_emb`: (batch, *embedding_shape), if every item has one. With `partial="mask"` if
          any has one, with rows of zeros for the others;
        - `audio_emb_mask`: bool (batch,), which items have one; where `audio_emb` is, and in every
          batch with `partial="mask"`;
        - `image`: (batch, …) and `image_mask`: bool (batch,), zeros and False for items without;
        - `video`: (batch, frames, 3, height, width), shorter ones repeat their last frame, absent
          ones are zeros, and `video_mask`: bool (batch,); both None where no item has a video;
        - `text_emb`: the first item's, as it is: not stacked, and of its class only;
        - `metadata`: dict of lists; `class_name`, `file_id`, `audio_filename`: lists.

    Raises:
        DatasetError: Another value of `partial`.
    """
    check_partial(partial)
    labels, _ = column(batch, "label")
    output = LazyDict(labels=stacked(labels), **_waveforms(batch))
    images, has_image = column(batch, "image")
    if any(has_image):
        output["image"], output["image_mask"] = _with_zeros(images, has_image)
    embeddings, is_hit = column(batch, "audio_emb")
    if all(is_hit) or (partial == "mask" and any(is_hit)):
        output["audio_emb"], output["audio_emb_mask"] = _with_zeros(embeddings, is_hit)
    elif partial == "mask":
        output["audio_emb_mask"] = torch.tensor(is_hit)
    elif any(is_hit):
        _warn_of_partial_hits()
    texts, has_text = column(batch, "text_emb")
    if has_text[0]:
        output["text_emb"] = texts[0]
    if any(column(batch, "video")[1]):
        output["video"], output["video_mask"] = _stack_videos(_filled(batch, "video", None))
    output["metadata"] = {name: _filled(batch, key, "") for name, key in _METADATA.items()}
    output["class_name"] = output["metadata"]["class_names"]
    output["file_id"] = output["metadata"]["file_ids"]
    output["audio_filename"] = _filled(batch, "audio_filename", "")
    return output


def _waveforms(batch: Sequence[Item]) -> dict[str, Any]:
    """Return `audio`, and which part of it isn't padding."""
    waveforms, has_audio = column(batch, "audio")
    if not all(has_audio):
        return {}
    can_count = [isinstance(one, DeferredAudio) for one in waveforms]
    audio: Any = DeferredStack(tuple(waveforms)) if any(can_count) else stacked(waveforms)
    known = _filled(batch, "audio_num_valid", None)
    is_known = [one is not None for one in known]
    # Of a cached item whose waveform was read before, it isn't known.
    if not any(is_known) or not all(map(max, is_known, can_count)):
        return {"audio": audio}
    num_valid: Any = DeferredCounts(audio, tuple(known)) if any(can_count) else stacked(known)
    return {"audio": audio, "audio_num_valid": num_valid}


@functools.cache
def _warn_of_partial_hits() -> None:
    """Warn once in a process."""
    _logger.warning(
        "a batch in which only some embeddings are cached has no 'audio_emb': extract the missing "
        'ones, or make the dataset with `partial="mask"` for zeros and a mask'
    )


def _with_zeros(
    rows: Sequence[torch.Tensor] | torch.Tensor, is_there: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one tensor of as many rows as items, and which items have one."""
    present, mask = stacked(rows), torch.tensor(is_there)
    if len(present) == len(mask):
        return present, mask
    filled = present.new_zeros((len(mask), *present.shape[1:]))
    filled[mask.to(present.device)] = present
    return filled, mask


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

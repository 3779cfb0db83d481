"""Items and batches whose waveforms are decoded when somebody looks at them.

A clip whose embedding is cached seldom needs its waveform, and decoding it would cost more than
everything else about the item. So a hit's `"audio"` is a promise until it is first read.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data._utils.pin_memory import pin_memory

from lmdbcache.audio import load_clip

if TYPE_CHECKING:
    from collections.abc import Callable, ItemsView, Iterable, Iterator, ValuesView

__all__ = ["DeferredAudio", "DeferredStack", "LazyDict"]


@dataclass(frozen=True)
class DeferredAudio:
    """One clip's waveform, not decoded yet; calling it decodes.

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
        """The waveform, float32 (num_samples,), or what the transform makes of it.

        Raises:
            AudioDecodeError: The file gives no usable waveform.
        """
        return self.decode()[0]

    def decode(self) -> tuple[torch.Tensor, int | None]:
        """The same, and how many samples of it aren't padding; None if a transform changed it."""
        samples, num_valid, _ = load_clip(self.path, self.sample_rate, self.duration)
        waveform = torch.from_numpy(samples).unsqueeze(0)
        if self.transform is None:
            return waveform.squeeze(0), num_valid
        return self.transform(waveform).squeeze(0), None

    def can_travel(self) -> bool:
        """Whether the promise can be sent to another process, there to be kept."""
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
        """All waveforms, stacked."""
        return torch.stack([part() if callable(part) else part for part in self.parts])

    def can_travel(self) -> bool:
        """Whether the promise can be sent to another process, there to be kept."""
        # The clips of a batch share one transform.
        first = next(part for part in self.parts if isinstance(part, DeferredAudio))
        return first.can_travel()


_DEFERRED = (DeferredAudio, DeferredStack)


class LazyDict(dict[str, Any]):
    """A dict whose `DeferredAudio` and `DeferredStack` values are made when they are read.

    Whatever reads a value (`[]`, `get`, `items`, `values`, `dict(item)`, `==`, …) sees the real
    tensor; `in`, `len` and `keys` decode nothing. A copy, and what arrives in another process,
    still decodes on first access.
    """

    def is_deferred(self, key: str) -> bool:
        """Whether this value would have to be made."""
        return isinstance(super().get(key), _DEFERRED)

    def peek(self, key: str) -> Any:
        """The value as it is, a promise included."""
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
        """The value, or the default."""
        return self[key] if key in self else default  # noqa: SIM401

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """All pairs, with real values."""
        self._decode_all()
        return super().items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """All values, real ones."""
        self._decode_all()
        return super().values()

    def pop(self, key: str, *default: Any) -> Any:
        """Remove a key and give its value."""
        if key in self:
            self[key]  # makes the value
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        """Remove the last pair and give it."""
        key = next(reversed(self))
        return key, self.pop(key)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The value; the default is stored where there is none."""
        if key not in self:
            self[key] = default
        return self[key]

    def copy(self) -> LazyDict:
        """A shallow copy; promises stay promises."""
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
        """A copy with its tensors in page-locked memory, for DataLoader; promises stay promises."""
        return LazyDict(
            (key, value if isinstance(value, _DEFERRED) else _pinned(value))
            for key, value in self._pairs()
        )

    def _decode_all(self) -> None:
        for key in self:
            self[key]  # makes the value

    def _pairs(self) -> Iterable[tuple[str, Any]]:
        return list(super().items())


def _pinned(value: Any) -> Any:
    return pin_memory(value)  # type: ignore[no-untyped-call]

"""How much of a file is read, and how its channels become one. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["MAX_FILE_RATE", "Mixed", "frames_wanted", "joined", "mix_to_mono"]

# A rate beyond this comes from a damaged header, and would ask for gigabytes.
MAX_FILE_RATE: Final = 10_000_000

# What is read beyond the duration, so that the last samples are resampled with their right
# neighbours: 50 ms, and more for low rates, whose filter is as many samples but more time.
_MARGIN_SECONDS: Final = 0.05
_MARGIN_SAMPLES: Final = 800

# -30 dB. Channels that have nothing in common lose 3 dB if there are two of them, 9 dB if eight.
_CANCELLED: Final = 1e-3


@dataclass(frozen=True)
class Mixed:
    """The beginning of a recording, mixed to mono.

    Args:
        samples: float32 array (num_samples,).
        rate: Its sample rate, in Hz.
        channel_energy: The mean over the channels of their sums of squares; 0 for one channel.
    """

    samples: NDArray[np.float32]
    rate: int
    channel_energy: float = 0.0

    @property
    def is_cancelled(self) -> bool:
        """Whether the channels cancel: the mix has less than a thousandth of their energy."""
        energy = float(np.dot(self.samples, self.samples))
        return self.channel_energy > 0 and energy < _CANCELLED * self.channel_energy


def frames_wanted(rate: int, sample_rate: int, duration: float) -> int:
    """Return how many samples per channel to read of a file.

    Args:
        rate: The file's sample rate, in Hz.
        sample_rate: The one to resample to, in Hz.
        duration: Where to cut, in seconds.
    """
    margin = max(_MARGIN_SECONDS, _MARGIN_SAMPLES / min(rate, sample_rate))
    return math.ceil(rate * (duration + margin))


def mix_to_mono(frames: NDArray[np.float32], rate: int) -> Mixed:
    """Mix by the plain mean.

    Args:
        frames: float32 array (num_samples, channels).
        rate: Sample rate, in Hz.
    """
    channels = frames.shape[1]
    if channels == 1:
        return Mixed(frames[:, 0], rate)
    flat = np.ascontiguousarray(frames).reshape(-1)
    energy = float(np.dot(flat, flat)) / channels
    if channels == 2:
        # 25 times faster than mean(axis=1) on interleaved samples.
        samples: NDArray[np.float32] = frames[:, 0] + frames[:, 1]
        samples *= np.float32(0.5)
        return Mixed(samples, rate, energy)
    return Mixed(np.asarray(frames.mean(axis=1, dtype=np.float32)), rate, energy)


def joined(parts: Sequence[Mixed]) -> Mixed:
    """Join recordings of one sample rate."""
    return Mixed(
        np.concatenate([part.samples for part in parts]),
        parts[0].rate,
        sum(part.channel_energy for part in parts),
    )

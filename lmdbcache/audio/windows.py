"""A whole recording in windows, in one pass and in constant memory. No torch here.

The windows are cut from the recording as one waveform: decoded, mixed and resampled from its
beginning to its end. soxr's stream gives the bits of its resampling in one go.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmdbcache.audio.containers import DamagedAudioError
from lmdbcache.audio.decoding import failures_of, opened, streaming_packages
from lmdbcache.audio.ffmpeg_decoder import seconds_by_ffmpeg
from lmdbcache.audio.source import AudioSource, as_source
from lmdbcache.audio.waveform import MixEnergy, Recording, fit

_MOST_SECONDS: Final = 1e7  # more is a header that leaves the length open


class AudioWindow(NamedTuple):
    """One window of a recording.

    Args:
        start: Its first sample in the recording's waveform.
        waveform: float32 array (window,).
        num_valid: How many of its samples came from the recording, at least 1; the rest is padding.
        is_cancelled: Whether the channels of all that was read until then cancel when they are
            mixed, see `DecodedClip`.
    """

    start: int
    waveform: NDArray[np.float32]
    num_valid: int
    is_cancelled: bool


def load_windows(
    path: str | os.PathLike[str] | AudioSource,
    sample_rate: int,
    window: int,
    hop: int,
    last_window: str = "pad",
    decoder: str = "soundfile",
) -> Iterator[AudioWindow]:
    """Decode an audio file as mono and cut it into windows, in order.

    Args:
        path: See `load_clip`.
        sample_rate: Sample rate of the windows, in Hz.
        window: Length of each, in samples.
        hop: From the start of one to the start of the next, in samples.
        last_window: `"pad"`, `"drop"` or `"align"`, see `WindowCutter`.
        decoder: See `load_clip`.

    Yields:
        At least one window.

    Raises:
        AudioDecodeError: The file can't be decoded in full, which may show only at its end; or it
            is shorter than one window, with `"drop"`. The message has the path and the reason.
        ConfigError, MissingDependencyError: See `load_clip`.
    """
    stream, resampler = streaming_packages(decoder)
    path = as_source(path)
    cutter = WindowCutter(window, hop, last_window)
    energy = MixEnergy()
    with failures_of(path), opened(path) as (readable, file):
        for samples in _resampled(stream(readable, file), sample_rate, resampler, energy):
            for start, found in cutter.add(samples):
                yield _window(start, found, window, energy)
        if not cutter.num_samples:
            raise DamagedAudioError(f"shorter than one sample at {sample_rate} Hz")
        rest = cutter.finish()
        if cutter.num_windows == 0:
            seconds, needed = cutter.num_samples / sample_rate, window / sample_rate
            raise DamagedAudioError(
                f"it is {seconds:.3f} s long, and a window {needed:g} s: with last_window 'drop' "
                "such a recording has no window"
            )
        for start, found in rest:
            yield _window(start, found, window, energy)


def announced_samples(
    path: str | os.PathLike[str] | AudioSource, sample_rate: int, decoder: str = "soundfile"
) -> int:
    """Return how long a file says that it is, in samples; 0 if it doesn't. Nothing is decoded.

    Args:
        path: See `load_clip`; of a source that isn't a file the length isn't known.
        sample_rate: Of the result, in Hz.
        decoder: See `load_clip`.
    """
    path = as_source(path)
    if not isinstance(path, str):  # it may have to be fetched
        return 0
    try:
        with opened(path) as (readable, file):
            if decoder == "ffmpeg":
                seconds = seconds_by_ffmpeg(file)
            else:
                import soundfile

                with soundfile.SoundFile(readable) as found:
                    seconds = found.frames / found.samplerate
    except Exception:  # noqa: BLE001 - decoding says what is wrong with it
        return 0
    return round(seconds * sample_rate) if seconds < _MOST_SECONDS else 0


def _window(start: int, found: NDArray[np.float32], size: int, energy: MixEnergy) -> AudioWindow:
    if not np.isfinite(found).all():
        raise DamagedAudioError("NaN or Inf among its samples")
    return AudioWindow(start, fit(found, size), len(found), energy.is_cancelled)


def _resampled(
    blocks: Iterator[Recording], sample_rate: int, resampler: Any, energy: MixEnergy
) -> Iterator[NDArray[np.float32]]:
    """Yield the waveform in pieces.

    Raises:
        DamagedAudioError: It has no samples, or parts of different sample rates.
    """
    rate, stream = 0, None
    for block in blocks:
        if not rate:
            rate = block.rate
            if rate != sample_rate:
                stream = resampler(rate, sample_rate, 1, dtype="float32", quality="HQ")
        if block.rate != rate:
            raise DamagedAudioError(
                f"its parts have different sample rates ({rate} and {block.rate} Hz); encode it "
                "anew as one stream"
            )
        energy.add(block)
        samples = block.samples
        yield samples if stream is None else stream.resample_chunk(np.ascontiguousarray(samples))
    if not rate:
        raise DamagedAudioError("it holds no samples (0 frames)")
    if stream is not None:
        yield stream.resample_chunk(np.empty(0, np.float32), last=True)


class WindowCutter:
    """Cuts a waveform that arrives in pieces.

    Window k starts at sample k * hop. What happens at the end, where no whole window fits:

    - `"pad"`: the first window that reaches the end is the last one; what it lacks is padding. So
      no window starts after the end, and none holds only what the one before it holds.
    - `"drop"`: only whole windows.
    - `"align"`: if the last whole window doesn't end at the end, one more does. A recording
      shorter than a window has one, which is padded.

    Args:
        size: Length of a window, in samples.
        hop: From the start of one to the start of the next, in samples.
        last_window: `"pad"`, `"drop"` or `"align"`.
    """

    def __init__(self, size: int, hop: int, last_window: str) -> None:
        self._size, self._hop, self._last_window = size, hop, last_window
        self._held: NDArray[np.float32] = np.empty(0, np.float32)
        self._held_from = 0
        self.num_samples = 0
        self.num_windows = 0

    @property
    def _next(self) -> int:
        return self.num_windows * self._hop

    def add(self, samples: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the start and the samples of each window that is whole now; take all of them."""
        self._held = np.concatenate([self._held, samples])
        self.num_samples += len(samples)
        while self._next + self._size <= self.num_samples:
            start = self._next
            self.num_windows += 1
            yield start, self._part(start)
        # An aligned window may begin before the next one.
        needed = min(self._next, max(0, self.num_samples - self._size))
        self._held = self._held[needed - self._held_from :].copy()
        self._held_from = needed

    def finish(self) -> list[tuple[int, NDArray[np.float32]]]:
        """Return the start and the samples of the window at the end, shorter if it is padded."""
        start = _last_start(self.num_samples, self._size, self._hop, self._last_window)
        if start is None:
            return []
        self.num_windows += 1
        return [(start, self._part(start))]

    def _part(self, start: int) -> NDArray[np.float32]:
        first = start - self._held_from
        return self._held[first : first + self._size]


def _last_start(num_samples: int, size: int, hop: int, last_window: str) -> int | None:
    """Where the window behind the last whole one starts; None if there is none."""
    num_whole = max(0, (num_samples - size) // hop + 1)
    if last_window == "drop" or not num_samples:
        return None
    if not num_whole:
        return 0
    if (num_whole - 1) * hop + size == num_samples:
        return None
    if last_window == "align":
        return num_samples - size
    return num_whole * hop if num_whole * hop < num_samples else None


def num_windows(num_samples: int, size: int, hop: int, last_window: str) -> int:
    """Return how many windows a recording of so many samples has, see `WindowCutter`."""
    num_whole = max(0, (num_samples - size) // hop + 1)
    return num_whole + (_last_start(num_samples, size, hop, last_window) is not None)

"""Audio and video files as FFmpeg decodes them, whole or not at all. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from lmdbcache.audio.containers import (
    DamagedAudioError,
    check_flac_length,
    check_media_file,
    cut_off,
    find_audio_data,
    find_links,
    is_flac,
    read_at,
)
from lmdbcache.audio.mpeg_frames import find_parts
from lmdbcache.audio.waveform import Recording, frames_wanted, joined, mix_to_mono

_TOLERANCE_SECONDS: Final = 0.1
_BLOCK_FRAMES: Final = 1 << 17
# A playlist or a list of files must not lead to other files or to the network.
_OPTIONS: Final = {"protocol_whitelist": "none"}
# Formats of which FFmpeg estimates the duration from the bit rate.
_ESTIMATED: Final = frozenset({"mp3", "aac", "ac3", "eac3", "dts", "amr", "loas", "mp2"})


def read_by_ffmpeg(file: BinaryIO, sample_rate: int, duration: float) -> Recording:
    """Decode the beginning of a file's first audio stream.

    Args:
        file: A seekable file.
        sample_rate: The rate that it is resampled to later, in Hz.
        duration: How much of it is wanted, in seconds.

    Returns:
        The samples wanted, and some more; fewer if the recording is shorter.

    Raises:
        DamagedAudioError: It is cut off or damaged, or holds no audio.
        av.FFmpegError: FFmpeg can't read it.
    """
    parts: list[Recording] = []
    found, wanted = 0, 1
    with _opened(file) as (container, stream):
        for frames, rate in _frames(container, stream):
            parts.append(mix_to_mono(frames, rate))
            found, wanted = found + len(frames), frames_wanted(rate, sample_rate, duration)
            if found >= wanted:
                break
        announced = _announced_seconds(container, stream)
    if not parts:
        raise DamagedAudioError("it holds no samples (0 frames)")
    recording = joined(parts)
    if found < wanted:
        _check_whole(file, found, recording.rate, announced)
    return Recording(recording.samples[:wanted], recording.rate, recording.channel_energy)


def stream_by_ffmpeg(file: BinaryIO) -> Iterator[Recording]:
    """Decode a file's first audio stream from its beginning to its end, in constant memory.

    Args:
        file: A seekable file.

    Yields:
        Blocks that follow each other: joined, they are what `read_by_ffmpeg` returns of a duration
        that is longer than the file.

    Raises:
        DamagedAudioError: It is cut off or damaged, or holds no audio; maybe not before its end.
        av.FFmpegError: FFmpeg can't read it.
    """
    parts: list[Recording] = []
    found = held = rate = 0
    with _opened(file) as (container, stream):
        for frames, rate in _frames(container, stream):
            frames_wanted(rate, rate, 0.0)  # refuses an impossible sample rate
            parts.append(mix_to_mono(frames, rate))
            found, held = found + len(frames), held + len(frames)
            if held >= _BLOCK_FRAMES:  # a frame of AAC is 23 ms
                yield joined(parts)
                parts, held = [], 0
        announced = _announced_seconds(container, stream)
    if found:
        _check_whole(file, found, rate, announced)
    if parts:
        yield joined(parts)


def seconds_by_ffmpeg(file: BinaryIO) -> float:
    """Return how long a file says that it is, in seconds; 0 if it doesn't.

    Raises:
        DamagedAudioError, av.FFmpegError: See `read_by_ffmpeg`.
    """
    with _opened(file) as (container, stream):
        return _announced_seconds(container, stream) or (container.duration or 0) / 1e6


@contextmanager
def _opened(file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    """The container and its first audio stream."""
    import av

    file.seek(0)
    with av.open(file, options=_OPTIONS) as container:
        if not container.streams.audio:
            raise DamagedAudioError("it has no audio stream")
        yield container, container.streams.audio[0]


def _frames(container: Any, stream: Any) -> Iterator[tuple[NDArray[np.float32], int]]:
    """float32 (num_samples, channels) in -1 .. 1, and the sample rate, of each frame."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise cut_off("it has a damaged packet")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise cut_off("it has a damaged frame")
            values = frame.to_ndarray()
            if not frame.format.is_planar:
                values = values.reshape(-1, len(frame.layout.channels)).T
            yield _scaled(values).T, int(frame.sample_rate)


def _scaled(values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # Inf is refused later
            return np.asarray(values, dtype=np.float32)
    zero, bits = (128, 8) if values.dtype == np.uint8 else (0, 8 * values.dtype.itemsize)
    return np.asarray((values.astype(np.float64) - zero) * 2.0 ** (1 - bits), dtype=np.float32)


def _announced_seconds(container: Any, stream: Any) -> float:
    """The duration by the container's header; 0 if it has none."""
    if container.format.name in _ESTIMATED:
        return 0.0
    if stream.duration is not None and stream.time_base:
        return float(stream.duration * stream.time_base)
    # Of a video's tracks the audio may be the shorter.
    only_audio = len(container.streams) == 1
    return container.duration / 1e6 if container.duration and only_audio else 0.0


def _check_whole(file: BinaryIO, num_samples: int, rate: int, announced: float) -> None:
    """Refuse a file that ends before the duration and before its container does.

    Raises:
        DamagedAudioError: It is cut off or damaged.
    """
    check_media_file(file)
    data, head = find_audio_data(file), read_at(file, 0, 4)
    if data is not None:
        data.check(file)
        return
    if head == b"OggS":
        for _ in find_links(file):
            pass
        return
    if is_flac(file):
        check_flac_length(file, num_samples)
        return
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF):
        find_parts(file, num_samples)
    seconds = num_samples / rate
    if seconds < announced - _TOLERANCE_SECONDS:
        raise cut_off(
            f"the audio ends after {seconds:.2f} s of the {announced:.2f} s that its header "
            "announces"
        )

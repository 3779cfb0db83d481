"""From an audio file to the waveform that a front end takes.

The rules are part of a cache's identity (`CacheConfig.front_end`): decoded by soundfile, resampled
by soxr at quality HQ, mixed to mono by the plain mean, cut or zero-padded at the end. This module
stays free of torch, and imports soundfile and soxr only where they are used.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmdbcache.audio.containers import DamagedAudioError, PiecedFile, size_of
from lmdbcache.audio.ffmpeg_decoder import read_by_ffmpeg, stream_by_ffmpeg
from lmdbcache.audio.formats import check_decoder, is_readable
from lmdbcache.audio.soundfile_decoder import read_by_soundfile, stream_by_soundfile
from lmdbcache.audio.source import AudioSource, as_source, open_source, shown
from lmdbcache.audio.waveform import Recording, fit
from lmdbcache.errors import AudioDecodeError, RemoteError
from lmdbcache.machine import needing


class DecodedClip(NamedTuple):
    """A clip as `load_clip` decodes it.

    Args:
        waveform: float32 array (round(sample_rate * duration),).
        num_valid: How many of its samples came from the file, at least 1; the rest is padding.
        is_cancelled: Whether its channels cancel when they are mixed: the mono signal has less than
            a thousandth (-30 dB) of the channels' mean energy.
    """

    waveform: NDArray[np.float32]
    num_valid: int
    is_cancelled: bool


def load_clip(
    path: str | os.PathLike[str] | AudioSource,
    sample_rate: int,
    duration: float,
    decoder: str = "soundfile",
    *,
    content: bytes | None = None,
) -> DecodedClip:
    """Decode the first `duration` seconds of an audio file as mono.

    Only what is needed is read from the file. A file that ends before the duration must be whole:
    one that was cut off is refused (`lmdbcache.audio.containers`, and docs/datasets.md), and one of
    several parts is decoded in full.

    Args:
        path: A file that libsndfile reads: wav, flac, ogg, mp3 and others; or a source that opens
            as one.
        sample_rate: Sample rate of the result, in Hz.
        duration: Length of the result, in seconds: a longer clip is cut, a shorter one zero-padded.
        decoder: `"soundfile"`, or `"ffmpeg"` for files that libsndfile doesn't read (m4a, mp4,
            webm, …).
        content: The whole file, if it has been read already: soundfile then decodes these bytes.

    Raises:
        AudioDecodeError: No usable waveform in it; the message has the path and the reason.
        ConfigError: An unknown decoder.
        MissingDependencyError: soundfile, soxr or, for `"ffmpeg"`, av isn't installed.
    """
    resample, read = _audio_packages(decoder)
    path = as_source(path)
    num_samples = round(sample_rate * duration)
    with failures_of(path):
        recording = None
        if content is not None and decoder == "soundfile":
            recording = _from_memory(content, path, sample_rate, duration)
        if recording is None:
            with opened(path) as (readable, file):
                recording = read(readable, file, sample_rate, duration)
        waveform = recording.samples
        if not len(waveform):
            raise DamagedAudioError("it holds no samples (0 frames)")
        if recording.rate != sample_rate:
            waveform = resample(waveform, recording.rate, sample_rate, quality="HQ")
        if not len(waveform):
            raise DamagedAudioError(f"shorter than one sample at {sample_rate} Hz")
        if not np.isfinite(waveform[:num_samples]).all():
            raise DamagedAudioError("NaN or Inf among its samples")
    num_valid = min(num_samples, len(waveform))
    return DecodedClip(fit(waveform, num_samples), num_valid, recording.is_cancelled)


def load_waveform(
    path: str | os.PathLike[str] | AudioSource,
    sample_rate: int,
    duration: float,
    decoder: str = "soundfile",
) -> NDArray[np.float32]:
    """Return the waveform of `load_clip`, float32 (round(sample_rate * duration),)."""
    return load_clip(path, sample_rate, duration, decoder).waveform


@contextlib.contextmanager
def failures_of(path: str | os.PathLike[str] | AudioSource) -> Iterator[None]:
    """Around decoding: whatever goes wrong is the file's failure.

    Raises:
        AudioDecodeError: The message has the path and the reason.
    """
    try:
        yield
    except DamagedAudioError as error:
        raise _failure(path, str(error)) from error
    except Exception as error:
        raise _failure(path, _reason(error)) from error


def streaming_packages(decoder: str) -> tuple[Callable[..., Iterator[Recording]], Any]:
    """A function that yields a whole file in blocks, and soxr's resampling of these.

    Raises:
        ConfigError, MissingDependencyError: See `load_clip`.
    """
    _audio_packages(decoder)
    import soxr

    if decoder == "ffmpeg":
        return lambda _, file: stream_by_ffmpeg(file), soxr.ResampleStream
    return stream_by_soundfile, soxr.ResampleStream


def _audio_packages(decoder: str) -> tuple[Any, Callable[..., Recording]]:
    """Soxr's resampling, and a function that reads a file's beginning."""
    check_decoder(decoder)
    is_ffmpeg = decoder == "ffmpeg"
    with needing("decoding audio", "audio,ffmpeg" if is_ffmpeg else "audio"):
        import soxr

        importlib.import_module("av" if is_ffmpeg else "soundfile")
    if is_ffmpeg:
        return soxr.resample, lambda _, file, *wanted: read_by_ffmpeg(file, *wanted)
    return soxr.resample, read_by_soundfile


@contextlib.contextmanager
def opened(path: str | os.PathLike[str] | AudioSource) -> Iterator[tuple[Any, BinaryIO]]:
    """What soundfile opens, and the same as a binary file."""
    with open_source(path) as file:
        if not file.read(1):
            raise DamagedAudioError("the file is empty (0 bytes)")
        file.seek(0)
        if isinstance(path, (str, os.PathLike)):
            yield os.fsencode(path), file
        else:
            try:
                # soundfile would print each seek that the source's own file refuses.
                yield PiecedFile(file, [(0, size_of(file))]), file
            finally:
                if error := getattr(getattr(file, "raw", None), "error", None):
                    raise error


class _Content(io.BytesIO):
    """A file's bytes, which answer every seek and note those beyond them."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._size = len(content)  # `getbuffer()` would copy all of it
        self.has_left = False

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = (0, self.tell(), self._size)[whence]
        # A file may refuse such a position, and soundfile would print an error of ours.
        inside = min(max(0, origin + offset), self._size)
        self.has_left |= inside != origin + offset
        return super().seek(inside)


def _from_memory(
    content: bytes, path: str | os.PathLike[str] | AudioSource, sample_rate: int, duration: float
) -> Recording | None:
    """Decode a file's bytes; None if the file itself has to be asked, as for a damaged one."""
    if isinstance(path, (str, os.PathLike)) and not is_readable(Path(path).suffix):
        return None  # libsndfile goes by the suffixes of some formats without a header
    file = _Content(content)
    try:
        recording = read_by_soundfile(file, file, sample_rate, duration)
    except Exception:  # noqa: BLE001 - the file gives the same error, or none
        return None
    return None if file.has_left else recording


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, RemoteError):
        return f"it can't be fetched: {error}"
    text = getattr(error, "error_string", "") or getattr(error, "strerror", "") or str(error)
    text = " ".join(str(text).split()).rstrip(".")
    if text.startswith("File does not exist"):  # libsndfile's word for an mp3 that is none
        text = "Format not recognised"
    return f"not readable as audio: {text or type(error).__name__}"


def _failure(path: str | os.PathLike[str] | AudioSource, reason: str) -> AudioDecodeError:
    return AudioDecodeError(f"{shown(path)}: {reason}")

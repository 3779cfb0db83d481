"""From an audio file to the waveform that a front end takes.

The rules are part of a cache's identity (`CacheConfig.front_end`): decoded by soundfile, resampled
by soxr at quality HQ, mixed to mono by the plain mean, cut or zero-padded at the end. This module
stays free of torch, and imports soundfile and soxr only where they are used.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lmdbcache.audio.containers import DamagedAudioError
from lmdbcache.audio.ffmpeg_decoder import FFmpegDecoder
from lmdbcache.audio.formats import check_decoder
from lmdbcache.audio.pieced_file import PiecedFile, size_of
from lmdbcache.audio.soundfile_decoder import SoundfileDecoder
from lmdbcache.audio.source import AudioSource, shown
from lmdbcache.errors import AudioDecodeError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["DecodeReport", "decode", "fit", "is_digital_silence", "load_clip", "load_waveform"]


@dataclass
class DecodeReport:
    """What `decode` noticed about a clip that it decoded.

    Args:
        is_cancelled: Whether its channels cancel when they are mixed: the mono signal has less than
            a thousandth (-30 dB) of the channels' mean energy.
    """

    is_cancelled: bool = False


def decode(
    path: str | os.PathLike[str] | AudioSource,
    sample_rate: int,
    duration: float,
    report: DecodeReport | None = None,
    decoder: str = "soundfile",
) -> NDArray[np.float32]:
    """Decode the first `duration` seconds of an audio file as mono.

    Only what is needed is read from the file. Nothing is padded: a clip that is shorter comes back
    shorter. A file that ends before the duration must be whole: one that was cut off is refused
    where its container tells (see docs/datasets.md), and one of several parts is decoded in full.

    Args:
        path: A file that libsndfile reads: wav, flac, ogg, mp3 and others; or a source that opens
            as one.
        sample_rate: Sample rate of the result, in Hz.
        duration: Where to cut, in seconds.
        report: Filled in with what was noticed.
        decoder: `"soundfile"`, or `"ffmpeg"` for what that doesn't read (m4a, mp4, webm, …).

    Returns:
        float32 array (num_samples,), with 1 <= num_samples <= round(sample_rate * duration).

    Raises:
        AudioDecodeError: No usable waveform in it; the message has the path and the reason.
        ConfigError: An unknown decoder.
        MissingDependencyError: soundfile, soxr or, for `"ffmpeg"`, av isn't installed.
    """
    resample, read = _audio_packages(decoder)
    limit = round(sample_rate * duration)
    try:
        with _opened(path) as (readable, file):
            sound = read(readable, file, sample_rate, duration)
        if not len(sound.samples):
            raise _failure(path, "it holds no samples (0 frames)")
        if report is not None:
            report.is_cancelled = sound.is_cancelled
        waveform = sound.samples
        if sound.rate != sample_rate:
            waveform = resample(waveform, sound.rate, sample_rate, quality="HQ")
    except AudioDecodeError:
        raise
    except DamagedAudioError as error:
        raise _failure(path, str(error)) from error
    except Exception as error:
        raise _failure(path, _reason(error)) from error
    waveform = np.ascontiguousarray(waveform[:limit], dtype=np.float32)
    if not waveform.size:
        raise _failure(path, f"shorter than one sample at {sample_rate} Hz")
    if not np.isfinite(waveform).all():
        raise _failure(path, "NaN or Inf among its samples")
    return waveform


def fit(waveform: NDArray[np.float32], num_samples: int) -> NDArray[np.float32]:
    """Cut or zero-pad a waveform at its end.

    Args:
        waveform: float32 array (n,).
        num_samples: The length wanted.

    Returns:
        A new float32 array (num_samples,).
    """
    fitted = np.zeros(num_samples, dtype=np.float32)
    kept = min(num_samples, len(waveform))
    fitted[:kept] = waveform[:kept]
    return fitted


def load_waveform(
    path: str | os.PathLike[str] | AudioSource,
    sample_rate: int,
    duration: float,
    decoder: str = "soundfile",
) -> NDArray[np.float32]:
    """Decode an audio file and bring it to exactly `duration` seconds.

    Args:
        path: An audio file, as for `decode`.
        sample_rate: Sample rate of the result, in Hz.
        duration: Length of the result, in seconds.
        decoder: As for `decode`.

    Returns:
        float32 array (round(sample_rate * duration),).

    Raises:
        AudioDecodeError: The file gives no usable waveform.
        ConfigError: An unknown decoder.
        MissingDependencyError: soundfile, soxr or, for `"ffmpeg"`, av isn't installed.
    """
    return load_clip(path, sample_rate, duration, None, decoder)[0]


def load_clip(
    path: str | os.PathLike[str] | AudioSource,
    sample_rate: int,
    duration: float,
    report: DecodeReport | None = None,
    decoder: str = "soundfile",
) -> tuple[NDArray[np.float32], int]:
    """The same, and how many samples of it came from the file: the rest is padding.

    Args:
        path: An audio file, as for `decode`.
        sample_rate: Sample rate of the result, in Hz.
        duration: Length of the result, in seconds.
        report: Filled in with what was noticed.
        decoder: `"soundfile"`, or `"ffmpeg"` for what that doesn't read (m4a, mp4, webm, …).

    Returns:
        float32 array (round(sample_rate * duration),), and `num_valid`, at least 1.

    Raises:
        AudioDecodeError: The file gives no usable waveform.
        ConfigError: An unknown decoder.
        MissingDependencyError: soundfile, soxr or, for `"ffmpeg"`, av isn't installed.
    """
    waveform = decode(path, sample_rate, duration, report, decoder)
    return fit(waveform, round(sample_rate * duration)), len(waveform)


def is_digital_silence(waveform: NDArray[np.float32]) -> bool:
    """Whether every sample is exactly zero, as in a clip whose recording failed.

    Args:
        waveform: Array (n,) of any real dtype.
    """
    return not np.any(waveform)


def _audio_packages(decoder: str) -> tuple[Any, Any]:
    """Soxr's resampling, and a function that reads a file's beginning."""
    check_decoder(decoder)
    try:
        import soxr

        if decoder == "ffmpeg":
            import av  # noqa: F401

            return soxr.resample, lambda _, file, *wanted: FFmpegDecoder(*wanted).read(file)
        import soundfile  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: soundfile without its libsndfile
        needed = "av and soxr" if decoder == "ffmpeg" else "soundfile and soxr"
        extra = "audio,ffmpeg" if decoder == "ffmpeg" else "audio"
        raise MissingDependencyError(
            f"decoding audio needs {needed} ({error}); "
            f'install them with: pip install "lmdbcache[{extra}]"'
        ) from error
    return soxr.resample, lambda name, file, *wanted: SoundfileDecoder(*wanted).read(name, file)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str] | AudioSource) -> Iterator[tuple[Any, BinaryIO]]:
    """What soundfile opens, and the same as a binary file."""
    if isinstance(path, AudioSource):
        with path.open_binary() as file:
            _check_not_empty(file, path)
            # soundfile would print each seek that the source's own file refuses.
            yield PiecedFile(file, [(0, size_of(file))]), file
        return
    with _open_regular_file(path) as file:
        _check_not_empty(file, path)
        yield os.fsencode(path), file


def _check_not_empty(file: BinaryIO, path: str | os.PathLike[str] | AudioSource) -> None:
    if not file.read(1):
        raise _failure(path, "the file is empty (0 bytes)")
    file.seek(0)


def _open_regular_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Name the plain reasons that libsndfile reports as `System error`; a pipe would block it."""
    try:
        if stat.S_ISREG(Path(path).stat().st_mode):
            return Path(path).open("rb")
        if Path(path).is_dir():
            raise _failure(path, "is a folder, not an audio file")
        raise _failure(path, "is not a regular file")
    except FileNotFoundError:
        raise _failure(path, "no such file") from None
    except PermissionError:
        raise _failure(path, "no permission to read it") from None
    except (OSError, ValueError) as error:
        raise _failure(path, _reason(error)) from error


def _reason(error: BaseException) -> str:
    text = getattr(error, "error_string", "") or getattr(error, "strerror", "") or str(error)
    text = " ".join(str(text).split()).rstrip(".")
    return f"not readable as audio: {text or type(error).__name__}"


def _failure(path: str | os.PathLike[str] | AudioSource, reason: str) -> AudioDecodeError:
    return AudioDecodeError(f"{shown(path)}: {reason}")

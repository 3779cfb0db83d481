"""From an audio file to the waveform that a front end takes.

The rules are part of a cache's identity (`CacheConfig.front_end`): decoded by soundfile, resampled
by soxr at quality HQ, mixed to mono by the plain mean, cut or zero-padded at the end. This module
stays free of torch, and imports soundfile and soxr only where they are used.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmdbcache.embedders.audio_source import AudioSource, shown
from lmdbcache.errors import AudioDecodeError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["decode", "fit", "is_digital_silence", "load_clip", "load_waveform"]

# What is read beyond the duration, so that the last samples are resampled with their right
# neighbours: 50 ms, and more for low rates, whose filter is as many samples but more time.
_MARGIN_SECONDS: Final = 0.05
_MARGIN_SAMPLES: Final = 800

# A rate beyond this comes from a damaged header, and would ask for gigabytes.
_MAX_FILE_RATE: Final = 10_000_000

# MP3 headers may be off by a frame or two; a file that ends earlier than this was cut off.
_END_TOLERANCE_SECONDS: Final = 0.1
_UNKNOWN_LENGTH: Final = 2**62


def decode(
    path: str | os.PathLike[str] | AudioSource, sample_rate: int, duration: float
) -> NDArray[np.float32]:
    """Decode the first `duration` seconds of an audio file as mono.

    Only what is needed is read from the file. Nothing is padded: a clip that is shorter comes back
    shorter.

    Args:
        path: A file that libsndfile reads: wav, flac, ogg, mp3 and others; or a source that opens
            as one.
        sample_rate: Sample rate of the result, in Hz.
        duration: Where to cut, in seconds.

    Returns:
        float32 array (num_samples,), with 1 <= num_samples <= round(sample_rate * duration).

    Raises:
        AudioDecodeError: No usable waveform in it; the message has the path and the reason.
        MissingDependencyError: soundfile or soxr isn't installed.
    """
    soundfile, soxr = _audio_packages()
    limit = round(sample_rate * duration)
    try:
        with _readable(path) as readable, soundfile.SoundFile(readable) as file:
            waveform = _read_mono(file, sample_rate, duration, path)
            file_rate = int(file.samplerate)
        if file_rate != sample_rate:
            waveform = soxr.resample(waveform, file_rate, sample_rate, quality="HQ")
    except AudioDecodeError:
        raise
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
    path: str | os.PathLike[str] | AudioSource, sample_rate: int, duration: float
) -> NDArray[np.float32]:
    """Decode an audio file and bring it to exactly `duration` seconds.

    Args:
        path: An audio file, as for `decode`.
        sample_rate: Sample rate of the result, in Hz.
        duration: Length of the result, in seconds.

    Returns:
        float32 array (round(sample_rate * duration),).

    Raises:
        AudioDecodeError: The file gives no usable waveform.
        MissingDependencyError: soundfile or soxr isn't installed.
    """
    return load_clip(path, sample_rate, duration)[0]


def load_clip(
    path: str | os.PathLike[str] | AudioSource, sample_rate: int, duration: float
) -> tuple[NDArray[np.float32], int]:
    """The same, and how many samples of it came from the file: the rest is padding.

    Args:
        path: An audio file, as for `decode`.
        sample_rate: Sample rate of the result, in Hz.
        duration: Length of the result, in seconds.

    Returns:
        float32 array (round(sample_rate * duration),), and `num_valid`, at least 1.

    Raises:
        AudioDecodeError: The file gives no usable waveform.
        MissingDependencyError: soundfile or soxr isn't installed.
    """
    waveform = decode(path, sample_rate, duration)
    return fit(waveform, round(sample_rate * duration)), len(waveform)


def is_digital_silence(waveform: NDArray[np.float32]) -> bool:
    """Whether every sample is exactly zero, as in a clip whose recording failed.

    Args:
        waveform: Array (n,) of any real dtype.
    """
    return not np.any(waveform)


def _audio_packages() -> tuple[Any, Any]:
    try:
        import soundfile
        import soxr
    except (ImportError, OSError) as error:  # OSError: soundfile without its libsndfile
        raise MissingDependencyError(
            f"decoding audio needs soundfile and soxr ({error}); "
            'install them with: pip install "lmdbcache[audio]"'
        ) from error
    return soundfile, soxr


@contextlib.contextmanager
def _readable(path: str | os.PathLike[str] | AudioSource) -> Iterator[Any]:
    """What soundfile opens."""
    if not isinstance(path, AudioSource):
        _check_regular_file(path)
        yield os.fsencode(path)
        return
    with path.open_binary() as file:
        if not file.read(1):
            raise _failure(path, "the file is empty (0 bytes)")
        file.seek(0)
        yield file


def _check_regular_file(path: str | os.PathLike[str]) -> None:
    """Name the plain reasons that libsndfile reports as `System error`; a pipe would block it."""
    try:
        if stat.S_ISREG(Path(path).stat().st_mode):
            with Path(path).open("rb") as file:
                empty = not file.read(1)
        elif Path(path).is_dir():
            raise _failure(path, "is a folder, not an audio file")
        else:
            raise _failure(path, "is not a regular file")
    except FileNotFoundError:
        raise _failure(path, "no such file") from None
    except PermissionError:
        raise _failure(path, "no permission to read it") from None
    except (OSError, ValueError) as error:
        raise _failure(path, _reason(error)) from error
    if empty:
        raise _failure(path, "the file is empty (0 bytes)")


def _read_mono(
    file: Any, sample_rate: int, duration: float, path: str | os.PathLike[str] | AudioSource
) -> NDArray[np.float32]:
    rate, total = int(file.samplerate), max(0, int(file.frames))
    if not 0 < rate <= _MAX_FILE_RATE:
        raise _failure(path, f"damaged header: a sample rate of {rate} Hz")
    margin = max(_MARGIN_SECONDS, _MARGIN_SAMPLES / min(rate, sample_rate))
    wanted = min(total, int(np.ceil(rate * (duration + margin))))
    frames = _read_frames(file, wanted)
    if total < _UNKNOWN_LENGTH and len(frames) < wanted - rate * _END_TOLERANCE_SECONDS:
        raise _failure(
            path,
            f"the data ends after {len(frames) / rate:.2f} s of the {total / rate:.2f} s that its "
            "header announces: cut off or damaged",
        )
    if not len(frames):
        raise _failure(path, "it holds no samples (0 frames)")
    return _mix_to_mono(frames)


def _read_frames(file: Any, num_frames: int) -> NDArray[np.float32]:
    """float32 (num_frames, channels) in -1 .. 1, as libsndfile scales it."""
    frames: NDArray[np.float32]
    if file.subtype == "PCM_16":
        # Exact either way, and a third of the time that libsndfile's own conversion takes.
        integers = file.read(num_frames, dtype="int16", always_2d=True)
        frames = np.multiply(integers, np.float32(2**-15), dtype=np.float32)
    else:
        frames = file.read(num_frames, dtype="float32", always_2d=True)
    return frames


def _mix_to_mono(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    if frames.shape[1] == 1:
        return frames[:, 0]
    if frames.shape[1] == 2:
        # 25 times faster than mean(axis=1) on interleaved samples.
        mixed: NDArray[np.float32] = frames[:, 0] + frames[:, 1]
        mixed *= np.float32(0.5)
        return mixed
    return np.asarray(frames.mean(axis=1, dtype=np.float32))


def _reason(error: BaseException) -> str:
    text = getattr(error, "error_string", "") or getattr(error, "strerror", "") or str(error)
    text = " ".join(str(text).split()).rstrip(".")
    return f"not readable as audio: {text or type(error).__name__}"


def _failure(path: str | os.PathLike[str] | AudioSource, reason: str) -> AudioDecodeError:
    return AudioDecodeError(f"{shown(path)}: {reason}")

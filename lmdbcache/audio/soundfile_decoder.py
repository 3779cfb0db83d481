"""Audio files as libsndfile decodes them, whole or not at all. No torch here.

libsndfile takes a file that was cut off for a short one, and one of several parts for its first
part. So a file that ends before the wanted duration is looked at: does its container end there? A
file that reaches the duration isn't read any further.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from lmdbcache.audio.containers import (
    DamagedAudioError,
    PiecedFile,
    announced_by_libsndfile,
    check_flac_length,
    cut_off,
    find_audio_data,
    find_links,
    is_flac,
    name_of_media,
    read_at,
)
from lmdbcache.audio.mpeg_frames import find_parts
from lmdbcache.audio.waveform import Recording, frames_wanted, joined, mix_to_mono
from lmdbcache.machine import install_line

# An mp3's header may be off by a frame or two.
_TOLERANCE_SECONDS: Final = 0.1
_UNKNOWN_LENGTH: Final = 2**62
_BLOCK_FRAMES: Final = 1 << 17  # 3 s of 44.1 kHz, 1 MiB of stereo


@dataclass(frozen=True)
class _Stream:
    """What libsndfile gave for a file.

    Args:
        num_samples: How many samples it gave, per channel.
        rate: The sample rate, in Hz.
        wanted: How many the duration takes.
        total: How many libsndfile expects in the file.
        form: The container, as soundfile names it.
        is_mpeg: Whether the coding is MPEG's, in whatever container.
        log: What libsndfile noted about the header.
        is_expected: Whether nothing was decoded yet, and `num_samples` is what there should be.
    """

    num_samples: int
    rate: int
    wanted: int
    total: int
    form: str
    is_mpeg: bool
    log: str = ""
    is_expected: bool = False

    def check_length(self, expected: int) -> None:
        """Refuse a stream that is shorter than it should be.

        Raises:
            DamagedAudioError: It ends before `expected` samples, and before those wanted.
        """
        found, rate = self.num_samples, self.rate
        tolerance = rate * _TOLERANCE_SECONDS if self.is_mpeg or self.form == "OGG" else 0
        if expected < _UNKNOWN_LENGTH and found < min(expected, self.wanted) - tolerance:
            raise cut_off(
                f"the data ends after {found / rate:.2f} s of the {expected / rate:.2f} s that its "
                "header announces"
            )


def read_by_soundfile(
    readable: Any, file: BinaryIO, sample_rate: int, duration: float
) -> Recording:
    """Decode the beginning of a file.

    Args:
        readable: What soundfile opens: a path or a file.
        file: The same as a seekable file.
        sample_rate: The rate that it is resampled to later, in Hz.
        duration: How much of it is wanted, in seconds.

    Returns:
        The samples wanted, and some more; fewer if the recording is shorter.

    Raises:
        DamagedAudioError: It is cut off or damaged.
        soundfile.SoundFileError: libsndfile can't read it.
    """
    import soundfile

    stream, error = None, None
    try:
        stream, recording = _stream(readable, sample_rate, duration)
    except soundfile.SoundFileError as caught:
        error = caught
    if stream is not None and stream.num_samples >= stream.wanted:
        return recording
    parts = _parts(file, stream)
    if parts is not None:
        return _in_turn(parts, sample_rate, duration)
    if stream is None:
        raise _unreadable(file, error)
    stream.check_length(stream.total)
    return recording


def stream_by_soundfile(readable: Any, file: BinaryIO) -> Iterator[Recording]:
    """Decode a file from its beginning to its end, in constant memory.

    Args:
        readable: See `read_by_soundfile`.
        file: The same as a seekable file.

    Yields:
        Blocks that follow each other: joined, they are what `read_by_soundfile` returns of a
        duration that is longer than the file.

    Raises:
        DamagedAudioError: It is cut off or damaged; maybe not before its end.
        soundfile.SoundFileError: libsndfile can't read it.
    """
    import soundfile

    stream, error = None, None
    try:
        with soundfile.SoundFile(readable) as opened:
            log = str(opened.extra_info)
            stream = replace(_described(opened), log=log, is_expected=True)
    except soundfile.SoundFileError as caught:
        error = caught
    parts = _parts(file, stream)
    if parts is not None:
        for part, expected in parts:
            with _readable_part():
                found = yield from _blocks(part)
            found.check_length(max(expected, found.total if found.form == "OGG" else 0))
        return
    if stream is None:
        raise _unreadable(file, error)
    found = yield from _blocks(readable)
    if (found.num_samples, found.log) != (stream.num_samples, stream.log):
        if _parts(file, found) is not None:
            raise cut_off(f"the data ends after {found.num_samples / found.rate:.2f} s")
        found.check_length(found.total)


def _blocks(readable: Any) -> Generator[Recording, None, _Stream]:
    """Yield a file's samples block by block, and return what it gave in all."""
    import soundfile

    class InOrder(soundfile.SoundFile):  # type: ignore[misc]
        # soundfile seeks behind each read where it can, and mp3s decode differently from there.
        def seekable(self) -> bool:
            return False

    if hasattr(readable, "seek"):  # it has been opened before
        readable.seek(0)
    with InOrder(readable) as file:
        stream, found = _described(file), 0
        while found < stream.total:
            frames = _read_frames(file, min(_BLOCK_FRAMES, stream.total - found))
            found += len(frames)
            if not len(frames):
                break
            yield mix_to_mono(frames, stream.rate)
        return replace(stream, num_samples=found, log=str(file.extra_info))


def _described(file: Any) -> _Stream:
    """What libsndfile says of an open file, as if all of it were wanted and there."""
    rate, total = int(file.samplerate), max(0, int(file.frames))
    frames_wanted(rate, rate, 0.0)  # refuses an impossible sample rate
    if file.format == "XI":  # libsndfile gives each file 44,100 Hz
        raise DamagedAudioError(
            "it is an instrument (XI), whose format has no sample rate; convert it to wav"
        )
    is_mpeg = str(file.subtype).startswith("MPEG")
    return _Stream(total, rate, _UNKNOWN_LENGTH, total, str(file.format), is_mpeg)


def _unreadable(file: BinaryIO, error: Exception | None) -> Exception:
    """The error of a file that libsndfile can't read."""
    assert error is not None
    media = name_of_media(read_at(file, 0, 16))
    if not media:
        return error
    found = DamagedAudioError(
        f"it is {media}, which libsndfile doesn't read; decode the dataset with "
        f'`decoder="ffmpeg"` ({install_line("ffmpeg")})'
    )
    found.__cause__ = error
    return found


@contextmanager
def _readable_part() -> Iterator[None]:
    import soundfile

    try:
        yield
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", error)
        raise DamagedAudioError(
            f"it can't be decoded in full ({reason}); encode it anew"
        ) from error


def _stream(readable: Any, sample_rate: int, duration: float) -> tuple[_Stream, Recording]:
    import soundfile

    with soundfile.SoundFile(readable) as file:
        stream = _described(file)
        wanted = frames_wanted(stream.rate, sample_rate, duration)
        frames = _read_frames(file, min(stream.total, wanted))
        log = str(file.extra_info) if len(frames) < wanted else ""
        stream = replace(stream, num_samples=len(frames), wanted=wanted, log=log)
        return stream, mix_to_mono(frames, stream.rate)


def _in_turn(
    parts: Iterable[tuple[PiecedFile, int]], sample_rate: int, duration: float
) -> Recording:
    """Decode files that follow each other, each with the number of samples it should have."""
    recordings: list[Recording] = []
    for part, expected in parts:
        with _readable_part():
            stream, recording = _stream(part, sample_rate, duration)
        stream.check_length(max(expected, stream.total if stream.form == "OGG" else 0))
        recordings.append(recording)
        if sum(len(each.samples) for each in recordings) >= stream.wanted:
            break
    return joined(recordings)


def _parts(file: BinaryIO, stream: _Stream | None) -> Iterable[tuple[PiecedFile, int]] | None:
    """What to decode instead of a file that libsndfile can't read, or that ends early.

    Returns:
        Files and the samples expected in each; None: the file is whole, or unknown here.

    Raises:
        DamagedAudioError: It is cut off.
    """
    start, stop = 0, None
    data = find_audio_data(file)
    if data is not None:
        data.check(file)
        if data.size is None and (stream is None or not stream.total):
            return [(data.with_size(file), 0)]
        start = data.start
        stop = None if data.size is None else start + data.size
    if read_at(file, 0, 4) == b"OggS":
        links = find_links(file)
        several = [next(links), *islice(links, 1)]
        if len(several) == 1:
            return None
        return ((PiecedFile(file, [link]), 0) for link in chain(several, links))
    if is_flac(file):
        check_flac_length(file, None if stream is None else stream.num_samples)
        return None
    if (stream is None and data is None) or (stream is not None and stream.is_mpeg):
        return _mpeg_parts(file, stream, start, stop)
    if stream is not None:
        stream.check_length(announced_by_libsndfile(stream.form, stream.log) or 0)
    return None


def _mpeg_parts(
    file: BinaryIO, stream: _Stream | None, start: int, stop: int | None
) -> Iterable[tuple[PiecedFile, int]] | None:
    wanted = _UNKNOWN_LENGTH if stream is None else stream.wanted
    parts = find_parts(file, wanted, start, stop)
    if not parts:
        return None
    if stream is not None and len(parts) == 1:
        part, found = parts[0], stream.num_samples
        if stream.is_expected:
            found = min(found, part.num_samples)
        tolerance = stream.rate * _TOLERANCE_SECONDS
        is_right = all(
            min(expected, wanted) - found <= tolerance
            for expected in (part.num_samples, stream.total)
        )
        if part.tells_its_length or is_right:
            return None
    return [(part.open(file), 0 if part.tells_its_length else part.num_samples) for part in parts]


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

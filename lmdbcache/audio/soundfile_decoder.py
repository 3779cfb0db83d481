"""Audio files as libsndfile decodes them, whole or not at all. No torch here.

libsndfile takes a file that was cut off for a short one, and one of several parts for its first
part. So a file that ends before the wanted duration is looked at: does its container end there? A
file that reaches the duration isn't read any further.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from lmdbcache.audio.containers import DamagedAudioError, announced_by_libsndfile, find_audio_data
from lmdbcache.audio.flac_header import check_flac_length, is_flac
from lmdbcache.audio.media_containers import name_of_media
from lmdbcache.audio.mixing import MAX_FILE_RATE, Mixed, frames_wanted, joined, mix_to_mono
from lmdbcache.audio.mpeg_frames import find_parts
from lmdbcache.audio.ogg_pages import find_links
from lmdbcache.audio.pieced_file import PiecedFile, read_at

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["SoundfileDecoder"]

# An mp3's header may be off by a frame or two.
_TOLERANCE_SECONDS: Final = 0.1
_UNKNOWN_LENGTH: Final = 2**62


@dataclass(frozen=True)
class _Stream:
    """What libsndfile gave for a file.

    Args:
        sound: Its first samples, mixed.
        wanted: How many the duration takes.
        total: How many libsndfile expects in the file.
        form: The container, as soundfile names it.
        is_mpeg: Whether the coding is MPEG's, in whatever container.
        log: What libsndfile noted about the header, if the file ends early.
    """

    sound: Mixed
    wanted: int
    total: int
    form: str
    is_mpeg: bool
    log: str = ""

    @property
    def is_long_enough(self) -> bool:
        return len(self.sound.samples) >= self.wanted

    def check_length(self, expected: int) -> None:
        """Refuse a stream that is shorter than it should be.

        Raises:
            DamagedAudioError: It ends before `expected` samples, and before those wanted.
        """
        found, rate = len(self.sound.samples), self.sound.rate
        tolerance = rate * _TOLERANCE_SECONDS if self.is_mpeg or self.form == "OGG" else 0
        if expected < _UNKNOWN_LENGTH and found < min(expected, self.wanted) - tolerance:
            raise DamagedAudioError(
                f"the data ends after {found / rate:.2f} s of the {expected / rate:.2f} s that its "
                "header announces: cut off or damaged; copy or download it again"
            )


@dataclass(frozen=True)
class SoundfileDecoder:
    """Decodes the beginning of files.

    Args:
        sample_rate: The rate that they are resampled to later, in Hz.
        duration: How much of them is wanted, in seconds.
    """

    sample_rate: int
    duration: float

    def read(self, readable: Any, file: BinaryIO) -> Mixed:
        """Decode the beginning of a file.

        Args:
            readable: The file as soundfile takes it: its name, or `file`.
            file: The same, open for reading bytes.

        Returns:
            The samples wanted, and some more; fewer if the recording is shorter.

        Raises:
            DamagedAudioError: It is cut off or damaged, or can't be decoded in full.
            soundfile.SoundFileError: libsndfile can't read it.
        """
        import soundfile

        stream, error = None, None
        try:
            stream = self._stream(readable)
        except soundfile.SoundFileError as caught:
            error = caught
        if stream is not None and stream.is_long_enough:
            return stream.sound
        parts = self._parts(file, stream)
        if parts is not None:
            return self._in_turn(parts)
        if stream is None:
            assert error is not None
            if media := name_of_media(read_at(file, 0, 16)):
                raise DamagedAudioError(
                    f"it is {media}, which libsndfile doesn't read; decode the dataset with "
                    'decoder="ffmpeg" (pip install "lmdbcache[ffmpeg]")'
                ) from error
            raise error
        stream.check_length(stream.total)
        return stream.sound

    def _stream(self, readable: Any) -> _Stream:
        import soundfile

        with soundfile.SoundFile(readable) as file:
            rate, total = int(file.samplerate), max(0, int(file.frames))
            if not 0 < rate <= MAX_FILE_RATE:
                raise DamagedAudioError(f"damaged header: a sample rate of {rate} Hz")
            if file.format == "XI":  # libsndfile gives each file 44,100 Hz
                raise DamagedAudioError(
                    "it is an instrument (XI), whose format has no sample rate; convert it to wav"
                )
            wanted = frames_wanted(rate, self.sample_rate, self.duration)
            frames = _read_frames(file, min(total, wanted))
            return _Stream(
                mix_to_mono(frames, rate),
                wanted,
                total,
                str(file.format),
                str(file.subtype).startswith("MPEG"),
                str(file.extra_info) if len(frames) < wanted else "",
            )

    def _in_turn(self, parts: Iterable[tuple[PiecedFile, int]]) -> Mixed:
        """Decode files that follow each other, each with the number of samples it should have."""
        import soundfile

        sounds: list[Mixed] = []
        for part, expected in parts:
            try:
                stream = self._stream(part)
            except soundfile.SoundFileError as error:
                reason = getattr(error, "error_string", error)
                raise DamagedAudioError(
                    f"it can't be decoded in full ({reason}); encode it anew"
                ) from error
            if sounds and stream.sound.rate != sounds[0].rate:
                raise DamagedAudioError(
                    f"its parts have different sample rates ({sounds[0].rate} and "
                    f"{stream.sound.rate} Hz); encode it anew as one stream"
                )
            stream.check_length(max(expected, stream.total if stream.form == "OGG" else 0))
            sounds.append(stream.sound)
            if sum(len(sound.samples) for sound in sounds) >= stream.wanted:
                break
        return joined(sounds)

    def _parts(
        self, file: BinaryIO, stream: _Stream | None
    ) -> Iterable[tuple[PiecedFile, int]] | None:
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
            check_flac_length(file, None if stream is None else len(stream.sound.samples))
            return None
        if (stream is None and data is None) or (stream is not None and stream.is_mpeg):
            return self._mpeg_parts(file, stream, start, stop)
        if stream is not None:
            announced = announced_by_libsndfile(stream.form, stream.log)
            stream.check_length(announced or 0)
        return None

    def _mpeg_parts(
        self, file: BinaryIO, stream: _Stream | None, start: int, stop: int | None
    ) -> Iterable[tuple[PiecedFile, int]] | None:
        wanted = _UNKNOWN_LENGTH if stream is None else stream.wanted
        parts = find_parts(file, wanted, start, stop)
        if not parts:
            return None
        if stream is not None and len(parts) == 1:
            part, found = parts[0], len(stream.sound.samples)
            tolerance = stream.sound.rate * _TOLERANCE_SECONDS
            is_right = all(
                min(expected, wanted) - found <= tolerance
                for expected in (part.num_samples, stream.total)
            )
            if part.tells_its_length or is_right:
                return None
        return [
            (part.open(file), 0 if part.tells_its_length else part.num_samples) for part in parts
        ]


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

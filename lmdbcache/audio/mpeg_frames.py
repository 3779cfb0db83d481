"""The frames of MPEG audio (mp3): how long a file really is. No torch here.

libsndfile takes the length from the first frame's Xing, Info or VBRI header, or estimates it from
the first frame's bit rate: too short for a file of parts, and any length for a variable bit rate.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import BinaryIO, Final

from lmdbcache.audio.containers import (
    DamagedAudioError,
    PiecedFile,
    cut_off,
    read_at,
    size_of,
    skip_tags,
)

_LAYER_III: Final = 1
# By layer's bits; kbit/s of MPEG 1, then of MPEG 2 and 2.5.
_BIT_RATES: Final = {
    3: (
        (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
        (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    ),
    2: (
        (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
        (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    ),
    1: (
        (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
        (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    ),
}
_RATES: Final = (44100, 48000, 32000)
_HEAD_BYTES: Final = 64  # reaches behind a Xing, Info or VBRI header's sizes
_SCAN_BYTES: Final = 2**16
_MAX_JUNK_BYTES: Final = 2**20
# Fewer frames are no part: headers that count a frame too few are common.
_MIN_PART_FRAMES: Final = 4


@dataclass(frozen=True)
class _Header:
    """The header of one frame."""

    version: int
    layer: int
    bit_rate: int
    rate: int
    is_mono: bool
    is_padded: bool

    @cached_property
    def num_samples(self) -> int:
        if self.layer == 3:
            return 384
        return 576 if self.layer == _LAYER_III and self.version != 3 else 1152

    @cached_property
    def num_bytes(self) -> int:
        if self.layer == 3:
            return (12000 * self.bit_rate // self.rate + self.is_padded) * 4
        return 125 * self.num_samples * self.bit_rate // self.rate + self.is_padded

    @cached_property
    def tag_offset(self) -> int:
        """Where a Xing or Info header lies in the frame, in bytes."""
        if self.version == 3:
            return 21 if self.is_mono else 36
        return 13 if self.is_mono else 21

    def goes_with(self, other: _Header) -> bool:
        """Whether both can be frames of one stream."""
        return (self.version, self.layer, self.rate) == (other.version, other.layer, other.rate)


def _parse(head: bytes) -> _Header | None:
    return _parsed(head[:4])


@lru_cache(1024)  # a file's frames have few different headers
def _parsed(head: bytes) -> _Header | None:
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    bits, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 0 or bits in (0, 15) or rate == 3:
        return None
    return _Header(
        version=version,
        layer=layer,
        bit_rate=_BIT_RATES[layer][version != 3][bits - 1],
        rate=_RATES[rate] >> {3: 0, 2: 1, 0: 2}[version],
        is_mono=head[3] >> 6 == 3,
        is_padded=bool(head[2] >> 1 & 1),
    )


@dataclass
class MPEGPart:
    """A run of frames that is one stream.

    Args:
        start: Its offset in bytes.
        stop: Where it ends.
        first: The header of its first frame.
        announced: Frames by its Xing, Info or VBRI header; None without one.
        announced_bytes: Its size by the same header; 0 if it doesn't give one.
        is_known: Whether libmpg123 reads that header. If not, it is left out: it would be silence.
        num_frames: Frames that are there in full, without that header's.
        is_cut: Whether the file ends inside its last frame.
    """

    start: int
    stop: int
    first: _Header
    announced: int | None = None
    announced_bytes: int = 0
    is_known: bool = True
    num_frames: int = 0
    is_cut: bool = False

    @property
    def tells_its_length(self) -> bool:
        """Whether libmpg123 finds its length in its header."""
        return self.announced is not None and self.is_known

    @property
    def num_samples(self) -> int:
        """Samples that it decodes to, with those that an encoder adds."""
        return self.num_frames * self.first.num_samples

    def check(self) -> None:
        """Compare its frames with those that it announces.

        Raises:
            DamagedAudioError: Some are missing.
        """
        if self.announced is None:
            if self.is_cut:
                raise cut_off("it ends inside a frame")
            return
        missing = self.announced - self.num_frames
        # Some encoders count the header's own frame.
        is_short = self.is_cut or self.stop - self.start < self.announced_bytes
        if missing > 1 or (missing == 1 and is_short):
            raise cut_off(
                f"its header announces {self.announced} frames, and {self.num_frames} are there"
            )

    def open(self, file: BinaryIO) -> PiecedFile:
        """The part as a file that libsndfile reads to its end.

        Without a header that counts the frames, libmpg123 divides the file's size by that of the
        first frame: a tag behind the audio makes that enough. (A header made up here would have it
        leave out the decoder's delay, and the clip would be shifted.)
        """
        frames = (self.start, self.stop)
        if self.tells_its_length:
            return PiecedFile(file, [frames])
        size = min(2 * (self.num_frames + _MIN_PART_FRAMES) * (self.first.num_bytes + 1), 2**28 - 1)
        tag = b"ID3\x03\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
        return PiecedFile(file, [frames, tag, size])


def find_parts(
    file: BinaryIO, num_samples: int, start: int = 0, stop: int | None = None
) -> list[MPEGPart]:
    """Find the streams that follow each other in an mp3.

    Args:
        file: A seekable file.
        num_samples: How many samples are needed: no frame behind them is looked at.
        start: Where the audio begins, in bytes.
        stop: Where it ends; None is the end of the file.

    Returns:
        The parts in order; an empty list if there are no frames.

    Raises:
        DamagedAudioError: A part is cut off, or has another sample rate than the one before.
    """
    stop = size_of(file) if stop is None else min(stop, size_of(file))
    parts: list[MPEGPart] = []
    found = 0
    for position, head in _frames(file, skip_tags(file, start), stop):
        header = _parse(head)
        assert header is not None
        part = parts[-1] if parts else None
        if part is not None and not header.goes_with(part.first):
            raise DamagedAudioError(
                "its parts have different sample rates or codings; encode it anew as one stream"
            )
        end = position + header.num_bytes
        tag = _tag(head, header)
        if part is None or tag is not None or _is_complete(part):
            part = MPEGPart(position, min(end, stop), header)
            parts.append(part)
            if tag is not None:
                part.announced, part.announced_bytes, part.is_known = tag
                part.is_cut = end > stop
                continue
        if not (part.is_known or part.num_frames):
            part.announced_bytes -= position - part.start
            part.start, part.first = position, header
        part.stop = min(end, stop)
        if end > stop:
            part.is_cut = True
            break
        part.num_frames += 1
        found += header.num_samples
        # Decoders leave out the samples that each part's encoder added.
        if found > num_samples + len(parts) * _MIN_PART_FRAMES * 1152:
            return [each for each in parts if each.num_frames]
    if len(parts) > 1 and parts[-1].announced is None and parts[-1].num_frames < _MIN_PART_FRAMES:
        parts.pop()
    for part in parts:
        part.check()
    return parts


def _is_complete(part: MPEGPart) -> bool:
    return part.announced is not None and 0 < part.announced <= part.num_frames


def _frames(file: BinaryIO, position: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Offset and first bytes of each frame; the last one may be cut."""
    previous: _Header | None = None
    while position < stop:
        head = read_at(file, position, _HEAD_BYTES).ljust(_HEAD_BYTES, b"\0")
        header = _parse(head)
        if header is None or (
            (previous is None or not header.goes_with(previous))
            and not _goes_on(file, position, header, stop)
        ):
            after = skip_tags(file, position) or position
            if head.startswith(b"TAG"):
                after = position + 128
            elif head.startswith(b"APETAGEX"):
                after = position + 32 + int.from_bytes(head[12:16], "little")
            if after == position:
                after = _next_frame(file, position + 1, stop, previous)
                if previous is not None and after < stop:
                    raise cut_off("there is something else between its frames")
            position = after
            continue
        yield position, head
        previous = header
        position += header.num_bytes


def _goes_on(file: BinaryIO, position: int, header: _Header, stop: int) -> bool:
    """Whether another frame follows this one, or the end of the file."""
    end = position + header.num_bytes
    following = _parse(read_at(file, end, 4))
    return end == stop or (following is not None and following.goes_with(header))


def _next_frame(file: BinaryIO, position: int, stop: int, previous: _Header | None) -> int:
    """Where the stream's next frame begins behind other bytes; `stop` if there is none."""
    last = min(stop, position + _MAX_JUNK_BYTES)
    while position < last:
        content = read_at(file, position, _SCAN_BYTES + 4)
        place = content.find(b"\xff", 0, _SCAN_BYTES)
        while place >= 0:
            header = _parse(content[place : place + 4])
            if (
                header is not None
                and (previous is None or header.goes_with(previous))
                and _goes_on(file, position + place, header, stop)
            ):
                return position + place
            place = content.find(b"\xff", place + 1, _SCAN_BYTES)
        position += _SCAN_BYTES
    return stop


def _tag(head: bytes, header: _Header) -> tuple[int | None, int, bool] | None:
    """Frames and bytes of a Xing, Info or VBRI header, and whether libmpg123 reads it.

    None if the frame has audio.
    """
    if header.layer != _LAYER_III:
        return None
    if head[36:40] == b"VBRI":
        return int.from_bytes(head[50:54], "big"), int.from_bytes(head[46:50], "big"), False
    for checksum in (0, 2):  # bytes of one in front of it
        offset = header.tag_offset + checksum
        if head[offset : offset + 4] in (b"Xing", b"Info"):
            flags, first, second = struct.unpack_from(">III", head, offset + 4)
            frames = first if flags & 1 else None
            num_bytes = (second if flags & 1 else first) if flags & 2 else 0
            return frames, num_bytes, not checksum
    return None

"""Where a file that was cut off is refused: what containers announce, and whether it is there.

libsndfile reads what is there: a file that was cut off is a short clip to it. Sizes that a writer
leaves open, as one that writes to a pipe does, are known by their values. The frames of
mp3 files are in `lmdbcache.audio.mpeg_frames`. No torch here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, Final, Literal, TypeAlias


class DamagedAudioError(Exception):
    """A file that doesn't hold what it announces; the message is the reason, without the name."""


def cut_off(reason: str) -> DamagedAudioError:
    """Return the error of a file that ends too early."""
    return DamagedAudioError(f"{reason}: cut off or damaged; copy or download it again")


# ---- reading at offsets

# Bytes, a number of zeros, or a range (start, stop) of the underlying file.
Piece: TypeAlias = "bytes | int | tuple[int, int]"


class PiecedFile(io.RawIOBase):
    """Pieces of a file and bytes between them, read as one file.

    Args:
        file: The underlying file. It isn't closed with this one.
        pieces: In order.
    """

    def __init__(self, file: BinaryIO, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self._file = file
        self._pieces: list[tuple[int, int, Piece]] = []
        self._size = self._position = 0
        for piece in pieces:
            if isinstance(piece, tuple):
                size = piece[1] - piece[0]
            else:
                size = piece if isinstance(piece, int) else len(piece)
            self._pieces.append((self._size, self._size + size, piece))
            self._size += size

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset, and return the new position in bytes."""
        origin = (0, self._position, self._size)[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: object) -> int:
        """Fill a buffer as far as the pieces reach, and return the number of bytes."""
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        done = 0
        for start, stop, piece in self._pieces:
            if not start <= self._position < stop or done == len(target):
                continue
            offset, wanted = self._position - start, len(target) - done
            if isinstance(piece, bytes):
                found = piece[offset : offset + wanted]
            elif isinstance(piece, int):
                found = bytes(min(wanted, piece - offset))
            else:
                first, end = piece
                found = read_at(self._file, first + offset, min(wanted, end - first - offset))
            target[done : done + len(found)] = found
            done += len(found)
            self._position += len(found)
        return done


def read_at(file: BinaryIO, position: int, size: int) -> bytes:
    """Read up to `size` bytes from a position."""
    file.seek(position)
    return file.read(size)


def size_of(file: BinaryIO) -> int:
    """Return a file's size in bytes."""
    return file.seek(0, io.SEEK_END)


# ---- containers that announce the size of their audio

_MAX_CHUNKS: Final = 10_000


@dataclass(frozen=True)
class AudioData:
    """Where a file's audio lies.

    Args:
        start: Its offset in bytes.
        size: Its size in bytes as announced; None if the header leaves it open.
        fields: Offset → bytes of the header that make libsndfile read to the end of the file.
    """

    start: int
    size: int | None
    fields: tuple[tuple[int, bytes], ...] = ()

    def check(self, file: BinaryIO) -> None:
        """Compare the announced size with the file's.

        Raises:
            DamagedAudioError: The file ends before its audio does.
        """
        there = max(0, size_of(file) - self.start)
        if self.size is not None and self.size > there:
            raise cut_off(
                f"its header announces {self.size:,} bytes of audio, and {there:,} are there"
            )

    def with_size(self, file: BinaryIO) -> PiecedFile:
        """The same file with an open size filled in."""
        pieces: list[Piece] = []
        position = 0
        for offset, content in sorted(self.fields):
            pieces += [(position, offset), content]
            position = offset + len(content)
        return PiecedFile(file, [*pieces, (position, size_of(file))])


@dataclass(frozen=True)
class _Layout:
    """How a container writes its chunks."""

    first: int
    id_bytes: int
    size_bytes: int
    order: Literal["little", "big"]
    alignment: int = 2
    counts_header: bool = False

    @property
    def header(self) -> int:
        return self.id_bytes + self.size_bytes

    def size(self, value: int) -> bytes:
        return value.to_bytes(self.size_bytes, self.order)


_RIFF: Final = _Layout(12, 4, 4, "little")
_RIFX: Final = _Layout(12, 4, 4, "big")
_W64: Final = _Layout(40, 16, 8, "little", alignment=8, counts_header=True)
_CAF: Final = _Layout(8, 4, 8, "big", alignment=1)


def find_audio_data(file: BinaryIO) -> AudioData | None:
    """Find the audio of a container that announces its size; None in any other file.

    Args:
        file: A seekable file, wherever it stands.
    """
    head = read_at(file, 0, 12)
    magic, kind = head[:4], head[8:]
    if magic in {b"RIFF", b"RIFX", b"RF64"} and kind != b"WAVE":
        return None
    find = _FINDERS.get(magic)
    return None if find is None else find(file, kind)


def _chunks(file: BinaryIO, layout: _Layout, position: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and size of each chunk, up to bytes that aren't a chunk."""
    for _ in range(_MAX_CHUNKS):
        head = read_at(file, position, layout.header)
        name = head[:4]
        if len(head) < layout.header or not _is_name(name):
            return
        size = int.from_bytes(head[layout.id_bytes :], layout.order)
        size -= layout.header if layout.counts_header else 0
        start = position + layout.header
        yield name, start, size
        position = start + max(0, size)
        position += -position % layout.alignment


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and name.isascii() and name.decode("ascii").isprintable()


def _in_chunks(file: BinaryIO, layout: _Layout, name: bytes, prefix: int = 0) -> AudioData | None:
    """The audio of the first chunk of this name, behind `prefix` bytes that count to its size."""
    length = size_of(file)
    for found, start, size in _chunks(file, layout, layout.first):
        if found != name:
            continue
        body = start + prefix
        if not _is_open(file, layout, body, size - prefix, length):
            return AudioData(body, size - prefix)
        whole = length - start + (layout.header if layout.counts_header else 0)
        if layout.size_bytes == 4:
            # To libsndfile either means: up to the end of the file.
            whole = 0 if prefix else 2**32 - 1
        return AudioData(body, None, ((start - layout.size_bytes, layout.size(whole)),))
    return None


def _is_open(file: BinaryIO, layout: _Layout, body: int, size: int, length: int) -> bool:
    """Whether the size wasn't known when the header was written."""
    if size <= 0:
        return body < length and not _is_tiled(file, layout, body, length)
    return _is_placeholder(size, layout.size_bytes)


def _is_placeholder(size: int, size_bytes: int) -> bool:
    # The largest number with or without a sign, which writers round to whole frames or lessen by
    # the header's size. sox rounds it to 0x7F000000 in AIFF.
    if size_bytes == 8:
        return size >= 2**62
    return 0x7EFF_0000 <= size <= 0x8000_0100 or size >= 0xFFFF_0000


def _is_tiled(file: BinaryIO, layout: _Layout, position: int, length: int) -> bool:
    """Whether chunks fill the rest of the file: then a size of 0 means that there is no audio."""
    end = position
    for _, start, size in _chunks(file, layout, position):
        end = start + size
    return 0 <= end - length <= 1 or 0 <= length - end < layout.alignment


def _in_w64(file: BinaryIO) -> AudioData | None:
    found = _in_chunks(file, _W64, b"data")
    if found is None:
        return None
    # libsndfile also refuses a file whose outer size is a placeholder.
    return replace(found, fields=((16, _W64.size(size_of(file))), *found.fields))


def _in_form(file: BinaryIO, kind: bytes) -> AudioData | None:
    if kind in {b"AIFF", b"AIFC"}:
        return _in_chunks(file, _RIFX, b"SSND", prefix=8)
    return _in_chunks(file, _RIFX, b"BODY") if kind in {b"8SVX", b"16SV"} else None


def _in_rf64(file: BinaryIO) -> AudioData | None:
    length, sizes_at, announced = size_of(file), 0, 0
    for name, start, _ in _chunks(file, _RIFF, _RIFF.first):
        if name == b"ds64":
            sizes_at, announced = start, int.from_bytes(read_at(file, start + 8, 8), "little")
        elif name == b"data":
            if not _is_open(file, _W64, start, announced, length):
                return AudioData(start, announced)
            sizes = (length - 8, length - start, 0)
            content = b"".join(each.to_bytes(8, "little") for each in sizes)
            return AudioData(start, None, ((sizes_at, content),) if sizes_at else ())
    return None


def _in_au(file: BinaryIO, order: Literal["little", "big"]) -> AudioData:
    head = read_at(file, 4, 8)
    start, size = int.from_bytes(head[:4], order), int.from_bytes(head[4:], order)
    if _is_placeholder(size, 4) or (not size and start < size_of(file)):
        return AudioData(start, None, ((8, (2**32 - 1).to_bytes(4, order)),))
    return AudioData(start, size)


def _in_nist(file: BinaryIO) -> AudioData | None:
    head = read_at(file, 0, 65536)
    size = re.match(rb"NIST_1A\s+(\d{1,5})\s", head)
    fields = [
        re.search(rb"^%s\s+-i\s+(\d{1,15})\s" % name, head, re.MULTILINE)
        for name in (b"sample_count", b"channel_count", b"sample_n_bytes")
    ]
    if size is None or fields[0] is None:
        return None
    numbers = [int(field[1]) if field else 1 for field in fields]
    return AudioData(int(size[1]), numbers[0] * numbers[1] * numbers[2])


_FINDERS: Final[dict[bytes, Callable[[BinaryIO, bytes], AudioData | None]]] = {
    b"RIFF": lambda file, _: _in_chunks(file, _RIFF, b"data"),
    b"RIFX": lambda file, _: _in_chunks(file, _RIFX, b"data"),
    b"RF64": lambda file, _: _in_rf64(file),
    b"riff": lambda file, _: _in_w64(file),
    b"FORM": _in_form,
    b"caff": lambda file, _: _in_chunks(file, _CAF, b"data", prefix=4),
    b".snd": lambda file, _: _in_au(file, "big"),
    b"dns.": lambda file, _: _in_au(file, "little"),
    b"NIST": lambda file, _: _in_nist(file),
}

# Of the formats whose header only libsndfile knows here: what it logs about it.
_LOGGED_FRAMES: Final = {
    "AVR": r"^\s*Frames\s*:\s*(\d+)",
    "MPC2K": r"^\s*Frames\s*:\s*(\d+)",
    "MAT5": r"Cols\s*:\s*(\d+)(?!.*Cols)",
}
_LOGGED_CUT: Final = re.compile(r"truncated|Data length \d+ should be|short read")


def announced_by_libsndfile(form: str, log: str) -> int | None:
    """Find the number of frames that the header announces in libsndfile's log of the file.

    Args:
        form: As soundfile names it: `"AVR"`.
        log: `SoundFile.extra_info`.

    Returns:
        Frames; None if that format announces nothing.

    Raises:
        DamagedAudioError: libsndfile says that the file is cut off.
    """
    if form in {"VOC", "MAT4", "WVE", "SDS"} and _LOGGED_CUT.search(log):
        raise cut_off("the file ends before its audio does")
    pattern = _LOGGED_FRAMES.get(form)
    found = re.search(pattern, log, re.MULTILINE | re.DOTALL) if pattern else None
    return int(found[1]) if found else None


# ---- containers that only FFmpeg reads

_MATROSKA: Final = b"\x1a\x45\xdf\xa3"
_SEGMENT: Final = b"\x18\x53\x80\x67"
_MAX_ITEMS: Final = 10_000_000


def name_of_media(head: bytes) -> str | None:
    """Name the kind of a file that libsndfile doesn't read; None if it isn't known here.

    Args:
        head: Its first bytes, at least 16.
    """
    if head[4:8] in {b"ftyp", b"moov", b"mdat", b"moof"}:
        return "MPEG-4"
    if head.startswith(_MATROSKA):
        return "Matroska or WebM"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "AAC"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "AVI"
    if head.startswith(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"):
        return "Windows Media"
    return "AMR" if head.startswith(b"#!AMR") else None


def check_media_file(file: BinaryIO) -> None:
    """Compare the sizes in a file's container with the file.

    Args:
        file: A seekable file; kinds that aren't known here pass.

    Raises:
        DamagedAudioError: It ends before its container does.
    """
    start = skip_tags(file, 0)
    check = _CHECKS.get(name_of_media(read_at(file, start, 16)) or "")
    if check is not None and not check(file, start, size_of(file)):
        raise cut_off("it ends before its container does")


def _is_whole_mp4(file: BinaryIO, position: int, length: int) -> bool:
    for _ in range(_MAX_ITEMS):
        head = read_at(file, position, 16)
        if position == length or not head.strip(b"\0"):
            return True
        if len(head) < 8:
            return False
        size = int.from_bytes(head[:4], "big")
        if size == 0:  # up to the end of the file
            return True
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8 or position + size > length:
            return False
        position += size
    return True


def _is_whole_matroska(file: BinaryIO, position: int, length: int) -> bool:
    name, position = _MATROSKA, position + 4
    while name in {_MATROSKA, _SEGMENT}:
        head = read_at(file, position, 8)
        width = 9 - head[0].bit_length() if head and head[0] else 9
        if width > len(head):
            return False
        size = int.from_bytes(head[:width], "big") & ((1 << 7 * width) - 1)
        if size == (1 << 7 * width) - 1:  # left open by a writer that can't go back
            return True
        position += width + size
        if position > length:
            return False
        name = read_at(file, position, 4)
        position += 4
    return True


def _is_whole_avi(file: BinaryIO, position: int, length: int) -> bool:
    size = int.from_bytes(read_at(file, position + 4, 4), "little")
    return size >= 2**31 - 2**16 or position + 8 + size <= length


def _is_whole_aac(file: BinaryIO, position: int, length: int) -> bool:
    for _ in range(_MAX_ITEMS):
        head = read_at(file, position, 7)
        if len(head) < 2 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
            return True  # the end, or a tag behind it
        if len(head) < 7:
            return False
        size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        if size < 7 or position + size > length:
            return False
        position += size
    return True


_CHECKS: Final[dict[str, Callable[[BinaryIO, int, int], bool]]] = {
    "MPEG-4": _is_whole_mp4,
    "Matroska or WebM": _is_whole_matroska,
    "AAC": _is_whole_aac,
    "AVI": _is_whole_avi,
}


# ---- Ogg

_HEADER: Final = 27
_FIRST_PAGE, _LAST_PAGE = 2, 4  # flags
_TAIL_BYTES: Final = 2**20
_INSIDE_A_PAGE: Final = "it or a part of it ends inside a page"


def find_links(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Find the links of an Ogg file, which play one after the other.

    Args:
        file: A seekable file that begins with an Ogg page.

    Yields:
        Start and stop of each link in bytes; most files have one.

    Raises:
        DamagedAudioError: A stream has no last page, or the file ends inside a page.
    """
    begin = end = 0
    open_streams, in_headers = set[bytes](), True
    for start, stop, flags, stream in _pages(file):
        is_first = bool(flags & _FIRST_PAGE)
        if is_first and not in_headers:
            _check_ended(open_streams)
            yield begin, end
            begin = start
        in_headers, end = is_first, stop
        if is_first:
            open_streams.add(stream)
        if flags & _LAST_PAGE:
            open_streams.discard(stream)
    _check_ended(open_streams)
    yield begin, end


def _check_ended(open_streams: set[bytes]) -> None:
    if open_streams:
        raise cut_off("its stream has no last page")


def _pages(file: BinaryIO) -> Iterator[tuple[int, int, int, bytes]]:
    """Start, stop, flags and stream of each page."""
    length, start = size_of(file), 0
    while True:
        head = read_at(file, start, _HEADER + 255)
        if not head.startswith(b"OggS"):
            # The end, or a tag behind it. Pages behind it were displaced by what is lost.
            if b"OggS" in read_at(file, start, _TAIL_BYTES):
                raise cut_off(_INSIDE_A_PAGE)
            return
        body = _HEADER + head[26] if len(head) >= _HEADER else len(head) + 1
        stop = start + body + sum(head[_HEADER:body])
        if stop > length or body > len(head):
            raise cut_off(_INSIDE_A_PAGE)
        yield start, stop, head[5], head[14:18]
        start = stop


# ---- FLAC, and the tags in front of it


def skip_tags(file: BinaryIO, position: int) -> int:
    """Find where the ID3v2 tags at a position end, in bytes."""
    while True:
        head = read_at(file, position, 10)
        if len(head) < 10 or not head.startswith(b"ID3"):
            return position
        position += 10 + (10 if head[5] & 0x10 else 0)
        position += sum((head[6 + place] & 127) << (21 - 7 * place) for place in range(4))


def is_flac(file: BinaryIO) -> bool:
    """Return whether a file is FLAC, behind any ID3 tags."""
    return read_at(file, skip_tags(file, 0), 4) == b"fLaC"


def check_flac_length(file: BinaryIO, num_samples: int | None) -> None:
    """Compare what a FLAC file that ends early decodes to with its header.

    Args:
        file: A FLAC file.
        num_samples: What it decodes to, per channel; None if that isn't known.

    Raises:
        DamagedAudioError: It is too short, or its header doesn't say how long it should be.
    """
    head = read_at(file, skip_tags(file, 0), 26)
    total = int.from_bytes(head[21:26], "big") & 0xF_FFFF_FFFF
    if len(head) == 26 and not total:
        raise DamagedAudioError(
            "its header doesn't say how long it is, as in a FLAC written to a pipe; write it to a "
            "file, or decode and encode it again"
        )
    if num_samples is not None and num_samples < total:
        raise cut_off(f"it has {num_samples} of the {total} samples that its header announces")

"""How much audio a file's header announces, and whether so much is there. No torch here.

libsndfile reads what is there: a file that was cut off is a short clip to it. Sizes that a writer
leaves open, as one that writes to a pipe does, are told from those by their values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

from lmdbcache.audio.pieced_file import PiecedFile, read_at, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lmdbcache.audio.pieced_file import Piece

__all__ = ["AudioData", "DamagedAudioError", "announced_by_libsndfile", "find_audio_data"]

_MAX_CHUNKS: Final = 10_000


class DamagedAudioError(Exception):
    """A file that doesn't hold what it announces; the message is the reason, without the name."""


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
            raise DamagedAudioError(
                f"its header announces {self.size:,} bytes of audio, and {there:,} are there: cut "
                "off or damaged; copy or download it again"
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
    """Name, start and size of each chunk up to the first that is none."""
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
    """Whether this is what stands for a size that wasn't known when the header was written."""
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
    # libsndfile refuses a file whose outer size is no size, too.
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
        raise DamagedAudioError("the file ends before its audio does: cut off or damaged")
    pattern = _LOGGED_FRAMES.get(form)
    found = re.search(pattern, log, re.MULTILINE | re.DOTALL) if pattern else None
    return int(found[1]) if found else None

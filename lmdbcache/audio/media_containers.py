"""Whether mp4, Matroska, WebM and AAC files are complete, by their own sizes. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Final

from lmdbcache.audio.containers import DamagedAudioError
from lmdbcache.audio.mpeg_frames import skip_tags
from lmdbcache.audio.pieced_file import read_at, size_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["check_media_file", "name_of_media"]

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
        file: A seekable file of any kind; of those that aren't known here nothing is asked.

    Raises:
        DamagedAudioError: It ends before its container does.
    """
    start = skip_tags(file, 0)
    check = _CHECKS.get(name_of_media(read_at(file, start, 16)) or "")
    if check is not None and not check(file, start, size_of(file)):
        raise DamagedAudioError(
            "it ends before its container does: cut off or damaged; copy or download it again"
        )


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

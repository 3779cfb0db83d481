"""The pages of an Ogg file: do its streams end, and where do chained ones begin? No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Final

from lmdbcache.audio.containers import DamagedAudioError
from lmdbcache.audio.pieced_file import read_at, size_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["find_links"]

_HEADER: Final = 27
_FIRST_PAGE, _LAST_PAGE = 2, 4  # flags
_TAIL_BYTES: Final = 2**20
_INSIDE_A_PAGE: Final = (
    "it or a part of it ends inside a page: cut off or damaged; copy or download it again"
)


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
        raise DamagedAudioError(
            "its stream has no last page: cut off, or its writer was stopped; copy or download it "
            "again, or encode it anew"
        )


def _pages(file: BinaryIO) -> Iterator[tuple[int, int, int, bytes]]:
    """Start, stop, flags and stream of each page."""
    length, start = size_of(file), 0
    while True:
        head = read_at(file, start, _HEADER + 255)
        if not head.startswith(b"OggS"):
            # The end, or a tag behind it. Pages behind it were displaced by what is lost.
            if b"OggS" in read_at(file, start, _TAIL_BYTES):
                raise DamagedAudioError(_INSIDE_A_PAGE)
            return
        body = _HEADER + head[26] if len(head) >= _HEADER else len(head) + 1
        stop = start + body + sum(head[_HEADER:body])
        if stop > length or body > len(head):
            raise DamagedAudioError(_INSIDE_A_PAGE)
        yield start, stop, head[5], head[14:18]
        start = stop

"""A file made of parts of another one. No torch here."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Piece", "PiecedFile", "read_at", "size_of"]

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

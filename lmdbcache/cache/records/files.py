"""What is remembered of a file, and how it compares with the file that is there now."""

from __future__ import annotations

import os
import stat
from typing import Final, Literal, NamedTuple

import xxhash

__all__ = ["LARGEST_DIGESTED_BYTES", "Source", "SourceState", "compare", "source_of"]

SourceState = Literal["unchanged", "touched", "changed", "vanished", "unknown"]

# Decoding reads the first seconds of a clip. Reading all of an hour-long recording for its digest
# would take longer than everything else.
LARGEST_DIGESTED_BYTES: Final = 64 << 20
_CHUNK_BYTES: Final = 256 << 10


class Source(NamedTuple):
    """What an embedding was computed from, as it was right before it was decoded.

    Args:
        path: The file, relative to `root` if there is one; empty if it wasn't a file.
        size: In bytes.
        mtime_ns: Time of the last modification, in nanoseconds since 1970; None if not a file.
        digest: xxh3-128 of the content, 16 bytes; None beyond `LARGEST_DIGESTED_BYTES`.
        root: The dataset's folder, or empty.
    """

    path: str
    size: int
    mtime_ns: int | None
    digest: bytes | None
    root: str = ""

    def below(self, root: str) -> Source:
        """The same with a path that survives a move of the dataset's folder."""
        if not self.path:
            return self
        path = os.path.abspath(self.path)  # noqa: PTH100 - a link keeps the name it was given under
        folder = os.path.join(os.path.abspath(root), "") if root else ""  # noqa: PTH100, PTH118
        if folder and path.startswith(folder):
            return self._replace(path=path[len(folder) :], root=folder.rstrip(os.sep) or os.sep)
        return self._replace(path=path, root="")

    def location(self, data_dir: str | os.PathLike[str] | None = None) -> str:
        """Where the file is to be found; `data_dir` stands in for the recorded root."""
        root = os.fspath(data_dir) if data_dir is not None else self.root
        return os.path.join(root, self.path) if self.root else self.path  # noqa: PTH118


def source_of(given: object) -> Source | None:
    """What is to be remembered of a clip's source; call it before the clip is decoded.

    Args:
        given: A path, the bytes of a file, or an object whose `open_binary()` gives them.

    Returns:
        None if there is nothing to remember: no such file, or none of these.
    """
    if isinstance(given, (bytes, bytearray, memoryview)):
        return Source("", len(given), None, xxhash.xxh3_128_digest(given))
    try:
        if isinstance(given, (str, os.PathLike)):
            return _file_source(os.fspath(given))
        with given.open_binary() as file:  # type: ignore[attr-defined]
            return source_of(file.read())
    except Exception:  # noqa: BLE001 - decoding will say what is wrong with it
        return None


def compare(source: Source, path: str, *, rehash: bool = False) -> SourceState:  # noqa: PLR0911
    """How the file at `path` compares with what is remembered.

    Args:
        source: What is remembered.
        path: Where the file should be.
        rehash: Read the content even if size and time are the same.

    Returns:
        `"touched"` if the time differs and the content doesn't; `"unknown"` if it wasn't a file,
        or can't be read now.
    """
    if not source.path:
        return "unknown"
    try:
        found = os.stat(path)  # noqa: PTH116 - once per clip
    except (FileNotFoundError, NotADirectoryError):
        return "vanished"
    except (OSError, ValueError):
        return "unknown"
    if not stat.S_ISREG(found.st_mode):
        return "vanished"
    is_same_time = found.st_mtime_ns == source.mtime_ns
    if found.st_size == source.size and (rehash or not is_same_time) and source.digest:
        now = source_of(path)
        if now is None:
            return "unknown"
        if now.digest == source.digest:
            return "unchanged" if is_same_time else "touched"
        return "changed"
    return "unchanged" if is_same_time and found.st_size == source.size else "changed"


def _file_source(path: str) -> Source | None:
    # Without O_NONBLOCK a named pipe would wait for somebody to write.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - the one that fstat sees
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None
        digest = None
        if found.st_size <= LARGEST_DIGESTED_BYTES:
            hasher = xxhash.xxh3_128()
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
            digest = hasher.digest()
    return Source(path, found.st_size, found.st_mtime_ns, digest)

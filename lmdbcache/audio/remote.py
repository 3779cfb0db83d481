"""Clips at a URL, in a part of a file, or in memory: read without a local copy.

fsspec knows the kinds of URLs; it is imported when the first one is used.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Final, NamedTuple

from lmdbcache.audio.containers import Piece, PiecedFile, size_of
from lmdbcache.errors import ConfigError, MissingDependencyError, RemoteError
from lmdbcache.files import first_line, is_url, without_secrets
from lmdbcache.machine import install_line

_S3: Final = ("s3", "s3a")
_PACKAGES: Final = {
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "az"), "adlfs"),
    **dict.fromkeys(("ssh", "sftp"), "sshfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    "hf": "huggingface_hub",
}
_READ_AHEAD_BYTES: Final = 1 << 20
_AT_ONCE_BYTES: Final = 8 << 20


@dataclass(frozen=True)
class FilePart:
    """An `AudioSource`: a file at a URL, or a part of a file such as a member of a tar.

    Args:
        location: A URL that fsspec knows, or a path.
        offset: Where the clip begins, in bytes.
        size: How many bytes it has; None reads to the end of the file.
        name: What to call it; None takes the location.
    """

    location: str
    offset: int = 0
    size: int | None = None
    name: str | None = None

    def open_binary(self) -> BinaryIO:
        """The clip as a file; of a URL what is small is read at once, and more as it is asked for.

        Raises:
            OSError: The file can't be read, or ends before the part does.
            RemoteError: The URL can't be read.
        """
        if not is_url(self.location):
            return self._piece(open(self.location, "rb"))  # noqa: PTH123 - a name may be no Path
        if self.size is not None and self.size > _AT_ONCE_BYTES:
            return self._piece(opened_url(self.location))
        content = self._beginning()
        if self.size is None and len(content) > _AT_ONCE_BYTES:
            file = opened_url(self.location)
            if file.seekable():
                return self._piece(file, content)
            file.close()
            content = _fetched(self.location, self.offset, None)
        if self.size is not None and len(content) != self.size:
            raise _cut(len(content), self.size)
        return io.BytesIO(content)

    def _beginning(self) -> bytes:
        if self.size is not None:
            return _fetched(self.location, self.offset, self.size)
        try:
            return _fetched(self.location, self.offset, _AT_ONCE_BYTES + 1)
        except RemoteError:  # it may be empty, or the server gives no parts
            return _fetched(self.location, self.offset, None)

    def _piece(self, file: BinaryIO, content: bytes = b"") -> BinaryIO:
        there = size_of(file) - self.offset
        size = there if self.size is None else self.size
        if there < size:
            file.close()
            raise _cut(max(0, there), size)
        found = OpenedPart(
            file, [content, (self.offset + len(content), self.offset + size)], self.location
        )
        return io.BufferedReader(found)

    def __str__(self) -> str:
        return self.name or without_secrets(self.location)


class OpenedPart(PiecedFile):
    """A file's part, which closes the file, and remembers an error of reading it.

    libsndfile takes such an error for the end of the file.

    Args:
        file: The file.
        pieces: See `PiecedFile`.
        location: Its path or URL.
    """

    def __init__(self, file: BinaryIO, pieces: Sequence[Piece], location: str) -> None:
        super().__init__(file, pieces)
        self._location = location
        self.error: Exception | None = None

    def readinto(self, buffer: object) -> int:
        """See `PiecedFile`.

        Raises:
            OSError: It can't be read.
            RemoteError: The URL can't be read.
        """
        try:
            return super().readinto(buffer)
        except Exception as error:
            self.error = _translated(self._location, error) if is_url(self._location) else error
            raise self.error from error

    def close(self) -> None:
        """Close it with its file."""
        self._file.close()
        super().close()


def _cut(found: int, size: int) -> OSError:
    return OSError(f"{found} of {size} bytes are there; the file was cut")


@dataclass(frozen=True)
class BytesSource:
    """An `AudioSource`: the bytes of an encoded clip.

    Args:
        content: The bytes.
        name: What to call it.
    """

    content: bytes
    name: str

    def open_binary(self) -> BinaryIO:
        """The bytes as a file."""
        return io.BytesIO(self.content)

    def __str__(self) -> str:
        return self.name


class RemoteEntry(NamedTuple):
    """A file or folder at a URL.

    Args:
        name: Its name.
        url: Its URL.
        is_folder: Whether it is a folder.
    """

    name: str
    url: str
    is_folder: bool


def list_url(url: str) -> list[RemoteEntry]:
    """Return what is right below a URL, sorted by name.

    Raises:
        RemoteError: It can't be listed, or isn't there.
        ConfigError, MissingDependencyError: See `check_url`.
    """
    check_url(url)
    try:
        system, path = _connected(url)
        system.invalidate_cache(path)  # what was added since it was last listed counts
        items = system.ls(path, detail=True)
        found = [
            RemoteEntry(name, system.unstrip_protocol(place), item["type"] == "directory")
            for item in items
            if (place := str(item["name"]).rstrip("/")) != path.rstrip("/")
            and (name := place.rpartition("/")[2])
        ]
    except Exception as error:  # each file system has errors of its own
        raise _translated(url, error) from error
    return sorted(found)


def opened_url(url: str) -> BinaryIO:
    """Open a file at a URL to read it from its beginning on; the caller closes it.

    Raises:
        RemoteError: It can't be opened.
        ConfigError, MissingDependencyError: See `check_url`.
    """
    check_url(url)
    try:
        system, path = _connected(url)
        file: BinaryIO = system.open(path, "rb", block_size=_READ_AHEAD_BYTES)
    except Exception as error:
        raise _translated(url, error) from error
    return file


@lru_cache(maxsize=64)
def _known(protocol: str) -> None:
    try:
        import fsspec

        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        install = install_line("s3" if protocol in _S3 else "share")
        if protocol in _PACKAGES:
            install += f" and pip install {_PACKAGES[protocol]}"
        raise MissingDependencyError(f"{protocol}://: {error}: {install}") from error
    except ValueError as error:
        raise ConfigError(f"{protocol}://: {error}") from None


def check_url(url: str) -> None:
    """Check that fsspec has a file system for this kind of URL; nothing is connected.

    Raises:
        ConfigError: It has none.
        MissingDependencyError: A package is needed for it.
    """
    _known(url.partition("://")[0].rpartition("::")[2].lower())


def _connected(url: str) -> tuple[Any, str]:
    # fsspec keeps one for each process and thread.
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    return system, str(path)


def _fetched(url: str, offset: int, size: int | None) -> bytes:
    try:
        system, path = _connected(url)
        if offset == 0 and size is None:
            return bytes(system.cat_file(path))
        if type(system).__name__ == "SSHFileSystem":  # its `cat_file` reads the whole file
            with system.open(path, "rb") as file:
                file.seek(offset)
                return bytes(file.read(-1 if size is None else size))
        end = None if size is None else offset + size
        return bytes(system.cat_file(path, start=offset, end=end))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise _translated(url, error) from error


def _translated(url: str, error: Exception) -> RemoteError:
    return RemoteError(
        f"{without_secrets(url)}: {first_line(error)}. Check the URL, the credentials and the "
        "connection"
    )

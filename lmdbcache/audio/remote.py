"""Clips at a URL, in a part of a file, or in memory: read without a local copy.

fsspec knows the kinds of URLs; it is imported when the first one is used.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Final, NamedTuple

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
        """The clip's bytes, which are read at once.

        Raises:
            OSError: The file can't be read, or ends before the part does.
            RemoteError: The URL can't be read.
        """
        if is_url(self.location):
            content = _fetched(self.location, self.offset, self.size)
        else:
            with open(self.location, "rb") as file:  # noqa: PTH123 - a name may be no Path
                file.seek(self.offset)
                content = file.read(-1 if self.size is None else self.size)
        if self.size is not None and len(content) != self.size:
            raise OSError(f"{len(content)} of {self.size} bytes are there; the file was cut")
        return io.BytesIO(content)

    def __str__(self) -> str:
        return self.name or without_secrets(self.location)


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

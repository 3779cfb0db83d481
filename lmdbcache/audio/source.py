"""Where a clip's bytes come from: a file, or something that opens like one. No torch here."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias, runtime_checkable

from lmdbcache.audio.remote import FilePart, check_url
from lmdbcache.files import is_url


@runtime_checkable
class AudioSource(Protocol):
    """A clip that isn't a separate file, such as bytes in a table.

    It is compared with `==`, sent to the decoding processes by pickle, and opened there: keep it
    small. `str(source)` is what errors and reports call it.
    """

    def open_binary(self) -> BinaryIO:
        """A new seekable binary file, positioned at its start; the caller closes it.

        Raises:
            OSError: It can't be read.
        """
        ...


# Sample id → source, as a Mapping or as pairs.
Clips: TypeAlias = (
    "Mapping[str, str] | Mapping[str, str | os.PathLike[str] | AudioSource]"
    " | Iterable[tuple[str, str | os.PathLike[str] | AudioSource]]"
)


def as_source(given: str | os.PathLike[str] | AudioSource) -> str | AudioSource:
    """A path as text; a URL as what reads it; a source as it is.

    Raises:
        ConfigError: A URL of a kind that fsspec doesn't know.
        MissingDependencyError: A package is needed for it.
    """
    # Text first: asking whether something has a protocol's methods takes up to 40 µs.
    if isinstance(given, (str, os.PathLike)):
        path = os.fspath(given)
        if not is_url(path):
            return path
        check_url(path)
        return FilePart(path)
    if isinstance(given, AudioSource):
        return given
    raise TypeError(f"{given!r:.80} is neither a path nor an AudioSource with open_binary()")


def open_source(source: str | os.PathLike[str] | AudioSource) -> BinaryIO:
    """Open a source as a binary file.

    Raises:
        OSError: It can't be read, or is something other than a file, such as a pipe, whose reader
            would wait.
        RemoteError: It is a URL that can't be read.
        ValueError: The path has a NUL in it.
    """
    if not isinstance(source, os.PathLike):
        source = as_source(source)
    if isinstance(source, AudioSource) and not isinstance(source, os.PathLike):
        return source.open_binary()
    path = Path(source)
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("a folder, not an audio file" if path.is_dir() else "not a regular file")
    return path.open("rb")


def shown(source: str | os.PathLike[str] | AudioSource) -> str:
    """What to call a source in a message; bytes of a name that aren't UTF-8 are escaped."""
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else str(source)
    return os.fsencode(name).decode("utf-8", "backslashreplace")

"""The place that embeddings are shared through: a folder or bucket that fsspec can reach.

A listing shows what is there now, a file appears whole under its name or not at all, and what
breaks on the way is tried again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Any, Final, Protocol, TypeVar

from lmdbcache.errors import ConfigError, MissingDependencyError, RemoteError
from lmdbcache.exchange.sharing.file_systems import (
    S3,
    call,
    check_known,
    connect,
    first_line,
    is_final,
    read_range,
    started,
    translated,
)
from lmdbcache.files import sync_file

__all__ = ["Remote", "in_parallel", "is_url", "without_secrets"]

_logger: Final = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Item = TypeVar("_Item")

_CONNECTIONS: Final = 8
_PIECE_BYTES: Final = 16 << 20
_TRIES: Final = 5
_FIRST_TRIES: Final = 2  # before the place has answered once
_FIRST_WAIT: Final = 0.5  # seconds; doubled each time
# A file appears there in one step, when all of it has arrived.
_WHOLE_OR_NOTHING: Final = frozenset(
    {*S3, "gs", "gcs", "abfs", "abfss", "az", "adl", "hf", "oss", "memory"}
)
_TEMPORARY_PREFIX: Final = ".uploading-"
_inherited: Final[list[Any]] = []


class Target(Protocol):
    """What a file is fetched into."""

    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def write(self, data: bytes, /) -> Any: ...


class Remote:
    """A place that embeddings are shared through.

    Picklable; a forked process connects anew. Threads may share it.

    `place` is its URL without a password, for people.

    Args:
        url: `s3://bucket/folder`, `file:///mnt/shared/embeddings`, `ssh://host/folder`, …
        storage_options: For the fsspec file system; default: fsspec's configuration and the
            environment (`AWS_ENDPOINT_URL`, `FSSPEC_SSH_USERNAME`, …).

    Raises:
        ConfigError: Not a URL that fsspec knows.
        MissingDependencyError: A package is needed for it.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url: Final = _checked(url)
        self.place: Final = without_secrets(self.url)
        self.protocol: Final = self.url.partition("://")[0]
        self._options = dict(storage_options or {})
        self._has_answered = False
        self._file_system: Any = None
        self._pid = 0
        self._folder = ""
        self._lock = Lock()
        check_known(self.place, self.protocol)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file_system": None, "_has_answered": False, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()

    # ---- looking

    def list_files(self, folder: str) -> dict[str, int]:
        """Return name → bytes of the files right in a folder, as they are now; {} if it is missing.

        Files that are still being uploaded aren't among them.

        Raises:
            RemoteError: The place can't be reached or refuses.
        """
        found = self._list(folder)
        return {
            name: int(item.get("size") or 0)
            for name, item in found.items()
            if item.get("type") == "file" and not name.startswith(_TEMPORARY_PREFIX)
        }

    def list_folders(self, folder: str = "") -> list[str]:
        """Return the names of the folders right in a folder, sorted."""
        found = self._list(folder).items()
        return sorted(name for name, item in found if item.get("type") == "directory")

    def _list(self, folder: str) -> dict[str, dict[str, Any]]:
        def listing(system: Any) -> list[dict[str, Any]]:
            system.invalidate_cache()
            found: list[dict[str, Any]] = system.ls(self._path(folder), detail=True)
            return found

        try:
            items = self._try(listing, folder)
        except FileNotFoundError:
            return {}
        own = self._path(folder).rstrip("/")
        named = {str(item["name"]).rstrip("/"): item for item in items}
        return {posixpath.basename(path): item for path, item in named.items() if path != own}

    # ---- reading

    def read(self, path: str, num_bytes: int) -> bytes:
        """Return a small file's bytes.

        Args:
            path: Below the place.
            num_bytes: How many it has, by a listing.

        Raises:
            RemoteError: It is missing, or can't be read.
        """
        data = self._read(path, lambda system, at: call(system, "cat_file", num_bytes, at))
        if len(data) != num_bytes:
            raise RemoteError(f"{self.place}/{path} gives {len(data)} of {num_bytes} bytes")
        return data

    def read_span(self, path: str, first: int, last: int) -> bytes:
        """Return some bytes of a file.

        Args:
            path: Below the place.
            first: The first byte.
            last: The one after the last.

        Raises:
            RemoteError: It is missing, is shorter, or can't be read.
        """
        data = self._read(path, lambda system, at: read_range(system, at, first, last))
        if len(data) != last - first:
            raise RemoteError(
                f"{self.place}/{path} gives {len(data)} of the {last - first} bytes from {first} on"
            )
        return data

    def fetch(
        self,
        path: str,
        target: Target,
        num_bytes: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Append what is missing of a file, piece by piece; a piece that is cut is tried again.

        Args:
            path: Below the place.
            target: Open for appending; what it holds already isn't read again.
            num_bytes: Size of the whole file.
            progress: Called with the bytes of each piece.

        Raises:
            RemoteError: It is missing, is shorter, or can't be read.
        """
        first = target.seek(0, os.SEEK_END)
        while first < num_bytes:
            last = min(first + _PIECE_BYTES, num_bytes)
            data = self.read_span(path, first, last)
            target.write(data)
            first = last
            if progress is not None:
                progress(len(data))

    # ---- changing

    def write(self, path: str, data: bytes) -> None:
        """Put a file there; it appears when it is whole.

        Raises:
            RemoteError: The place can't be reached or refuses.
            CacheFullError: A disk is full.
        """

        def put(system: Any) -> None:
            target = self._path(path)
            if self.protocol in ("file", "local"):
                _write_local(Path(target), data)
            elif self.protocol in _WHOLE_OR_NOTHING:
                # s3fs would send two parts or more; one PUT is one request, and whole or nothing.
                large = {"chunksize": len(data) + 1} if self.protocol in S3 else {}
                call(system, "pipe_file", len(data), target, data, **large)
            else:
                folder, name = posixpath.split(target)
                temporary = f"{folder}/{_TEMPORARY_PREFIX}{secrets.token_hex(4)}-{name}"
                try:
                    system.makedirs(folder, exist_ok=True)
                    call(system, "pipe_file", len(data), temporary, data)
                    system.mv(temporary, target)
                except BaseException:
                    with contextlib.suppress(Exception):
                        system.rm_file(temporary)
                    raise

        try:
            self._try(put, path)
        except FileNotFoundError as error:
            raise RemoteError(
                f"{self.place}/{path} can't be written: {first_line(error)}. Is there such a "
                "bucket or mount? It isn't made for you"
            ) from None

    def remove(self, path: str) -> None:
        """Remove a file; a missing one is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda system: system.rm_file(self._path(path)), path)

    # ---- how

    def _path(self, path: str) -> str:
        return f"{self._folder}/{path}".rstrip("/") if path else self._folder

    def _read(self, path: str, action: Callable[[Any, str], Any]) -> bytes:
        try:
            return bytes(self._try(lambda system: action(system, self._path(path)), path))
        except FileNotFoundError:
            raise RemoteError(f"{self.place}/{path} isn't there (any more)") from None

    def _fsspec(self) -> Any:
        """Return the file system, of this process alone and with no listing remembered."""
        with self._lock:
            if self._pid != os.getpid() and self._file_system is not None:
                # The parent's connections: ending them here would wait for a loop that isn't
                # running.
                _inherited.append(self._file_system)
            if self._file_system is None or self._pid != os.getpid():
                self._file_system, self._folder = connect(self.url, self.protocol, self._options)
                self._pid = os.getpid()
            return self._file_system

    def _try(self, action: Callable[[Any], _Result], path: str) -> _Result:
        import tenacity

        tries = _TRIES
        if not self._has_answered:
            # A wrong name is more likely; and botocore tries four times more by itself.
            tries = min(tries, 1 if self.protocol in S3 else _FIRST_TRIES)
        used: list[Any] = []

        def once() -> _Result:
            used.append(self._fsspec())
            result = action(used[-1])
            self._has_answered = True
            return result

        def connect_anew(state: Any) -> None:
            error = state.outcome.exception()
            _logger.info("%s/%s: %s; trying again", self.place, path, first_line(error))
            if self._file_system is used[-1]:
                self._file_system = None  # its connection may be the broken one

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(tries),
            wait=tenacity.wait_exponential(_FIRST_WAIT) + tenacity.wait_random(0, _FIRST_WAIT),
            retry=tenacity.retry_if_exception(lambda error: not is_final(error)),
            before_sleep=connect_anew,
            reraise=True,
        )
        try:
            result: _Result = retrying(once)
        except (FileNotFoundError, MissingDependencyError, ConfigError):
            raise
        except Exception as error:  # each file system has errors of its own
            where = f"{self.place}/{path}".rstrip("/")
            raise translated(error, where, len(used)) from error
        return result


def in_parallel(
    action: Callable[[_Item], _Result], items: Iterable[_Item], *, limit: int | None = None
) -> Iterator[tuple[_Item, Future[_Result]]]:
    """Call for each item in a thread, a few ahead of the one that is looked at.

    Calls of fsspec's asynchronous file systems meet in its one event loop, so that threads are all
    it takes to have several transfers at once, of any file system. An exception is raised where
    the result is asked for. When the caller stops, it doesn't wait for those that still run.

    Args:
        action: Called with each item.
        items: Taken one by one, when a thread is free.
        limit: How many run at once; default: 8.

    Yields:
        Each item with its result, in the order of the items.
    """
    running: deque[tuple[_Item, Future[_Result]]] = deque()
    for item in items:
        running.append((item, started(action, item)))
        if len(running) >= (limit or _CONNECTIONS):
            yield running.popleft()
    yield from running


def is_url(text: str) -> bool:
    """Return whether a text is meant as a place of a `Remote`, and not as a store's name."""
    return "://" in text


def without_secrets(url: str) -> str:
    """Return a URL as it may be shown and kept: without the password, if it has one."""
    protocol, colon, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    user, at, name = host.rpartition("@")
    return f"{protocol}{colon}{user.partition(':')[0]}{at}{name}{slash}{path}"


def _checked(url: str) -> str:
    protocol, colon, rest = str(url).partition("://")
    if not colon or not protocol or "::" in url or (not rest.strip("/") and protocol != "memory"):
        raise ConfigError(
            f"{without_secrets(str(url))!r} isn't a place to share through; give a URL such as "
            "s3://bucket/folder, ssh://host/folder or file:///mnt/shared"
        )
    return f"{protocol.lower()}://{rest.rstrip('/')}"


def _write_local(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{_TEMPORARY_PREFIX}{secrets.token_hex(4)}-{target.name}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_file(target.parent)

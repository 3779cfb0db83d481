"""The place that embeddings are shared through: a folder or bucket that fsspec can reach.

Whoever lists sees what is there now, a file appears whole under its name or not at all, and what
breaks on the way is tried again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import random
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from lmdbcache.errors import ConfigError, MissingDependencyError, RemoteError
from lmdbcache.exchange.sharing.remote_errors import (
    first_line,
    is_final,
    missing_package,
    translated,
)
from lmdbcache.exchange.sharing.ssh_connections import is_sshfs, quiet, read_range, ssh_options
from lmdbcache.files import sync_file

__all__ = ["Remote", "is_url", "without_secrets"]

_logger: Final = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_PIECE_BYTES: Final = 16 << 20
_TRIES: Final = 5
_FIRST_TRIES: Final = 2  # before the place has answered once
_FIRST_WAIT: Final = 0.5  # seconds; doubled each time
# A connection that stands still isn't waited for longer than such a slow one would take.
_PATIENCE_SECONDS: Final = 60.0
_SLOWEST_BYTES_PER_SECOND: Final = 64 << 10
# A file appears there in one step, when all of it has arrived.
_WHOLE_OR_NOTHING: Final = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "hf", "oss", "memory"}
)
_S3: Final = ("s3", "s3a")
_TEMPORARY_PREFIX: Final = ".uploading-"
_inherited: Final[list[Any]] = []


class Remote:
    """A place that embeddings are shared through.

    Picklable; a forked process connects anew. Threads may share it.

    `place` is its URL without a password, for people.

    Args:
        url: `s3://bucket/folder`, `file:///mnt/shared/embeddings`, `ssh://host/folder`, …
        storage_options: For the fsspec file system; default: fsspec's configuration and the
            environment (`AWS_ENDPOINT_URL`, `FSSPEC_SSH_USERNAME`, …).
        tries: How often what fails on the way is tried.

    Raises:
        ConfigError: Not a URL that fsspec knows.
        MissingDependencyError: A package is needed for it.
    """

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        tries: int = _TRIES,
    ) -> None:
        self.url: Final = _checked(url)
        self.place: Final = without_secrets(self.url)
        self.protocol: Final = self.url.partition("://")[0]
        self._options = dict(storage_options or {})
        self._tries = tries
        self._has_answered = False
        self._file_system: Any = None
        self._pid = 0
        self._folder = ""
        _check_known(self.place, self.protocol)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file_system": None, "_has_answered": False}

    # ---- looking

    def list_files(self, folder: str) -> dict[str, int]:
        """Name → bytes of the files right in a folder, as they are now; {} if there is none.

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
        """Names of the folders right in a folder, sorted."""
        found = self._list(folder)
        if not found and self.protocol in _S3:
            return self._folders_of_files(folder)
        return sorted(name for name, item in found.items() if item.get("type") == "directory")

    def _folders_of_files(self, folder: str) -> list[str]:
        """The same by the names of all files: some servers (s3rver) list no folder of folders."""
        own = self._path(folder).rstrip("/") + "/"
        try:
            paths = self._try(lambda system: list(system.find(own)), folder)
        except FileNotFoundError:
            return []
        below = [str(path).removeprefix(own) for path in paths if str(path).startswith(own)]
        return sorted({path.partition("/")[0] for path in below if "/" in path})

    def leftovers(self, folder: str) -> dict[str, float | None]:
        """Name → age in seconds of files that uploads have left behind, or are making now."""
        return {
            name: _age(item)
            for name, item in sorted(self._list(folder).items())
            if name.startswith(_TEMPORARY_PREFIX)
        }

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
        """A small file's bytes.

        Args:
            path: Below the place.
            num_bytes: How many it has, by a listing.

        Raises:
            RemoteError: It isn't there, or can't be read.
        """

        def fetch(system: Any) -> bytes:
            return bytes(_call(system, "cat_file", num_bytes, self._path(path)))

        try:
            data = self._try(fetch, path)
        except FileNotFoundError:
            raise RemoteError(f"{self.place}/{path} isn't there (any more)") from None
        if len(data) != num_bytes:
            raise RemoteError(f"{self.place}/{path} gives {len(data)} of {num_bytes} bytes")
        return data

    def fetch(
        self,
        path: str,
        target: BinaryIO,
        num_bytes: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Append what is missing of a file, piece by piece; each is tried again if it is cut.

        Args:
            path: Below the place.
            target: Open for appending; what it holds already isn't read again.
            num_bytes: Of the whole file.
            progress: Called with the bytes of each piece.

        Raises:
            RemoteError: It isn't there, is shorter, or can't be read.
        """
        first = target.seek(0, os.SEEK_END)
        while first < num_bytes:
            last = min(first + _PIECE_BYTES, num_bytes)

            def piece(system: Any, first: int = first, last: int = last) -> bytes:
                return _range(system, self._path(path), first, last)

            try:
                data = self._try(piece, path)
            except FileNotFoundError:
                raise RemoteError(f"{self.place}/{path} isn't there (any more)") from None
            if not 0 < len(data) <= last - first:
                raise RemoteError(
                    f"{self.place}/{path} gives {len(data)} bytes where {last - first} of "
                    f"{num_bytes} should follow the first {first}"
                )
            target.write(data)
            first += len(data)
            if progress is not None:
                progress(len(data))

    def read_span(self, path: str, first: int, last: int) -> bytes:
        """Some bytes of a file.

        Args:
            path: Below the place.
            first: The first byte.
            last: The one after the last.

        Raises:
            RemoteError: It isn't there, is shorter, or can't be read.
        """
        try:
            data = self._try(lambda system: _range(system, self._path(path), first, last), path)
        except FileNotFoundError:
            raise RemoteError(f"{self.place}/{path} isn't there (any more)") from None
        if len(data) != last - first:
            raise RemoteError(
                f"{self.place}/{path} gives {len(data)} of the {last - first} bytes from {first} on"
            )
        return data

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
                large = {"chunksize": len(data) + 1} if self.protocol in _S3 else {}
                _call(system, "pipe_file", len(data), target, data, **large)
            else:
                folder, name = posixpath.split(target)
                temporary = f"{folder}/{_TEMPORARY_PREFIX}{secrets.token_hex(4)}-{name}"
                try:
                    system.makedirs(folder, exist_ok=True)
                    _call(system, "pipe_file", len(data), temporary, data)
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
        """Remove a file; none there is fine. Only a repair does this."""
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda system: system.rm_file(self._path(path)), path)

    # ---- how

    def _path(self, path: str) -> str:
        return f"{self._folder}/{path}".rstrip("/") if path else self._folder

    def _fsspec(self) -> Any:
        """The file system, of this process alone and with no listing remembered."""
        if self._pid != os.getpid() and self._file_system is not None:
            # The parent's connections: ending them here would wait for a loop that isn't running.
            _inherited.append(self._file_system)
        if self._file_system is None or self._pid != os.getpid():
            self._file_system, self._folder = _connect(self.url, self.protocol, self._options)
            self._pid = os.getpid()
        return self._file_system

    def _try(self, action: Callable[[Any], _Result], path: str) -> _Result:
        wait, number, tries = _FIRST_WAIT, 0, self._tries
        if not self._has_answered:
            # A wrong name is more likely; and botocore tries four times more by itself.
            tries = min(tries, 1 if self.protocol in _S3 else _FIRST_TRIES)
        while True:
            number += 1
            try:
                result = action(self._fsspec())
            except (FileNotFoundError, MissingDependencyError, ConfigError):
                raise
            except Exception as error:  # each file system has errors of its own
                if number >= tries or is_final(error):
                    raise translated(error, f"{self.place}/{path}".rstrip("/"), number) from error
                _logger.info("%s/%s: %s; trying again", self.place, path, first_line(error))
                self._file_system = None  # its connection may be the broken one
                time.sleep(wait * random.uniform(0.5, 1.5))
                wait *= 2
            else:
                self._has_answered = True
                return result


def is_url(text: str) -> bool:
    """Whether this is meant as a place of a `Remote`, and not as a store's name."""
    return "://" in text


def without_secrets(url: str) -> str:
    """A URL as it may be shown and kept: without the password, if it has one."""
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


def _check_known(place: str, protocol: str) -> None:
    """Whether there is a file system for this kind of URL; nothing is connected."""
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise missing_package(protocol, "fsspec") from error
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise missing_package(protocol, str(error)) from error
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def _connect(url: str, protocol: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    import fsspec

    if protocol in _S3:
        # Many servers that speak S3 don't know the checksums that newer clients add.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    system, folder = fsspec.core.url_to_fs(
        url, skip_instance_cache=True, **ssh_options(protocol, options)
    )
    if protocol in _S3:
        system.retries = 1  # of its own, inside each of ours
    if is_sshfs(system):
        quiet(system)
    return system, str(folder).rstrip("/")


def _call(system: Any, method: str, num_bytes: int, *args: Any, **options: Any) -> Any:
    """Call a file system, and give up when nothing comes back for far too long."""
    if system.async_impl:
        options["timeout"] = _limit(num_bytes)
    return getattr(system, method)(*args, **options)


def _age(item: Mapping[str, Any]) -> float | None:
    modified = item.get("mtime") or item.get("LastModified") or item.get("created")
    if isinstance(modified, datetime):
        modified = modified.timestamp()
    return time.time() - modified if isinstance(modified, (int, float)) else None


def _limit(num_bytes: int) -> float:
    return _PATIENCE_SECONDS + num_bytes / _SLOWEST_BYTES_PER_SECOND


def _range(system: Any, path: str, first: int, last: int) -> bytes:
    if is_sshfs(system):
        return read_range(system, path, first, last, _limit(last - first))
    return bytes(_call(system, "cat_file", last - first, path, start=first, end=last))


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

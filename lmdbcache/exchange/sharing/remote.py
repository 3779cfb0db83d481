"""The place that embeddings are shared through: a folder or bucket that fsspec can reach.

A listing shows what is there now, a file appears whole under its name or not at all, and what
breaks on the way is tried again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import posixpath
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Final, TypeVar

from lmdbcache.errors import (
    CacheFullError,
    ConfigError,
    IntegrityError,
    MissingDependencyError,
    RemoteError,
)
from lmdbcache.files import (
    expand_user,
    first_line,
    is_url as is_url,
    replace_file,
    sync_file,
    without_secrets,
)
from lmdbcache.machine import install_line

_logger: Final = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Item = TypeVar("_Item")

CONNECTIONS: Final = 8
_PIECE_BYTES: Final = 16 << 20
_TRIES: Final = 5
_FIRST_TRIES: Final = 2  # before the place has answered once
_FIRST_WAIT: Final = 0.5  # seconds; doubled each time
# A call that stands still isn't waited for longer than such a slow connection would take.
_PATIENCE_SECONDS: Final = 60.0
_SLOWEST_BYTES_PER_SECOND: Final = 64 << 10

_LOCAL: Final = ("file", "local")
_S3: Final = ("s3", "s3a")
_SSH: Final = ("ssh", "sftp")
# A file appears there in one step, when all of it has arrived.
_WHOLE_OR_NOTHING: Final = frozenset(
    {*_S3, "gs", "gcs", "abfs", "abfss", "az", "adl", "hf", "oss", "memory"}
)
_PACKAGES: Final = {
    **dict.fromkeys(_SSH, "sshfs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "az"), "adlfs"),
    "hf": "huggingface_hub",
}
_SSH_OPTIONS: Final = {
    # asyncssh's own default, ~/.ssh/known_hosts; sshfs's is to trust any host.
    "known_hosts": (),
    # Without these a connection that stands still is waited for without end.
    "connect_timeout": 30,
    "login_timeout": 30,
    "keepalive_interval": 15,
    "keepalive_count_max": 3,
}
# Trying again is useless after one of these.
_FINAL_ERRORS: Final = (
    *(FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError),
    *(TypeError, NotImplementedError, MemoryError, MissingDependencyError, ConfigError),
)
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_FINAL_ERRNOS: Final = (*_FULL, errno.EROFS, errno.ENAMETOOLONG)
_FINAL_WORDS: Final = ("Credentials", "Token", "Permission", "HostKey")


class Remote:
    """A place that embeddings are shared through; threads may share it.

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
        self._protocol: Final = self.url.partition("://")[0]
        self._options = dict(storage_options or {})
        self._has_answered = False
        self._system: Any = None
        self._folder = ""
        self._lock = Lock()
        _check_known(self.place, self._protocol)

    # ---- looking

    def list_files(self, folder: str) -> dict[str, int]:
        """Return name → bytes of the files right in a folder, as they are now; {} if it is missing.

        Files that are still being uploaded aren't among them: their names begin with a dot.

        Raises:
            RemoteError: The place can't be reached or refuses.
        """
        return {
            name: int(item.get("size") or 0)
            for name, item in self._list(folder).items()
            if item.get("type") == "file" and not name.startswith(".")
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

    def read(
        self, path: str, first: int, last: int, check: Callable[[bytes], object] | None = None
    ) -> bytes:
        """Return some bytes of a file.

        Args:
            path: Below the place.
            first: The first byte.
            last: The one after the last.
            check: Raises an IntegrityError if the bytes are damaged. They are then read again, as
                it may have been on the way.

        Raises:
            RemoteError: It is missing, is shorter, or can't be read.
            IntegrityError: The check fails twice.
        """
        data = self._exactly(path, first, last)
        if check is not None:
            try:
                check(data)
            except IntegrityError:
                data = self._exactly(path, first, last)
                check(data)
        return data

    def _exactly(self, path: str, first: int, last: int) -> bytes:
        try:
            data = self._try(lambda system: self._range(system, path, first, last), path)
        except FileNotFoundError:
            raise RemoteError(f"{self.place}/{path} isn't there (any more)") from None
        if len(data) != last - first:
            raise RemoteError(
                f"{self.place}/{path} gives {len(data)} of the {last - first} bytes from {first} on"
            )
        return data

    def pieces(self, path: str, first: int, last: int) -> Iterator[bytes]:
        """Yield some bytes of a large file, piece by piece; a piece that is cut is tried again.

        Raises:
            RemoteError: See `read`.
        """
        for start in range(first, last, _PIECE_BYTES):
            yield self.read(path, start, min(start + _PIECE_BYTES, last))

    def _range(self, system: Any, path: str, first: int, last: int) -> bytes:
        target, patience = self._path(path), _patience(last - first)
        if not _is_sshfs(type(system)):
            options = {"timeout": patience} if system.async_impl else {}
            return bytes(system.cat_file(target, start=first, end=last, **options))

        # sshfs's `cat_file` reads the whole file, and closing one on a lost connection never
        # returns.
        def read() -> bytes:
            with system.open(target, "rb") as file:
                file.seek(first)
                return bytes(file.read(last - first))

        return _started(read).result(patience)

    # ---- changing

    def write(self, path: str, data: bytes) -> None:
        """Put a file there; it appears when it is whole.

        Raises:
            RemoteError: The place can't be reached or refuses.
            CacheFullError: A disk is full.
        """
        try:
            self._try(lambda system: self._put(system, self._path(path), data), path)
        except FileNotFoundError as error:
            raise RemoteError(
                f"{self.place}/{path} can't be written: {first_line(error)}. Is there such a "
                "bucket or mount? It isn't made for you"
            ) from None

    def _put(self, system: Any, target: str, data: bytes) -> None:
        if self._protocol in _LOCAL:
            file = Path(target)
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, data, durable=True)
            sync_file(file.parent)
            return
        options: dict[str, Any] = {"timeout": _patience(len(data))} if system.async_impl else {}
        if self._protocol in _S3:
            # s3fs would send two parts or more; one PUT is one request, and whole or nothing.
            options["chunksize"] = len(data) + 1
        if self._protocol in _WHOLE_OR_NOTHING:
            system.pipe_file(target, data, **options)
            return
        folder, name = posixpath.split(target)
        temporary = f"{folder}/.uploading-{secrets.token_hex(4)}-{name}"
        try:
            system.makedirs(folder, exist_ok=True)
            system.pipe_file(temporary, data, **options)
            system.mv(temporary, target)
        except BaseException:
            with contextlib.suppress(Exception):
                system.rm_file(temporary)
            raise

    def remove(self, path: str) -> None:
        """Remove a file; a missing one is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda system: system.rm_file(self._path(path)), path)

    # ---- how

    def _path(self, path: str) -> str:
        return f"{self._folder}/{path}".rstrip("/") if path else self._folder

    def _connected(self) -> Any:
        with self._lock:
            if self._system is None:
                self._system, self._folder = _connect(self.url, self._protocol, self._options)
            return self._system

    def _try(self, action: Callable[[Any], _Result], path: str) -> _Result:
        """Call with the file system, several times if need be."""
        import tenacity

        tries = _TRIES
        if not self._has_answered:
            # A wrong name is more likely; and botocore tries four times more by itself.
            tries = min(tries, 1 if self._protocol in _S3 else _FIRST_TRIES)
        used: list[Any] = []

        def once() -> _Result:
            used.append(self._connected())
            result = action(used[-1])
            self._has_answered = True
            return result

        def connect_anew(state: Any) -> None:
            error = state.outcome.exception()
            _logger.info("%s/%s: %s; trying again", self.place, path, first_line(error))
            if self._system is used[-1]:
                self._system = None  # its connection may be the broken one

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(tries),
            wait=tenacity.wait_exponential(_FIRST_WAIT) + tenacity.wait_random(0, _FIRST_WAIT),
            retry=tenacity.retry_if_exception(lambda error: not _is_final(error)),
            before_sleep=connect_anew,
            reraise=True,
        )
        try:
            result: _Result = retrying(once)
        except (FileNotFoundError, MissingDependencyError, ConfigError):
            raise
        except Exception as error:  # each file system has errors of its own
            where = f"{self.place}/{path}".rstrip("/")
            raise _translated(error, where, len(used)) from error
        return result


# ---- several at once


def in_parallel(
    action: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[tuple[_Item, Future[_Result]]]:
    """Call for each item in a thread, a few ahead of the one that is looked at.

    Calls of fsspec's asynchronous file systems meet in its one event loop, so that threads are all
    it takes to have several transfers at once, of any file system. An exception is raised where
    the result is asked for. When the caller stops, it doesn't wait for those that still run.

    Yields:
        Each item with its result, in the order of the items.
    """
    running: deque[tuple[_Item, Future[_Result]]] = deque()
    for item in items:
        running.append((item, _started(action, item)))
        if len(running) >= CONNECTIONS:
            yield running.popleft()
    yield from running


def _started(action: Callable[..., _Result], *arguments: Any) -> Future[_Result]:
    """Call in a thread that isn't waited for, not even at the end of the process."""
    done: Future[_Result] = Future()

    def run() -> None:
        try:
            done.set_result(action(*arguments))
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    return done


# ---- URLs


def _checked(url: str) -> str:
    protocol, colon, rest = str(url).partition("://")
    if not colon or not protocol or "::" in url or (not rest.strip("/") and protocol != "memory"):
        example = "file:///mnt/shared"
        if not colon and os.sep in url:
            example = expand_user(url).absolute().as_uri()
        raise ConfigError(
            f"{without_secrets(str(url))!r} isn't a place to share through; give a URL first, such "
            f"as s3://bucket/folder, ssh://host/folder or {example}"
        )
    return f"{protocol.lower()}://{rest.rstrip('/')}"


# ---- the quirks of fsspec's file systems


def _check_known(place: str, protocol: str) -> None:
    """Check that fsspec has a file system for this kind of URL; nothing is connected."""
    install = install_line("share")
    try:
        import fsspec
        import tenacity  # noqa: F401 - needed later

        package = _PACKAGES.get(protocol, "what it names")
        install = install_line("s3") if protocol in _S3 else f"pip install {package}"
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise MissingDependencyError(f"{protocol}://: {error}: {install}") from error
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def _connect(url: str, protocol: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return a file system that no one else uses, and the folder that the URL names in it."""
    import fsspec

    own = dict(options)
    is_ssh = protocol in _SSH and _is_sshfs(fsspec.get_filesystem_class(protocol))
    if protocol in _S3:
        own["config_kwargs"] = _s3_settings(protocol, options)
    elif is_ssh:
        own = {**_SSH_OPTIONS, **fsspec.config.conf.get(protocol, {}), **options}
    system, folder = fsspec.core.url_to_fs(url, skip_instance_cache=True, **own)
    if protocol in _S3:
        system.retries = 1  # its own, inside each of ours
    elif is_ssh:
        # asyncssh's tasks raise on a lost connection what the call itself raises as well.
        system.loop.set_exception_handler(lambda _, context: _logger.debug("%r", context))
    return system, str(folder).rstrip("/")


def _s3_settings(protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return botocore's settings: many servers don't know the checksums that newer clients add."""
    import fsspec
    from botocore.config import Config

    name, own = "request_checksum_calculation", {}
    if hasattr(Config(), name) and f"AWS_{name.upper()}" not in os.environ:
        own = {name: "when_required"}
    configured = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
    return {**own, **configured, **options.get("config_kwargs", {})}


def _is_sshfs(kind: type) -> bool:
    return kind.__name__ == "SSHFileSystem"


def _patience(num_bytes: int) -> float:
    """Return the seconds after which a call that moves so many bytes is given up."""
    return _PATIENCE_SECONDS + num_bytes / _SLOWEST_BYTES_PER_SECOND


def _is_final(error: BaseException) -> bool:
    return (
        not isinstance(error, Exception)
        or isinstance(error, _FINAL_ERRORS)
        or getattr(error, "errno", None) in _FINAL_ERRNOS
        or any(word in type(error).__name__ for word in _FINAL_WORDS)
    )


def _translated(error: Exception, place: str, tries: int) -> CacheFullError | RemoteError:
    """Return our error for what a file system raised."""
    reason, kind = first_line(error), type(error).__name__
    if isinstance(error, OSError) and error.errno in _FULL:
        return CacheFullError(f"{place}: the disk is full. Free space and go on")
    if "Credentials" in kind:
        return RemoteError(
            f"{place}: no credentials ({reason}). Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or what this kind of place takes"
        )
    if isinstance(error, PermissionError) or "Permission" in kind:
        return RemoteError(f"{place}: permission denied ({reason}). Check the credentials")
    if "HostKey" in kind:  # asyncssh's
        return RemoteError(
            f"{place}: the host's key isn't the one in ~/.ssh/known_hosts, or isn't there "
            f"({reason}). Connect with ssh once, compare the key it shows, and try again"
        )
    often = f", tried {tries} times" if tries > 1 else ""
    return RemoteError(f"{place}: {reason}{often}. Check the URL and the connection, and try again")

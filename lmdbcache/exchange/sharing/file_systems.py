"""The quirks of fsspec's file systems: connecting, errors, ssh, calls that never return."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Thread
from typing import Any, Final, TypeVar

from lmdbcache.errors import CacheFullError, ConfigError, MissingDependencyError, RemoteError

__all__ = [
    "S3",
    "call",
    "check_known",
    "connect",
    "first_line",
    "is_final",
    "read_range",
    "started",
    "translated",
]

_logger: Final = logging.getLogger(__name__)
_Result = TypeVar("_Result")

S3: Final = ("s3", "s3a")
_SSH: Final = ("ssh", "sftp")
_PACKAGES: Final = {
    **dict.fromkeys(S3, '"lmdbcache[s3]"'),
    **dict.fromkeys(_SSH, "sshfs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "az"), "adlfs"),
    "hf": "huggingface_hub",
}
_FINAL_ERRORS: Final = (
    *(FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError),
    *(TypeError, NotImplementedError, MemoryError, MissingDependencyError, ConfigError),
)
_FINAL_ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
# A call that stands still isn't waited for longer than such a slow connection would take.
_PATIENCE_SECONDS: Final = 60.0
_SLOWEST_BYTES_PER_SECOND: Final = 64 << 10
_SSH_OPTIONS: Final = {
    # asyncssh's own default, ~/.ssh/known_hosts; sshfs's is to trust any host.
    "known_hosts": (),
    # Without these a connection that stands still is waited for without end.
    "connect_timeout": 30,
    "login_timeout": 30,
    "keepalive_interval": 15,
    "keepalive_count_max": 3,
}


def check_known(place: str, protocol: str) -> None:
    """Check that fsspec has a file system for this kind of URL; nothing is connected.

    Raises:
        MissingDependencyError: A package is missing.
        ConfigError: fsspec doesn't know this kind.
    """
    package = '"lmdbcache[share]"'
    try:
        import fsspec
        import tenacity  # noqa: F401 - needed later

        package = _PACKAGES.get(protocol, "what it names")
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise MissingDependencyError(f"{protocol}://: {error}: pip install {package}") from error
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def connect(url: str, protocol: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return a file system of this process alone, and the folder that the URL names in it."""
    import fsspec

    own = dict(options)
    is_ssh = protocol in _SSH and _is_sshfs(fsspec.get_filesystem_class(protocol))
    if protocol in S3:
        own["config_kwargs"] = _s3_settings(protocol, options)
    elif is_ssh:
        own = {**_SSH_OPTIONS, **fsspec.config.conf.get(protocol, {}), **options}
    system, folder = fsspec.core.url_to_fs(url, skip_instance_cache=True, **own)
    if protocol in S3:
        system.retries = 1  # its own, inside each of ours
    elif is_ssh:
        system.loop.set_exception_handler(_note)
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


def _note(_: Any, context: Mapping[str, Any]) -> None:
    """Log what asyncssh's tasks raise on a lost connection; the call itself raises it as well."""
    _logger.debug("%s: %r", context.get("message"), context.get("exception"))


def call(system: Any, method: str, num_bytes: int, *args: Any, **options: Any) -> Any:
    """Call a method that moves so many bytes, and give up if nothing comes back for far too long.

    Raises:
        TimeoutError: Nothing came back.
    """
    if system.async_impl:
        options["timeout"] = _limit(num_bytes)
    return getattr(system, method)(*args, **options)


def read_range(system: Any, path: str, first: int, last: int) -> bytes:
    """Return the bytes of a file from `first` up to `last`."""
    if not _is_sshfs(type(system)):
        return bytes(call(system, "cat_file", last - first, path, start=first, end=last))

    # sshfs's `cat_file` reads the whole file, and closing one on a lost connection never returns.
    def read() -> bytes:
        with system.open(path, "rb") as file:
            file.seek(first)
            return bytes(file.read(last - first))

    return started(read).result(_limit(last - first))


def started(action: Callable[..., _Result], *arguments: Any) -> Future[_Result]:
    """Call in a thread that isn't waited for, not even at the end of the process."""
    done: Future[_Result] = Future()

    def run() -> None:
        try:
            done.set_result(action(*arguments))
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    return done


def _limit(num_bytes: int) -> float:
    return _PATIENCE_SECONDS + num_bytes / _SLOWEST_BYTES_PER_SECOND


def is_final(error: BaseException) -> bool:
    """Return whether trying again is useless."""
    if not isinstance(error, Exception) or isinstance(error, _FINAL_ERRORS):
        return True
    if isinstance(error, OSError) and error.errno in _FINAL_ERRNOS:
        return True
    words = ("Credentials", "Token", "Permission", "HostKey")
    return any(word in type(error).__name__ for word in words)


def translated(error: Exception, place: str, tries: int) -> CacheFullError | RemoteError:
    """Return our error for what a file system raised."""
    reason, kind = first_line(error), type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
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


def first_line(error: BaseException) -> str:
    """Return an error's type and the beginning of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__

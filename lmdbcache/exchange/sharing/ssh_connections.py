"""What sshfs needs to be told: hosts are known, no wait is endless, no tracebacks are printed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Thread
from typing import Any, Final, TypeVar

__all__ = ["is_sshfs", "quiet", "read_range", "ssh_options"]

_logger: Final = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_PROTOCOLS: Final = ("ssh", "sftp")
_OPTIONS: Final = {
    # asyncssh's own default, ~/.ssh/known_hosts; sshfs's is to trust any host.
    "known_hosts": (),
    # Without these a connection that stands still is waited for without end.
    "connect_timeout": 30,
    "login_timeout": 30,
    "keepalive_interval": 15,
    "keepalive_count_max": 3,
}


def ssh_options(protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for this protocol's file system: the given ones, and ours if it is sshfs's."""
    import fsspec

    if protocol not in _PROTOCOLS:
        return dict(options)
    if fsspec.get_filesystem_class(protocol).__name__ != "SSHFileSystem":
        return dict(options)
    return {**_OPTIONS, **fsspec.config.conf.get(protocol, {}), **options}


def is_sshfs(system: Any) -> bool:
    """Whether this file system is sshfs's."""
    return type(system).__name__ == "SSHFileSystem"


def quiet(system: Any) -> None:
    """Log what asyncssh's tasks raise on a lost connection; the call itself raises, too."""

    def note(_: Any, context: Mapping[str, Any]) -> None:
        _logger.debug("%s: %r", context.get("message"), context.get("exception"))

    system.loop.set_exception_handler(note)


def read_range(system: Any, path: str, first: int, last: int, seconds: float) -> bytes:
    """A part of a file: sshfs's `cat_file` always gives the whole one.

    Raises:
        TimeoutError: Nothing came for so long.
    """

    def read() -> bytes:
        with system.open(path, "rb") as file:
            file.seek(first)
            return bytes(file.read(last - first))

    return _within(seconds, read)


def _within(seconds: float, action: Callable[[], _Result]) -> _Result:
    """Call what may never return: sshfs waits for ever to close a file of a lost connection."""
    done: Future[_Result] = Future()

    def run() -> None:
        try:
            done.set_result(action())
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    return done.result(seconds)

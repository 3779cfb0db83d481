"""A Ray cluster from the driver's side: reached or started, kept quiet, and what it has."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from lmdbcache.errors import ConfigError, ExtractionError, MissingDependencyError

__all__ = ["Pool", "check_device", "connected", "first_line", "pool_for"]

_logger: Final = logging.getLogger("lmdbcache.extraction")
# Read when ray is imported or started. What fails on a node comes back as our own errors; Ray
# would also print what it repairs, part of it on standard output.
_QUIET: Final = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_MOST_LEVEL: Final = logging.CRITICAL + 1
_REACH_SECONDS: Final = 10.0


class Pool(NamedTuple):
    """The processes that run the model.

    Args:
        num_actors: How many.
        num_gpus: GPUs of each: 0 or 1.
        num_threads: CPU threads of each.
    """

    num_actors: int
    num_gpus: int
    num_threads: int


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The package ray, connected to a cluster.

    A program that has called `ray.init` itself stays connected; otherwise a cluster on this machine
    that was started here ends with the block.

    Args:
        address: `host:port` or `"auto"`; None takes `RAY_ADDRESS`, else a cluster that runs on
            this machine, else starts one here.

    Raises:
        MissingDependencyError: ray isn't installed.
        ConfigError: A `ray://` address.
        ExtractionError: There is no cluster at this address.
    """
    asked = address or os.environ.get("RAY_ADDRESS") or ""
    if asked.startswith("ray://"):
        raise ConfigError(
            "ray address: ray:// is Ray's client, which ray.data can't be driven through; start "
            "the command on a node of the cluster, or by `ray job submit`, with --ray-address auto"
        )
    is_quiet = not _logger.isEnabledFor(logging.INFO)
    _check_reachable(asked)
    with contextlib.ExitStack() as stack:
        if is_quiet:
            stack.enter_context(_environment(_QUIET))
        ray = _imported()
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            with _signals_kept(), _no_stderr() if is_quiet else contextlib.nullcontext():
                _start(ray, address, is_quiet=is_quiet)
        stack.enter_context(_data_settings(ray, is_quiet=is_quiet))
        yield ray


def pool_for(ray: Any, num_units: int, num_actors: int | None, device: str | None) -> Pool:
    """How many processes run the model, and what each of them has.

    Args:
        ray: The package, connected.
        num_units: Units of work.
        num_actors: None: one for each GPU; without GPUs, one for each node.
        device: `"cpu"` leaves GPUs alone, `"cuda"` waits for one; None takes what there is.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [node["CPU"] for node in nodes if node.get("CPU")]
    gpus = 0 if device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    wanted = num_actors or gpus or len(cpus) or 1
    found = max(1, min(wanted, num_units))
    # Half of the cores decode.
    threads = max(1, int(min(sum(cpus) / (2 * found), min(cpus, default=1))))
    pool = Pool(found, 1 if gpus or device == "cuda" else 0, threads)
    _logger.info("%d nodes, %d CPUs, %d GPUs: %s", len(nodes), int(sum(cpus)), gpus, pool)
    return pool


def first_line(error: BaseException) -> str:
    """What a Ray error is about: its texts are whole tracebacks, whose last line says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    is_traceback = any(line.startswith("Traceback ") or "ray::" in line for line in lines)
    return (lines[-1 if is_traceback else 0] if lines else type(error).__name__)[:500]


def _imported() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(
            f'extraction on Ray needs ray[data] ({error}): pip install "lmdbcache[ray]", on every '
            "node"
        ) from error
    return ray


def check_device(device: str | None) -> None:
    """Whether processes on nodes can be given this.

    Raises:
        ConfigError: They can't.
    """
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(
            f"device: {device!r}; on Ray each process has a GPU of its own: use 'cuda' or 'cpu'"
        )


def _start(ray: Any, address: str | None, *, is_quiet: bool) -> None:
    try:
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=not is_quiet,
            logging_level=_MOST_LEVEL if is_quiet else logging.INFO,
        )
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        raise _no_cluster(address or os.environ.get("RAY_ADDRESS") or "", error) from error


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return  # auto, local
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ExtractionError:
    return ExtractionError(
        f"no Ray cluster at {address or 'this machine'} ({first_line(error)}). `ray status` tells "
        "what runs; without an address one is started here"
    )


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Settings that aren't there already; a cluster that is started here inherits them."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """While Ray's C++ starts it prints that it was told to be quiet."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Starting Ray takes SIGTERM for itself; whoever had it before keeps it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _data_settings(ray: Any, *, is_quiet: bool) -> Iterator[None]:
    """No bars and logs of Ray beside ours, as far as that is asked for."""
    context = ray.data.DataContext.get_current()
    shown = context.enable_progress_bars, context.print_on_execution_start
    logger = logging.getLogger("ray.data")
    level = logger.level
    context.enable_progress_bars = False
    if is_quiet:
        context.print_on_execution_start = False
        logger.setLevel(_MOST_LEVEL)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = shown
        logger.setLevel(level)
        sys.stdout.flush()

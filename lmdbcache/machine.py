"""What surrounds a process: cores, memory, other processes, boot, and our environment variables."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lmdbcache.errors import MissingDependencyError

# The variables are named here and nowhere else.
ROOT_VARIABLE: Final = "LMDBCACHE_ROOT"
NETWORK_VARIABLE: Final = "LMDBCACHE_ALLOW_NETWORK"
SKIP_VARIABLE: Final = "LMDBCACHE_SKIP_FIRST_CHECK"
STATISTICS_VARIABLE: Final = "LMDBCACHE_STATISTICS"


@dataclass(frozen=True)
class Variable:
    """An environment variable.

    Args:
        name: Of the variable.
        default: What holds where it isn't set; may be empty.
        meaning: What it decides, in a few words.
    """

    name: str
    default: str
    meaning: str


def dataset_root_variable(namespace: str) -> str:
    """Return the variable that names the folder of a dataset: `LMDBCACHE_VEGAS_ROOT`."""
    return f"LMDBCACHE_{namespace.upper()}_ROOT"


VARIABLES: Final = (
    Variable(ROOT_VARIABLE, "the user's cache directory", "the cache directory"),
    Variable(NETWORK_VARIABLE, "0", "1: use stores on network file systems"),
    Variable(
        SKIP_VARIABLE,
        "0",
        "1: open a store that this machine didn't write unchecked; values: check its structure",
    ),
    Variable(STATISTICS_VARIABLE, "1", "0: don't count hits and misses"),
    *(
        Variable(dataset_root_variable(namespace), "", f"the folder of {dataset}")
        for namespace, dataset in (
            ("vegas", "VEGASDataset"),
            ("esc50", "ESC50Dataset"),
            ("vggsound", "VGGSoundDataset"),
        )
    ),
)

_NO_LIMIT: Final = 1 << 62
_MEMBERSHIP: Final = Path("/proc/self/cgroup")
_MOUNT: Final = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Return the cores that SLURM or `taskset` left to this process; on macOS, all of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@functools.cache
def memory_limit() -> int:
    """Return the bytes of the machine, or what a container or a batch job leaves of them."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        memory = _NO_LIMIT
    return min(memory, cgroup_limit(_MEMBERSHIP, _MOUNT))


@contextlib.contextmanager
def needing(purpose: str, extra: str) -> Iterator[None]:
    """Around an import: say what the package is for, and how it is installed.

    Args:
        purpose: Such as `"running a module"`.
        extra: The extra that has it, such as `"audio"`.

    Raises:
        MissingDependencyError: It can't be imported.
    """
    try:
        yield
    except (ImportError, OSError) as error:  # OSError: a package without its shared library
        raise MissingDependencyError(
            f"{purpose} needs a package that can't be imported ({error}); install it with: "
            f"{install_line(extra)}"
        ) from error


@functools.cache
def install_line(extra: str) -> str:
    """Return the command that installs an extra; of a checkout also the one for its folder.

    Args:
        extra: Such as `"audio"`.
    """
    import importlib.metadata
    import json
    import urllib.parse

    line = f'pip install "lmdbcache[{extra}]"'
    try:
        record = importlib.metadata.distribution("lmdbcache").read_text("direct_url.json")
        direct = json.loads(record or "{}")
        folder = urllib.parse.urlsplit(direct.get("url", ""))
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError):
        return line
    if folder.scheme != "file":
        return line
    option = "-e " if direct.get("dir_info", {}).get("editable") else ""
    path = urllib.parse.unquote(folder.path)
    return f'{line}, or from where this one was installed pip install {option}"{path}[{extra}]"'


def is_alive(process: int) -> bool:
    """Return whether a process of this machine is running, this user's or not."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return True


def boot_id() -> str:
    """Return what the kernel calls this run of the machine; empty where it doesn't say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def cgroup_limit(membership: Path, mount: Path) -> int:
    """Return the lowest limit of a control group and of those above it, version 1 or 2.

    Args:
        membership: A process's /proc/<pid>/cgroup.
        mount: Where control groups are mounted.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return _NO_LIMIT
    limit = _NO_LIMIT
    for line in lines:  # 0::/path, or 4:memory:/path
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if "memory" in controllers.split(","):
            top, name = mount / "memory", "memory.limit_in_bytes"
        elif number == "0":
            top, name = mount, "memory.max"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            limit = min(limit, _number_in(top.joinpath(*parts[:depth], name)))
    return limit


def _number_in(file: Path) -> int:
    try:
        text = file.read_bytes().strip()
    except OSError:
        return _NO_LIMIT
    # No regular expression: compiling it takes longer than the rest of this.
    return (int(text) or _NO_LIMIT) if text.isdigit() and len(text) < 20 else _NO_LIMIT

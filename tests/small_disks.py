"""Small file systems that tests fill up."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system in memory; the test is skipped where that isn't allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if (
        not shutil.which("mount")
        or subprocess.run(command, check=False, capture_output=True).returncode
    ):
        pytest.skip("a small file system can't be mounted here: that needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    """A file that leaves so many bytes free; others may write at the same time."""
    with (folder / "ballast").open("ab") as file:
        for _ in range(100):
            extra = shutil.disk_usage(folder).free - leave
            if extra <= 0:
                return
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), file.tell(), extra)
                file.seek(0, os.SEEK_END)


def empty(folder: Path) -> None:
    (folder / "ballast").unlink(missing_ok=True)

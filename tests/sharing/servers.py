"""Servers that push and pull are tried with: moto speaks S3, asyncssh speaks SFTP.

moto's botocore isn't s3fs's, so it lives in an environment of its own beside the tests'
(tools/install_test_programs.sh makes it). Each server listens on a port that the system chose.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS = Path(sys.prefix) / "servers" / "bin"
PATIENCE = 240.0
ACCESS_KEY, SECRET_KEY = "the-access-key", "the-secret-key"
USER, PASSWORD = "someone", "the-password"
_ADDRESS = re.compile(rb"(?:http://)?127\.0\.0\.1:(\d+)")


@dataclass(frozen=True)
class Server:
    """A running server on this machine; a file server has a folder."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path | None = None

    @property
    def is_usable(self) -> bool:
        return self.process.poll() is None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def program(name: str) -> str:
    """A program of the servers' environment; the test is skipped where it isn't installed."""
    path = PROGRAMS / name
    if not path.exists():
        pytest.skip(f"{name} isn't installed: tools/install_test_programs.sh does it (network)")
    return str(path)


@contextlib.contextmanager
def moto_server(folder: Path) -> Iterator[Server]:
    """An S3 server that keeps its buckets in memory, and lets in whoever has any credentials."""
    command = [program("moto_server"), "-H", "127.0.0.1", "-p", "0"]
    with _running(command, folder / "moto.log") as running:
        yield Server(*running)


@contextlib.contextmanager
def sftp_server(folder: Path) -> Iterator[Server]:
    """An SFTP server of one folder; one user with a password."""
    pytest.importorskip("asyncssh", reason="the SFTP server of the tests is asyncssh's")
    home = folder / "home"
    home.mkdir()
    script = Path(__file__).with_name("sftp_server.py")
    command = [sys.executable, str(script), str(home), USER, PASSWORD]
    with _running(command, folder / "sftp.log") as running:
        yield Server(*running, home)


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The program, and the port that it says it listens on; it ends with this process."""
    if setpriv := shutil.which("setpriv"):
        command = [setpriv, "--pdeathsig", "KILL", *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process, _port(process, log)
    finally:
        process.kill()
        process.wait(PATIENCE)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + PATIENCE
    while not (found := _ADDRESS.search(log.read_bytes())):
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, f"no port: {log.read_text(errors='replace')}"
        time.sleep(0.02)
    return int(found.group(1))

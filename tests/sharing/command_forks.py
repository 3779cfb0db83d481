"""A process that has imported the command line, s3fs and sshfs, and forks for each command.

Several commands may run at once, and any of them can be killed. No torch: a fork takes 10 ms.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE = 240.0  # seconds; a guard against what hangs, on any machine
SIZES_VARIABLE = "SIZES_OF_SHARING_TESTS"


class CommandForks:
    """Starts `lmdbcache …`, each in a fork of one process."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        with theirs:
            # `command_server` in the arguments tells that it isn't left behind by a test.
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), "command_server"],
                pass_fds=[theirs.fileno()],
            )
        self._answers = self._ours.makefile("r")
        self._is_asked = False

    def start(
        self, arguments: list[str], environment: dict[str, str], folder: Path, output: Path
    ) -> ForkedCommand:
        """Start in `folder`; what it prints goes to `output.1` and `output.2`."""
        options = {
            "arguments": arguments,
            "environment": environment,
            "folder": str(folder),
            "output": str(output),
        }
        return ForkedCommand(self, self.ask(start=options), output)

    def ask(self, **request: Any) -> Any:
        assert not self._is_asked, "a question before this one was interrupted"
        self._is_asked = True
        self._ours.sendall(json.dumps(request).encode() + b"\n")
        answer = self._answers.readline()
        assert answer, "the process that forks for commands has died"
        self._is_asked = False
        return json.loads(answer)

    @property
    def is_usable(self) -> bool:
        """False once it has died, or a test was ended in the middle of a question."""
        return not self._is_asked and self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._answers.close()
        self._ours.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ForkedCommand:
    """One running or ended command."""

    def __init__(self, forks: CommandForks, pid: int, output: Path) -> None:
        self._forks = forks
        self._output = output
        self.pid = pid
        self.returncode: int | None = None

    @property
    def stdout(self) -> str:
        return Path(f"{self._output}.1").read_text("utf-8")

    @property
    def stderr(self) -> str:
        return Path(f"{self._output}.2").read_text("utf-8")

    def is_running(self) -> bool:
        if self.returncode is None:
            self.returncode = self._forks.ask(poll=self.pid)
        return self.returncode is None

    def wait(self, seconds: float = PATIENCE) -> ForkedCommand:
        """Wait for its end; a command that takes longer is killed, and the test fails."""
        deadline = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGABRT)  # faulthandler says where it is
                time.sleep(0.3)
                self.kill()
                raise AssertionError(f"still running after {seconds} s: {self.stderr[-3000:]}")
            time.sleep(0.005)
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, and wait for the end if it is SIGKILL."""
        if self.is_running():
            os.kill(self.pid, number)
        while number == signal.SIGKILL and self.is_running():
            time.sleep(0.002)


def serve(connection: socket.socket) -> None:
    """Answer requests until the other side is gone; then end what still runs."""
    import s3fs
    import sshfs
    import tenacity

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from cli.command_server import be_the_command

    from lmdbcache.cli.main import command_of
    from lmdbcache.exchange import pull, push, verify_remote

    commands = map(command_of, ("push", "pull", "verify"))
    assert all((s3fs, sshfs, tenacity, pull, push, verify_remote, *commands))
    running: set[int] = set()
    for line in connection.makefile("r"):
        request = json.loads(line)
        if "start" in request:
            sys.stdout.flush()
            answer: int | None = os.fork()
            if not answer:
                connection.close()
                be_the_command(**request["start"], prepare=_PREPARE)
            running.add(answer or 0)
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        connection.sendall(json.dumps(answer).encode() + b"\n")
    for pid in running:
        os.kill(pid, signal.SIGKILL)


# Small shards, pieces and waits, so that a small store has many of them.
_PREPARE = f"""
import faulthandler, json, os
from lmdbcache.exchange.sharing import pushing, remote
faulthandler.enable()
sizes = json.loads(os.environ.pop({SIZES_VARIABLE!r}, "{{}}"))
for module in (remote, pushing):
    for name in sizes.keys() & vars(module).keys():
        setattr(module, name, sizes[name])
"""


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

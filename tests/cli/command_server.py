"""A process that has imported everything and forks for each command: a fresh process in 20 ms.

Starting Python and importing torch takes seconds; hundreds of commands are run by the tests. What
depends on imports, the environment or signals is tested with a process started from nothing.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["CommandServer"]


class CommandServer:
    """Runs `lmdbcache …` in forks of one process."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._answers = self._ours.makefile("r")

    def run(
        self,
        arguments: list[str],
        environment: dict[str, str],
        folder: Path,
        output: Path,
        prepare: str = "",
    ) -> int:
        """The exit status; what the command printed is in `output.1` and `output.2`.

        `prepare` is code that the fork runs before the command.
        """
        request: dict[str, Any] = {
            "arguments": arguments,
            "environment": environment,
            "folder": str(folder),
            "output": str(output),
            "prepare": prepare,
        }
        self._ours.sendall(json.dumps(request).encode() + b"\n")
        answer = self._answers.readline()
        assert answer, "the command server has died"
        return int(answer)

    def close(self) -> None:
        """End the server."""
        self._answers.close()
        self._ours.close()
        self._process.wait(timeout=240)


def import_everything() -> None:
    """Import what commands need, and build every command once."""
    import datasets
    import plotly.offline
    import soundfile
    import soxr
    import torchaudio
    import transformers
    from transformers import ASTFeatureExtractor, ASTModel

    import lmdbcache.extraction.decoding
    from lmdbcache.cli.main import app, command_of

    assert all((datasets, soundfile, soxr, torchaudio, transformers, ASTFeatureExtractor, ASTModel))
    assert all((lmdbcache.extraction.decoding, plotly.offline))
    with contextlib.redirect_stdout(io.StringIO()):
        app(["--help"], standalone_mode=False)
        for name in app.list_commands(None):
            command_of(name)(["--help"], standalone_mode=False)
    gc.collect()
    gc.freeze()  # what forks don't touch isn't copied for them


def serve(connection: socket.socket) -> None:
    """Fork for each request, one after the other."""
    import_everything()
    for line in connection.makefile("r"):
        request = json.loads(line)
        child = os.fork()
        if not child:
            connection.close()
            be_the_command(**request, standard_input=f"{request['output']}.0")
        _, status = os.waitpid(child, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def be_the_command(
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    output: str,
    prepare: str = "",
    standard_input: str = os.devnull,
) -> None:
    """Be `lmdbcache …` until the end of this process; see `CommandServer.run`."""
    code: Any = 70
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        for descriptor, name in enumerate((standard_input, f"{output}.1", f"{output}.2")):
            flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            opened = os.open(name, flags, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        sys.argv = ["lmdbcache", *arguments]
        from lmdbcache.cli import main

        exec(prepare, {})
        main()
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code
    except BaseException:  # noqa: BLE001 - as Python itself would show it
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

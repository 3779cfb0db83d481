"""A process that has imported everything and forks for each program that a page starts.

Started as `program_server.py ADDRESS` it serves; with a module and arguments after the address it
is the program: the fork has its descriptors, working folder and environment, and gets its signals.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["ProgramServer"]


class ProgramServer:
    """Forks for each program, several at once; started with the environment of this process."""

    def __init__(self, address: Path) -> None:
        self.address = address
        self._process = subprocess.Popen([sys.executable, __file__, str(address)])
        while not address.exists():
            assert self._process.poll() is None
            time.sleep(0.02)

    def command(self, *arguments: str) -> list[str]:
        """The command that runs a module, or a file if the name is one."""
        return [sys.executable, "-I", "-S", __file__, str(self.address), *arguments]

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait(timeout=240)


def serve(address: str) -> None:
    """Fork for each connection; the fork waits for the program and tells its exit status."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from cli.command_server import import_everything

    import_everything()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(32)
    Path(f"{address}.new").rename(address)
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            _attend(connection)
        connection.close()
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            pass


def _attend(connection: socket.socket) -> None:
    try:
        length, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
        wanted = int.from_bytes(length, "little")
        request = b""
        while len(request) < wanted:
            request += connection.recv(wanted - len(request))
        child = os.fork()
        if not child:
            connection.close()
            for descriptor, opened in enumerate(descriptors):
                os.dup2(opened, descriptor)
                os.close(opened)
            _be_the_program(**json.loads(request))
        for opened in (*descriptors, 0, 1, 2):
            os.close(opened)
        connection.sendall(child.to_bytes(8, "little"))
        _, status = os.waitpid(child, 0)
        connection.sendall((os.waitstatus_to_exitcode(status) & 0xFFFF).to_bytes(8, "little"))
    finally:
        os._exit(0)


def _be_the_program(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    code: Any = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        # The server's own have buffers, and know whether its descriptors could be searched.
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False, buffering=1)
        module, *sys.argv[1:] = arguments
        sys.argv[0] = module
        if module.endswith(".py"):
            sys.path[0] = folder
            runpy.run_path(module, run_name="__main__")
        else:
            sys.modules.pop(module, None)  # else runpy warns
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code
    except BaseException:  # noqa: BLE001 - as Python itself would show it
        sys.excepthook(*sys.exc_info())
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def be_forked(address: str, arguments: list[str]) -> int:
    """Have the server fork the program, and wait for it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = json.dumps(
        {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    ).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "little")], [0, 1, 2])
    connection.sendall(request)
    child = int.from_bytes(connection.recv(8), "little")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = int.from_bytes(connection.recv(8), "little")
    if code >= 0x8000:  # by a signal
        number = 0x10000 - code
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return code


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(be_forked(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])

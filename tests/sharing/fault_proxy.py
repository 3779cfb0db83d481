"""A proxy in front of an HTTP server: it writes down every request, and does what networks do.

Each fault concerns the requests it is made for, so many times: an answer of our own (500, 503), a
connection that is cut after so many bytes of the request or of the answer, one that stalls, an
answer that is lost though the server has done its work, a bit that flips on the way.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KINDS = (
    "answer",  # by the proxy, with `status`; the server hears nothing
    "lose answer",  # the server has done its work
    "stall answer",
    "cut upload",
    "cut download",
    "stall upload",
    "stall download",
    "flip download",  # one bit
)
_PIECE = 1 << 14
_BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Request:
    """One request as the client sent it, and what became of it."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    num_bytes_up: int = 0  # of the body
    num_bytes_down: int = 0
    status: int = 0  # 0: no answer reached the client
    fault: str = ""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        words = f"{self.method} {self.path} {self.status} up {self.num_bytes_up}"
        return f"{words} down {self.num_bytes_down} {self.fault}".rstrip()


@dataclass
class Fault:
    """What happens to the next `times` requests that fit."""

    kind: str  # one of KINDS
    after: int = 0  # bytes of the body that still pass
    times: int = 1
    method: str = ""
    part: str = ""  # of the path with its query
    status: int = 0
    fits: Callable[[Request], bool] = lambda _: True
    num_met: int = field(default=0, init=False)

    def meets(self, request: Request, target: str) -> bool:
        """Whether it is this request's turn; counted."""
        if self.num_met >= self.times or self.method not in ("", request.method):
            return False
        if self.part not in target or not self.fits(request):
            return False
        self.num_met += 1
        return True


class FaultProxy:
    """Listens on a port of its own and passes everything on to the server's, but for the faults."""

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._ended = threading.Event()
        self._open: set[socket.socket] = set()
        self.requests: list[Request] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault(self, kind: str, **options: object) -> Fault:
        """From now on; see `Fault` for the options."""
        assert kind in KINDS, kind
        fault = Fault(kind, **options)  # type: ignore[arg-type]
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget all faults and all requests."""
        with self._lock:
            self._faults.clear()
            self.requests = []

    def count(self, method: str = "", part: str = "", *, answered: bool = True) -> int:
        """How many requests there were, of those that got an answer if nothing else is asked."""
        return len(self.select(method, part, answered=answered))

    def select(self, method: str = "", part: str = "", *, answered: bool = True) -> list[Request]:
        with self._lock:
            return [
                request
                for request in self.requests
                if method in ("", request.method)
                and part in request.path
                and (not answered or 200 <= request.status < 300)
            ]

    def close(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    # ---- connections

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    @contextlib.contextmanager
    def _kept(self, connection: socket.socket) -> Iterator[socket.socket]:
        with self._lock:
            self._open.add(connection)
        try:
            with connection:
                yield connection
        finally:
            with self._lock:
                self._open.discard(connection)

    def _serve(self, client: socket.socket) -> None:
        with self._kept(client), contextlib.suppress(OSError, _Cut):
            incoming = _Stream(client)
            while (head := incoming.head()) is not None:
                self._handle(head, incoming, client)

    def _handle(self, head: _Head, incoming: _Stream, client: socket.socket) -> None:
        method, target, _ = head.first.split(" ", 2)
        url = urlsplit(target)
        request = Request(method, unquote(url.path), parse_qs(url.query), head.fields)
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self._faults if fault.meets(request, target)), None)
        request.fault = fault.kind if fault else ""
        if "expect" in head.fields:
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault and fault.kind == "answer":
            for piece in incoming.body(head):
                request.num_bytes_up += len(piece)
            self._answer(client, request, fault.status)
            return
        with self._kept(socket.create_connection(self._server)) as server:
            server.sendall(head.without("expect", "connection", connection="close"))
            for piece in self._passed(incoming.body(head), fault, "upload"):
                server.sendall(piece)
                request.num_bytes_up += len(piece)
            self._pass_answer(_Stream(server), client, request, fault)

    def _answer(self, client: socket.socket, request: Request, status: int) -> None:
        request.status = status
        head = f"HTTP/1.1 {status} Fault\r\nContent-Type: application/xml\r\n"
        client.sendall(f"{head}Content-Length: {len(_BUSY)}\r\n\r\n".encode())
        if request.method != "HEAD":
            client.sendall(_BUSY)

    def _pass_answer(
        self, answer: _Stream, client: socket.socket, request: Request, fault: Fault | None
    ) -> None:
        head = answer.head()
        while head is not None and head.first.split()[1] == "100":
            head = answer.head()
        if head is None:
            raise _Cut
        status = int(head.first.split()[1])
        has_body = request.method != "HEAD" and status not in (204, 304)
        if fault and fault.kind.endswith(" answer"):
            self._stop_at(fault)
        # Written down before it is sent: whoever has the answer finds it there.
        request.status = status
        try:
            client.sendall(head.without("connection"))
            pieces = answer.body(head, until_closed=True) if has_body else iter(())
            for piece in self._passed(pieces, fault, "download"):
                request.num_bytes_down += len(piece)
                client.sendall(piece)
        except (_Cut, OSError):
            request.status = 0
            raise
        if not head.is_delimited and has_body:
            raise _Cut

    def _passed(self, pieces: Iterator[bytes], fault: Fault | None, way: str) -> Iterator[bytes]:
        """The pieces as far as the fault lets them through."""
        at = 0
        for piece in pieces:
            end = at + len(piece)
            if fault and fault.kind.endswith(f" {way}") and at <= fault.after < end:
                yield piece[: fault.after - at]
                self._stop_at(fault)
                piece = bytes([piece[fault.after - at] ^ 1]) + piece[fault.after - at + 1 :]  # noqa: PLW2901
            yield piece
            at = end

    def _stop_at(self, fault: Fault) -> None:
        """Cut, or wait for the end of the test; a flip goes on."""
        if fault.kind.startswith("stall"):
            self._ended.wait()
        if not fault.kind.startswith("flip"):
            raise _Cut


class _Cut(Exception):  # noqa: N818 - no error, it is what was asked for
    """The connection ends here."""


class _Head:
    def __init__(self, content: bytes) -> None:
        self.first, *lines = content.decode("latin-1").split("\r\n")
        self._lines = [line for line in lines if line]
        pairs = (line.partition(":") for line in self._lines)
        self.fields = {name.strip().lower(): value.strip() for name, _, value in pairs}

    @property
    def is_chunked(self) -> bool:
        return "chunked" in self.fields.get("transfer-encoding", "").lower()

    @property
    def is_delimited(self) -> bool:
        return self.is_chunked or "content-length" in self.fields

    def without(self, *names: str, **added: str) -> bytes:
        """The head again, less some fields and with others."""
        lines = [line for line in self._lines if line.partition(":")[0].lower() not in names]
        lines += [f"{name}: {value}" for name, value in added.items()]
        return "\r\n".join([self.first, *lines, "", ""]).encode("latin-1")


class _Stream:
    """What one side sends: heads, and bodies of a length, in chunks, or until the end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._kept = b""

    def head(self) -> _Head | None:
        while b"\r\n\r\n" not in self._kept:
            if not self._more():
                return None
        content, _, self._kept = self._kept.partition(b"\r\n\r\n")
        return _Head(content)

    def body(self, head: _Head, *, until_closed: bool = False) -> Iterator[bytes]:
        if head.is_chunked:
            yield from self._chunks()
        elif "content-length" in head.fields:
            yield from self._exactly(int(head.fields["content-length"]))
        elif until_closed:
            while self._kept or self._more():
                piece, self._kept = self._kept, b""
                yield piece

    def _more(self) -> bool:
        piece = self._connection.recv(_PIECE)
        self._kept += piece
        return bool(piece)

    def _exactly(self, num_bytes: int) -> Iterator[bytes]:
        while num_bytes:
            if not self._kept and not self._more():
                raise _Cut
            piece, self._kept = self._kept[:num_bytes], self._kept[num_bytes:]
            num_bytes -= len(piece)
            yield piece

    def _line(self) -> bytes:
        while b"\r\n" not in self._kept:
            if not self._more():
                raise _Cut
        line, _, self._kept = self._kept.partition(b"\r\n")
        return line

    def _chunks(self) -> Iterator[bytes]:
        while True:
            line = self._line()
            num_bytes = int(line.partition(b";")[0], 16)
            yield line + b"\r\n"
            if not num_bytes:
                while trailer := self._line():
                    yield trailer + b"\r\n"
                yield b"\r\n"
                return
            yield from self._exactly(num_bytes + 2)

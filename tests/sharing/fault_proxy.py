"""A proxy in front of an HTTP server: it writes down every request, and does what networks do.

Each fault concerns the requests it is made for, so many times: an answer of our own (500, 503), a
connection that is cut after so many bytes of the request or of the answer, one that stalls, an
answer that is lost though the server has done its work, a bit that flips on the way.
"""

from __future__ import annotations

import http.client
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

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
_ERROR = b"<Error><Code>%s</Code><Message>An answer of the proxy.</Message></Error>"
_CODES = {403: b"SignatureDoesNotMatch", 500: b"InternalError", 503: b"SlowDown"}
_OF_A_CONNECTION = ("connection", "keep-alive", "transfer-encoding", "content-length", "expect")


@dataclass
class Request:
    """One request as the client sent it, and what became of it."""

    method: str
    path: str
    num_bytes_up: int = 0  # of the body
    num_bytes_down: int = 0
    status: int = 0  # 0: no answer reached the client
    fault: str = ""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


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
        self.server_port = port
        self.ended = threading.Event()
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.proxy = self  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

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
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def noted(self, request: Request, target: str) -> Fault | None:
        """Write a request down; returns its fault."""
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self._faults if fault.meets(request, target)), None)
        request.fault = fault.kind if fault else ""
        return fault


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        self.close_connection = True
        if self.raw_requestline and self.parse_request():
            try:
                self._pass()
            except OSError:
                self.close_connection = True

    def _pass(self) -> None:
        proxy: FaultProxy = self.server.proxy  # type: ignore[attr-defined]
        request = Request(self.command, unquote(urlsplit(self.path).path))
        fault = proxy.noted(request, self.path)
        kind = request.fault
        length = int(self.headers.get("content-length", 0))
        if fault and kind.endswith(" upload") and fault.after < length:
            request.num_bytes_up = len(self.rfile.read(fault.after))
            self._stop(kind)
            return
        body = self.rfile.read(length)
        request.num_bytes_up = len(body)
        if fault and kind == "answer":
            text = _ERROR % _CODES[fault.status]
            headers = {"Content-Type": "application/xml", "Content-Length": str(len(text))}
            status, answer = fault.status, text
        else:
            headers, status, answer = self._asked(proxy.server_port, body)
        if kind.endswith(" answer"):
            self._stop(kind)
            return
        is_met = fault is not None and kind.endswith(" download") and fault.after < len(answer)
        if is_met and kind.startswith("flip"):
            flipped = bytes([answer[fault.after] ^ 1])
            answer, is_met = answer[: fault.after] + flipped + answer[fault.after + 1 :], False
        # Written down before it is sent: whoever has the answer finds it there.
        sent = answer[: fault.after] if is_met else answer
        request.status = 0 if is_met else status
        request.num_bytes_down = 0 if self.command == "HEAD" else len(sent)
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if is_met:
            self._stop(kind)

    def _asked(self, port: int, body: bytes) -> tuple[dict[str, str], int, bytes]:
        """What the server answers: headers, status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in _OF_A_CONNECTION:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            headers = {n: v for n, v in answer.getheaders() if n.lower() not in _OF_A_CONNECTION}
            size = answer.getheader("content-length") if self.command == "HEAD" else len(content)
            if answer.status not in (204, 304):
                headers["Content-Length"] = str(size or 0)
            return headers, answer.status, content
        finally:
            connection.close()

    def _stop(self, kind: str) -> None:
        """Cut the connection, or hold it until the test ends."""
        self.close_connection = True
        if kind.startswith("stall"):
            self.server.proxy.ended.wait()  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

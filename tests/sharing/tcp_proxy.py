"""A proxy in front of any server: it counts bytes, cuts connections and lets them stall."""

from __future__ import annotations

import contextlib
import socket
import threading

_PIECE = 1 << 14


class TcpProxy:
    """Passes bytes on, both ways, until so many have gone one way; then it does what it is told."""

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._open: set[socket.socket] = set()
        self._limit: tuple[str, str, int] | None = None
        self.num_bytes = {"up": 0, "down": 0}
        self.num_connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def fault(self, kind: str, way: str, after: int) -> None:
        """ "cut" or "stall" once, after so many bytes from now; what connects later works."""
        with self._lock:
            self._limit = (kind, way, self.num_bytes[way] + after)

    def clear(self) -> None:
        """Forget the fault and what was counted."""
        with self._lock:
            self._limit = None
            self.num_bytes = {"up": 0, "down": 0}
            self.num_connections = 0

    def close(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._listener.close()
        self._cut()

    def _cut(self) -> None:
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
            except OSError:
                return
            for one in (client, server):  # no wait for 40 ms with each small packet
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.num_connections += 1
                self._open |= {client, server}
            both_ways = threading.Barrier(2)
            for way, source, target in (("up", client, server), ("down", server, client)):
                threading.Thread(
                    target=self._pass, args=(way, source, target, both_ways), daemon=True
                ).start()

    def _pass(
        self, way: str, source: socket.socket, target: socket.socket, both_ways: threading.Barrier
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                kind = self._count(way, len(piece))
                if kind == "stall":
                    self._ended.wait()
                if kind:
                    break
                target.sendall(piece)
        for connection in (source, target):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        both_ways.wait()  # nobody uses the two any more
        with self._lock:
            self._open.discard(source)
        source.close()

    def _count(self, way: str, num_bytes: int) -> str:
        """What to do with so many more bytes."""
        with self._lock:
            self.num_bytes[way] += num_bytes
            if self._limit is None or self._limit[1] != way:
                return ""
            kind, _, limit = self._limit
            if self.num_bytes[way] <= limit:
                return ""
            self._limit = None
            return kind

"""A way to a server that can be cut: what is sent meanwhile disappears, and no answer comes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Listens on `port`; while it is cut, connections are taken and nothing comes out of them."""

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._cut = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.swallowed = 0
        """Bytes that have disappeared."""
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._cut.set()

    def mend(self) -> None:
        """Let new connections through; those of before the cut have lost a part, and are closed."""
        self._cut.clear()
        self._close()

    def close(self) -> None:
        self._listener.close()
        self._close()

    def _close(self) -> None:
        with self._lock:
            doomed, self._open = self._open, set()
        for one in doomed:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            with self._lock:
                self._open |= {client, server}
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self._cut.is_set():
                    self.swallowed += len(data)
                else:
                    sink.sendall(data)
        # Whoever ends a connection while it is cut is not heard of on the other side either.
        if not self._cut.is_set():
            with suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxied(host: str, port: int) -> Iterator[Proxy]:
    proxy = Proxy(host, port)
    try:
        yield proxy
    finally:
        proxy.close()

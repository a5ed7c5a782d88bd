"""A way to a server that can be cut: what is sent meanwhile disappears, and no answer comes.

Or one that breaks where it hurts: after the server has committed and before it can say so.
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy.engine import make_url


class Proxy:
    """Stands at `url` for a server; while it is cut, connections are taken and nothing comes out.

    Of every `breaks` transactions that are committed, the last one's answer is lost, and its
    connection with it.
    """

    def __init__(self, url: str, breaks: int | None = None) -> None:
        parsed = make_url(url)
        assert parsed.host is not None
        assert parsed.port is not None
        self._server = (parsed.host, parsed.port)
        self._breaks = breaks
        self._commits = itertools.count(1)
        self._listener = socket.create_server(("127.0.0.1", 0))
        here = parsed.set(port=self._listener.getsockname()[1])
        self.url = here.render_as_string(hide_password=False)
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
            broken = threading.Event()
            for ends in ((client, server), (server, client)):
                asked = ends[0] is client
                threading.Thread(
                    target=self._pump, args=(*ends, asked, broken), daemon=True
                ).start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, asked: bool, broken: threading.Event
    ) -> None:
        """Carry to the server what it is asked, or back what it answers, until that is lost."""
        with suppress(OSError):
            while data := source.recv(65536):
                commits = asked and b"COMMIT" in data
                if commits and self._breaks and next(self._commits) % self._breaks == 0:
                    broken.set()  # before the server can have answered
                lost = not asked and broken.is_set()
                if lost or self._cut.is_set():
                    self.swallowed += len(data)
                else:
                    sink.sendall(data)
                if lost:
                    break
        # Whoever ends a connection while it is cut is not heard of on the other side either.
        if not self._cut.is_set():
            with suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxied(url: str, breaks: int | None = None) -> Iterator[Proxy]:
    proxy = Proxy(url, breaks)
    try:
        yield proxy
    finally:
        proxy.close()

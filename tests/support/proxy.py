"""A wire between the shop and PostgreSQL that can be cut, fall silent, and lose the reply to a COMMIT."""

import select
import socket
import threading
from contextlib import suppress

from sqlalchemy import URL

_CHUNK = 65_536


class Wire(threading.Thread):
    """One connection through the proxy. This thread carries the requests, another thread the replies."""

    def __init__(self, proxy: "Proxy", client: socket.socket) -> None:
        super().__init__(daemon=True)
        self.proxy, self.client, self.server = proxy, client, socket.socket(socket.AF_UNIX)
        self._requests_pass, self._replies_pass = threading.Event(), threading.Event()
        self._sent, self._reply_is_lost = b"", False
        self.release()

    def run(self) -> None:
        replies = (self.server, self.client, self._replies_pass)
        answers = threading.Thread(target=self._carry, args=replies, daemon=True)
        try:
            self.server.connect(self.proxy.server)
            answers.start()
            self._carry(self.client, self.server, self._requests_pass)
            answers.join()
        except OSError:  # PostgreSQL is not there
            self.cut()
        self.client.close()
        self.server.close()

    def cut(self) -> None:
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def half_open(self) -> None:
        """End the connection to the server, and do not notify the client."""
        self.hold()
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)

    def hold(self, replies_only: bool = False) -> None:
        self._replies_pass.clear()
        if not replies_only:
            self._requests_pass.clear()

    def release(self) -> None:
        self._requests_pass.set()
        self._replies_pass.set()

    @property
    def is_held(self) -> bool:
        return not self._replies_pass.is_set()

    def _carry(self, source: socket.socket, target: socket.socket, may_pass: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                if self._reply_is_lost:  # this is the reply, so the server has committed
                    break
                if source is self.client:
                    self._watch(data)
                may_pass.wait()
                target.sendall(data)
        may_pass.wait()
        self.cut()

    def _watch(self, data: bytes) -> None:
        """Look at the client's data before the server receives it."""
        if not self.proxy.is_to_lose_a_reply:
            return
        self._sent += data
        if b"COMMIT\0" in data or self.proxy.commits_itself:
            self._reply_is_lost = self.proxy.loses_reply_to(self._sent)
            self._sent = b""


class Proxy:
    """Listens on 127.0.0.1 at `url`, and forwards to the unix socket of the server."""

    def __init__(self, url: URL) -> None:
        self.server = f"{url.query['host']}/.s.PGSQL.{url.port or 5432}"
        self._lost: bytes | None = None
        self.commits_itself = False
        self._has_lost = threading.Event()
        self._is_silent = self._replies_only = self._refuses = False
        self._wires: list[Wire] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closed, self._closing = socket.socketpair()
        plain = {"sslmode": "disable", "gssencmode": "disable"}  # so that a COMMIT can be read
        self.url = url.set(host="127.0.0.1", port=self._listener.getsockname()[1], query=plain)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def lose_reply(self, statement: bytes, commits_itself: bool = False) -> threading.Event:
        """Lose the reply to the next COMMIT of a transaction that contains `statement`.

        If `commits_itself`, lose the reply to the statement. Returns an event that is set when the reply is lost.
        """
        self.commits_itself = commits_itself
        self._lost, self._has_lost = statement, threading.Event()
        return self._has_lost

    @property
    def is_to_lose_a_reply(self) -> bool:
        return self._lost is not None

    def loses_reply_to(self, sent: bytes) -> bool:
        if self._lost is None or self._lost not in sent:
            return False
        self._lost = None
        self._has_lost.set()
        return True

    def cut(self) -> None:
        """End every connection, as a restarting server does."""
        for wire in self._wires:
            wire.cut()

    def refuse(self) -> None:
        """End every connection, and each new connection immediately, until `heal`."""
        self._refuses = True
        self.cut()

    def half_open(self) -> None:
        """End every connection, and notify only the server."""
        for wire in self._wires:
            wire.half_open()

    def silence(self, replies_only: bool = False) -> None:
        """Let nothing pass on any connection, old or new, until `heal`. Neither side is notified."""
        self._is_silent, self._replies_only = True, replies_only
        for wire in self._wires:
            wire.hold(replies_only)

    def heal(self, cut: bool = True) -> None:
        """Let everything pass again. With `cut`, the held data is lost with its connections."""
        self._is_silent = self._refuses = False
        for wire in self._wires:
            if cut and wire.is_held:
                wire.cut()
            wire.release()

    def close(self) -> None:
        self._closing.close()
        self._thread.join()
        for wire in self._wires:
            while wire.is_alive():
                wire.cut()
                wire.release()
                wire.join(0.1)
        self._listener.close()
        self._closed.close()

    def _accept(self) -> None:
        while self._closed not in select.select([self._listener, self._closed], [], [])[0]:
            wire = Wire(self, self._listener.accept()[0])
            if self._is_silent:
                wire.hold(self._replies_only)
            self._wires = [each for each in self._wires if each.is_alive()] + [wire]
            if self._refuses:
                wire.cut()
            wire.start()

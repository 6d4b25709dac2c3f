"""Hears at once what was enqueued anywhere: PostgreSQL tells those who listen when it is committed."""

import logging
import socket
import threading
from collections.abc import Callable
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from .connections import Connections
from .messages import CHANNEL

log = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0


class Listener:
    """One thread with one connection of its own. Without it, as behind a pooler, a heartbeat finds the messages."""

    def __init__(self, connections: Connections, wake: Callable[[str], None], wake_all: Callable[[], None]) -> None:
        self._connections, self._wake, self._wake_all = connections, wake, wake_all
        self._stopped = threading.Event()
        self._told, self._tell = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="workers-listener", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; waits a second for it at most."""
        self._stopped.set()
        self._tell.send(b"x")
        self._thread.join(1)
        for each in (self._told, self._tell):  # not by the thread, which may end before it is told
            each.close()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._listen()
            except Exception as error:  # a thread that ended would listen no more
                log.debug("Cannot listen for messages: %s", error)
                self._stopped.wait(_RETRY_SECONDS)

    def _listen(self) -> None:
        with self._connections.listening() as connection:
            connection.execute(f"LISTEN {CHANNEL}")
            self._wake_all()  # for what was enqueued while nobody listened
            with DefaultSelector() as selector:  # select() refuses what is opened behind the first 1,024 files
                for each in (connection, self._told):
                    selector.register(each, EVENT_READ)
                while not self._stopped.is_set():
                    selector.select()
                    self._hear(connection.pgconn)

    def _hear(self, pgconn: Any) -> None:
        pgconn.consume_input()
        while heard := pgconn.notifies():
            self._wake(heard.extra.decode())

"""Notifies all processes of new work, so that no process has to poll the tables."""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from ..host.logs import logger_of
from .connections import Connections, again_if_stale

log = logger_of(__name__)

CHANNEL = "background_messages"
_RETRY_SECONDS = 0.5
_LOOK_SECONDS = 0.25


def ring(connections: Connections) -> None:
    """Have each listening process look for new work. If this fails, its next heartbeat finds the work."""
    with suppress(SQLAlchemyError, OSError):
        if path := connections.heartbeat_file:
            os.utime(path)
        else:
            again_if_stale(partial(_notify, connections.claims))


def _notify(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(select(func.pg_notify(CHANNEL, "")))


class Listener:
    """A thread that calls `heard` with the topic of a new message, or with "" for any other work.

    PostgreSQL notifies it, on a connection of its own, of each commit with new work. SQLite has no notifications, so
    the thread looks whether another process touched the heartbeats' file. Behind a pooler a heartbeat finds the work.
    """

    def __init__(self, connections: Connections, heard: Callable[[str], None]) -> None:
        self._connections, self._heard = connections, heard
        self._stopped = threading.Event()
        self._wake_end, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="workers-listener", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Wait for it for at most a second."""
        self._stopped.set()
        self._wake.send(b"x")
        self._thread.join(1)
        for each in (self._wake_end, self._wake):  # not in the thread, which may end before the send
            each.close()

    def _run(self) -> None:
        path = self._connections.heartbeat_file
        listen = partial(self._watch, path) if path else self._listen
        while not self._stopped.is_set():
            try:
                listen()
            except Exception as error:  # the thread must go on to listen again
                log.debug("Cannot listen: %s", error)
                self._stopped.wait(_RETRY_SECONDS)

    def _listen(self) -> None:
        with self._connections.listening() as connection:
            connection.execute(f"LISTEN {CHANNEL}")
            self._heard("")  # work may have come before this connection listened
            with DefaultSelector() as selector:  # select() refuses file numbers from 1,024 on
                for each in (connection, self._wake_end):
                    selector.register(each, EVENT_READ)
                while not self._stopped.is_set():
                    selector.select()
                    self._hear(connection.pgconn)

    def _hear(self, pgconn: Any) -> None:
        pgconn.consume_input()
        while heard := pgconn.notifies():
            self._heard(heard.extra.decode())

    def _watch(self, path: str) -> None:
        before = None
        while not self._stopped.wait(_LOOK_SECONDS):
            touched = os.stat(path).st_mtime_ns
            if touched != before:
                before = touched
                self._heard("")

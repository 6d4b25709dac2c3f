"""Notifies all processes of new work, so that no process has to poll the tables."""

import atexit
import os
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from selectors import EVENT_READ, DefaultSelector
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from ..host.logs import logger_of
from ..host.touches import touches
from .clock import steady
from .connections import Connections, again_if_stale
from .dialects.sqlite_files import is_replaced

log = logger_of(__name__)

CHANNEL = "background_messages"
_RETRY_SECONDS = 0.5
_LOOK_SECONDS = 0.25  # between two looks at the files of SQLite
_GLANCE_SECONDS = 0.018  # the same, if the system reports no touches. Also the shortest rest after a commit
_MOST_BYTES = 65_536  # of one read
_RESTS = 16  # times as long as the work before the rest
_LONGEST_REST_SECONDS = 0.1
_JOIN_SECONDS = 1.0


def ring(connections: Connections) -> None:
    """Have each listening process look for any new work.

    If this fails, the next heartbeat of each process finds the work.
    """
    with suppress(SQLAlchemyError, OSError):
        if path := connections.heartbeat_file:
            os.utime(path)
        else:
            again_if_stale(partial(_notify, connections.claims))


def _notify(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(select(func.pg_notify(CHANNEL, "")))


class Notifier:
    """Notifies all processes of committed messages.

    On SQLite it touches the write-ahead log.

    On PostgreSQL a thread notifies, and ends when no topic waits. If no thread runs, the caller of `notify` sends the
    notification, and a new thread reads the response. The transaction of the caller does not notify, because PostgreSQL
    lets transactions that notify commit one by one. The connection is in no pool, because a busy pool would open and
    close a connection for each notification. If the connection fails, or this process ends before the notification, a
    heartbeat finds the messages.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._connection: Any = None
        self._waiting: set[str] = set()
        self._thread: threading.Thread | None = None
        self._changed = threading.Lock()
        _notifiers.add(self)

    def notify(self, topics: Collection[str]) -> None:
        """Notify all processes of new messages of `topics`, soon. Does not wait, and raises no error."""
        if not topics:
            return
        if path := self._connections.log_file:
            with suppress(OSError):
                os.utime(path)
            return
        with self._changed:
            if self._thread is not None:
                self._waiting.update(topics)
                return
            sent_at = self._send_early(topics)
            serve = partial(self._serve, set(topics), sent_at)
            self._thread = threading.Thread(target=serve, name="workers-notifier", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter ends, or can start no other thread
                self._thread = None
                self._close()

    def wait(self) -> None:
        """Wait until the thread has notified of all topics, for at most a second."""
        if (thread := self._thread) is not None:
            thread.join(_JOIN_SECONDS)

    def close(self) -> None:
        """Wait, and close the connection. The next notification opens another."""
        self.wait()
        with self._changed:
            if self._thread is None:
                self._close()

    def _send_early(self, topics: Collection[str]) -> float | None:
        """Send the notification now, because a thread starts slowly. Return the moment, or None if this failed."""
        if self._connection is not None:
            with suppress(Exception):  # the thread tries again
                self._send(topics)
                return steady()
        return None

    def _serve(self, topics: set[str], sent_at: float | None) -> None:
        while topics:
            rest = _RETRY_SECONDS
            for _ in range(2):  # the server may have closed the connection since its last use
                try:
                    rest = min(self._finish(topics, sent_at) * _RESTS, _LONGEST_REST_SECONDS)
                    break
                except Exception as error:  # the thread must go on to notify again
                    log.debug("Cannot notify: %s", error)
                    self._close()
                    sent_at = None
            # Without this rest, a busy process would notify, or try to connect, for each commit.
            time.sleep(rest)
            topics, sent_at = self._next(), None

    def _next(self) -> set[str]:
        with self._changed:
            topics, self._waiting = self._waiting, set()
            if not topics:
                self._thread = None
            return topics

    def _finish(self, topics: Collection[str], sent_at: float | None) -> float:
        """Send the notification, unless it was sent early. Read the response. Return the seconds that this took."""
        from psycopg.generators import execute

        if self._connection is None:
            self._connection = self._connections.open_separately()
        if sent_at is None:
            sent_at = steady()
            self._send(topics)
        for result in self._connection.wait(execute(self._connection.pgconn)):
            if result.status != _DONE:
                raise OSError(result.get_error_message())
        return steady() - sent_at

    def _send(self, topics: Collection[str]) -> None:
        """Send the notification. Does not wait for the response.

        The server need not write this commit to the disk, because a crash of the server forgets all notifications.
        """
        from psycopg.sql import quote

        each = (f"NOTIFY {CHANNEL}, {quote(topic, self._connection)}" for topic in topics)
        statements = "; ".join(["BEGIN", "SET LOCAL synchronous_commit = off", *each, "COMMIT"])
        self._connection.pgconn.send_query(statements.encode(self._connection.info.encoding))

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


_DONE = 1  # PGRES_COMMAND_OK
_notifiers: "WeakSet[Notifier]" = WeakSet()


@atexit.register
def _wait() -> None:
    for each in list(_notifiers):
        each.wait()


class Listener:
    """A thread that calls `heard` with the topic of a new message, or with "" for any other work.

    PostgreSQL notifies it, on a connection of its own, of new work. Behind a pooler a heartbeat finds the work.

    SQLite has no notifications. So the thread looks whether another process touched the heartbeats' file. While some
    topics are `idle`, it also looks at SQLite's counter of commits: at once after a touch of the write-ahead log, or
    often if the system reports no touches. After a commit it asks `due` which of these topics have a due message.
    """

    def __init__(
        self,
        connections: Connections,
        heard: Callable[[str], None],
        idle: Callable[[], Collection[str]],
        due: Callable[[Collection[str]], Collection[str]],
    ) -> None:
        self._connections, self._heard, self._idle, self._due = connections, heard, idle, due
        self._touched: int | None = None
        self._stopped = threading.Event()
        self._wake_end, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="workers-listener", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Wait for it for at most a second."""
        self._stopped.set()
        self._wake.send(b"x")
        self._thread.join(_JOIN_SECONDS)
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
        with self._connections.claims.connect() as connection, touches(self._connections.log_file) as touched:
            driver: Any = connection.connection.driver_connection
            commits, look_at, rest = None, 0.0, _GLANCE_SECONDS
            while not self._stopped.is_set():
                if steady() >= look_at:
                    if is_replaced(connection):  # the next connection opens the new file
                        return
                    self._look(path)
                    look_at = steady() + _LOOK_SECONDS
                if not (topics := self._idle()):  # every consumer is busy, or there is none
                    self._stopped.wait(rest := min(rest * 2, _LOOK_SECONDS))
                    continue
                rest = _GLANCE_SECONDS
                ((found,),) = driver.execute("PRAGMA data_version").fetchall()
                if found != commits:
                    commits = found
                    self._look_for_due(topics)
                self._wait_for_touch(touched)

    def _look(self, path: str) -> None:
        touched, before = os.stat(path).st_mtime_ns, self._touched
        if touched != before:
            self._touched = touched
            self._heard("")

    def _look_for_due(self, topics: Collection[str]) -> None:
        began = steady()
        for topic in self._due(topics):
            self._heard(topic)
        # Without this rest, the reads would use a core while another process commits all the time.
        self._stopped.wait(max(_GLANCE_SECONDS, (steady() - began) * _RESTS))

    def _wait_for_touch(self, touched: int | None) -> None:
        """Wait until the log is touched, `stop` wakes this thread, or the next look is due."""
        with DefaultSelector() as selector:
            for each in (self._wake_end, touched):
                if each is not None:
                    selector.register(each, EVENT_READ)
            if selector.select(_GLANCE_SECONDS if touched is None else _LOOK_SECONDS) and touched is not None:
                with suppress(BlockingIOError):  # `stop` woke this thread
                    os.read(touched, _MOST_BYTES)

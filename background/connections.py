"""The engine's own connections: a claim neither joins nor waits for what the application does on its own."""

import os
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakSet

from sqlalchemy import Dialect, Engine, Table, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable

from . import database_files, postgresql, sqlite
from .models import instances, locks
from .outages import Outages

Answer = TypeVar("Answer")
Made = TypeVar("Made")


class made_once(cached_property[Made]):
    """A `cached_property` of which threads that come at once get the same: the standard one's lock went in 3.12."""

    _making = threading.RLock()

    def __get__(self, instance: object, owner: type[Any] | None = None) -> Made:  # type: ignore[override]
        with self._making:
            return super().__get__(instance, owner)


class Connections:
    """Opened when they are asked for. No statement on them sets anything that outlives its transaction, and none
    is prepared by name, so a pooler that gives every transaction another connection may stand before PostgreSQL."""

    def __init__(self, shared: Engine, arguments: Mapping[str, Any], lease: float, outages: Outages) -> None:
        self._shared, self._outages = shared, outages
        outages.emptied.append(self._deafen)
        # As long as a heartbeat may take: libpq does not wait for less than two seconds. Then a line is given up on
        # which nothing is acknowledged, as where a firewall forgot it; TCP alone would take a quarter of an hour.
        seconds = max(2, int(lease / 2))
        waiting = {"connect_timeout": seconds, "tcp_user_timeout": seconds * 1000}
        waiting |= {"keepalives_idle": seconds, "keepalives_interval": 1}
        self._arguments = {**arguments, **waiting, "prepare_threshold": None}
        self._open: WeakSet[Any] = WeakSet()
        self._listening: WeakSet[Any] = WeakSet()
        self._opening = threading.Lock()
        self._closed = 0

    @made_once
    def claims(self) -> Engine:
        """For whatever decides who runs."""
        if self._shared.dialect.name != "sqlite":
            return self._postgresql(pool_size=5)  # with 2, a busy instance opened four connections a second
        # However many claims wait for the write lock: the heartbeat's look at the others must not wait behind them.
        engine = create_engine(self._shared.url, max_overflow=-1, hide_parameters=True)
        sqlite.prepare(engine)
        self._close_strays(engine)
        return engine

    @made_once
    def heartbeats(self) -> Engine:
        """For who is alive, which nothing else can starve; the workers' rows can be read here too.

        On SQLite a run that has written holds the only write lock until it commits, so the heartbeats have a small
        database of their own beside the main one (all its processes live on one host). No transaction may be
        opened here but that of a single statement: BEGIN IMMEDIATE would lock the main one as well.
        """
        if self._shared.dialect.name != "sqlite":
            return self._postgresql(pool_size=1)
        own, main = str(self.heartbeat_file), self._file
        engine = create_engine(self._shared.url.set(database=own), max_overflow=-1, hide_parameters=True)

        @event.listens_for(engine, "do_connect")
        def connecting(_dialect: Any, record: Any, _arguments: Any, _parameters: Any) -> None:
            sqlite.expect_file(main)
            database_files.make_private(own, like=main)
            for path in (own, main):
                database_files.expect(record, path)

        @event.listens_for(engine, "connect")
        def connected(connection: Any, record: Any) -> None:
            with sqlite.closed_on_error(connection):
                sqlite.configure(connection, isolation_level=None)
                for table in (instances, locks):
                    _make(connection, table, engine.dialect)
                connection.execute("ATTACH DATABASE ? AS main_database", (main,))
                database_files.note(record)

        database_files.watch(engine)
        self._close_strays(engine)
        return engine

    @property
    def heartbeat_file(self) -> str | None:
        """The path of the heartbeats' small database on SQLite; None on PostgreSQL."""
        return f"{self._file}-instances" if self._shared.dialect.name == "sqlite" else None

    @property
    def _file(self) -> str:
        return os.path.realpath(str(self._shared.url.database))  # by whatever links the others come to it

    def refuse_missing(self) -> None:
        """Raise FileNotFoundError for a SQLite file that is not there: whoever opened it would make an empty one."""
        if self._shared.dialect.name == "sqlite":
            os.stat(str(self._shared.url.database))

    @contextmanager
    def listening(self) -> Iterator[Any]:
        """A connection of psycopg's own that commits each statement, and is closed at the end."""
        engine = create_engine(
            self._shared.url,
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,
            connect_args=self._arguments,
        )
        event.listen(engine, "connect", self._opened)
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            self._listening.add(driver)
            try:
                yield driver
            finally:
                connection.invalidate()  # closed as it is: where it broke, a last rollback would fail aloud

    @property
    def locks(self) -> Engine:
        """For the user's locks, one statement at a time.

        On SQLite those of the heartbeats: whoever acquires or releases a lock may itself hold the main database's
        only write lock, by what its session has not committed yet, and would wait for itself.
        """
        return self.heartbeats if self._shared.dialect.name == "sqlite" else self.claims

    def cut(self) -> None:
        """Have whatever waits for PostgreSQL on them fail now, from any thread, and connect anew from now on."""
        with self._opening:
            connections = list(self._open)
        for connection in connections:
            _shut_down(connection)
        self.close()

    def _deafen(self) -> None:
        """End the connection that listens, which hears nothing on a server that only reads; another is opened."""
        for connection in list(self._listening):
            _shut_down(connection)

    def close(self) -> None:
        """Close those that are not in use, and the others when they are given back; who asks for one gets a new one."""
        self._closed += 1
        for opened in ("claims", "heartbeats"):
            if opened in self.__dict__:
                self.__dict__[opened].pool.dispose()  # and not replaced: others may be asking it at this moment

    def _close_strays(self, engine: Engine) -> None:
        @event.listens_for(engine, "do_connect")
        def connecting(_dialect: Any, record: Any, _arguments: Any, _parameters: Any) -> None:
            record.info["closed"] = self._closed

        @event.listens_for(engine, "checkin")
        def returned(connection: Any, record: Any) -> None:
            if connection is not None and record.info["closed"] != self._closed:
                record.invalidate()

    def _opened(self, connection: Any, _record: Any) -> None:
        with self._opening:
            self._open.add(connection)

    def _postgresql(self, pool_size: int) -> Engine:
        engine = create_engine(
            self._shared.url,
            isolation_level="READ COMMITTED",
            pool_size=pool_size,
            max_overflow=-1,
            hide_parameters=True,
            connect_args=self._arguments,
        )
        event.listen(engine, "connect", self._opened)
        postgresql.prepare(engine)
        self._outages.watch(engine)
        self._close_strays(engine)
        return engine


def _shut_down(connection: Any) -> None:
    with suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as its_socket:
        its_socket.shutdown(socket.SHUT_RDWR)


def _make(connection: Any, table: Table, dialect: Dialect) -> None:
    """The table and its later columns, where they are not there. Others may be here, doing the same."""
    connection.execute(str(CreateTable(table, if_not_exists=True).compile(dialect=dialect)))
    known = {row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")}
    for column in table.columns:
        if column.name not in known:
            with suppress(sqlite3.OperationalError):  # another process was first
                kind = column.type.compile(dialect)
                connection.execute(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}")


def again_if_stale(ask: Callable[[], Answer]) -> Answer:
    """What `ask` returns, which does no harm if it is called twice.

    A pooled connection may be older than the server's last restart, which shows when it is used: then ask once more.
    """
    try:
        return ask()
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        return ask()

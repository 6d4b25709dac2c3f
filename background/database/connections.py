"""The engine's own connections. A claim neither joins nor waits for the application's transactions."""

import math
import os
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any, TypeVar
from weakref import WeakSet

from sqlalchemy import Connection, Dialect, Engine, Table, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool
from sqlalchemy.schema import CreateTable

from ..host.forks import ForkSafeLock
from ..host.listeners import is_new
from .clock import steady
from .dialects import postgresql, sqlite, write_lock
from .dialects import sqlite_files as database_files
from .opening import Opener, has_creator
from .outages import Outages
from .sessions import Sessions, autocommit_refused
from .tables import instances, locks

Answer = TypeVar("Answer")
Made = TypeVar("Made")

_LONGEST_TURN_SECONDS = 0.1  # of other writers: SQLite's longest pause between two tries
_POLL_SECONDS = 0.001


class made_once(cached_property[Made]):
    """A thread-safe `cached_property` (Python 3.12 removed the lock of `functools.cached_property`)."""

    _making = ForkSafeLock(threading.RLock)

    def __get__(self, instance: object, owner: type[Any] | None = None) -> Made:  # type: ignore[override]
        with self._making:
            return super().__get__(instance, owner)


class Connections:
    """The engine's own pools. They open their connections in the same way as the application's engine.

    Without a pooler, they keep prepared statements. Nothing else on them outlives its transaction. So a pooler may
    stand before PostgreSQL and give each transaction a different connection. `schema` holds the engine's tables. None
    means the schema that the database uses by default.
    """

    def __init__(self, shared: Engine, lease: float, schema: str | None, outages: Outages) -> None:
        self._shared, self._schema, self._outages = shared, schema, outages
        outages.emptied.append(self._end_separate)
        # Time-outs of half a lease, at least 2 s (libpq's minimum). Without them TCP keeps a silently dropped
        # connection for about 15 minutes.
        seconds = max(2, int(lease / 2))
        waiting: dict[str, Any] = {"connect_timeout": seconds, "tcp_user_timeout": seconds * 1000}
        waiting |= {"keepalives_idle": seconds, "keepalives_interval": 1, "prepare_threshold": None}
        self._opener = Opener(shared, {} if self._on_sqlite else waiting)
        self._open: WeakSet[Any] = WeakSet()
        self._separate: WeakSet[Any] = WeakSet()
        self._strict: WeakSet[Any] = WeakSet()
        self._opening = threading.Lock()
        self._closed = 0
        self.cuts = 0
        """The number of calls of `cut`. The failures that `cut` causes are no fault of the server."""
        self.sessions = Sessions(shared, schema)
        """The engine's statements in the sessions of the application."""

    @property
    def _on_sqlite(self) -> bool:
        return self._shared.dialect.name == "sqlite"

    @made_once
    def claims(self) -> Engine:
        """The pool of the statements that decide which instance runs a tick or a message."""
        if not self._on_sqlite:
            return self._postgresql(pool_size=10)  # with 5, ten threads opened and closed other connections
        # The pool has no limit. Otherwise a heartbeat would wait behind the claims that wait for the write lock.
        engine = self._engine(
            self._opener.open,
            self._schema,
            lambda dialect, record: sqlite.connecting(dialect, record, [self._path]),
        )
        sqlite.prepare(engine)
        return engine

    @made_once
    def heartbeats(self) -> Engine:
        """The pool of the heartbeats, which no other work can starve. It can also read the workers' rows.

        On SQLite a run that has written holds the only write lock until it commits. So the heartbeats have a small
        database beside the main database. All processes of both files live on one host. Open only transactions of one
        statement here, as BEGIN IMMEDIATE would lock the main database too. SQLite looks for a table without a schema
        in the small database first, then in the main database.
        """
        if not self._on_sqlite:
            return self._postgresql(pool_size=1)
        own, main = str(self.heartbeat_file), self._file

        def connecting(_dialect: Dialect, record: Any) -> None:
            sqlite.expect_file(main)
            database_files.make_private(own, like=main)
            for path in (own, main):
                database_files.expect(record, path)

        engine = self._engine(partial(self._open_beside, own), None, connecting)

        @event.listens_for(engine, "connect")
        def connected(connection: Any, record: Any) -> None:
            with sqlite.closed_on_error(connection):
                sqlite.configure(connection, isolation_level=None)
                for table in (instances, locks):
                    _make(connection, table, engine.dialect)
                connection.execute("ATTACH DATABASE ? AS main_database", (main,))
                database_files.note(record)

        database_files.watch(engine)
        return engine

    @property
    def heartbeat_file(self) -> str | None:
        """The path of the heartbeats' small database on SQLite. None on PostgreSQL."""
        return f"{self._file}-instances" if self._on_sqlite else None

    @made_once
    def log_file(self) -> str | None:
        """The path of SQLite's write-ahead log. None on PostgreSQL."""
        return f"{self._file}-wal" if self._on_sqlite else None

    @made_once
    def _path(self) -> str:
        """The path of the database's file, as the application wrote it. With a `creator`, that of its connection."""
        path = str(self._shared.url.database)
        if has_creator(self._shared) or path.startswith("file:"):
            connection = self._opener.open()
            path = sqlite.file_of(connection)
            connection.close()
            if not path:
                raise sqlite.in_memory(self._shared)
        return path

    @property
    def _file(self) -> str:
        return os.path.realpath(self._path)  # another process may open the file by other links

    @made_once
    def _folder(self) -> str:
        return os.path.dirname(self._file)

    def let_others_write(
        self, wait: Callable[[float], bool], rest: float = _POLL_SECONDS, longest: float = math.inf
    ) -> None:
        """Rest. Go on while a connection waits for SQLite's only write lock, for at most `longest` seconds.

        SQLite's writers poll for the lock. Without this rest, they would rarely find it free between transactions.
        `wait` waits for a number of seconds, and returns whether the run must stop.
        """
        until = steady() + min(longest, _LONGEST_TURN_SECONDS)
        while not wait(rest) and steady() < until:
            if not write_lock.is_awaited(self._folder):
                return
            rest = _POLL_SECONDS

    def refuse_missing(self) -> None:
        """Raise FileNotFoundError for a missing SQLite file. SQLite would make an empty file."""
        if self._on_sqlite:
            os.stat(self._path)

    @contextmanager
    def listening(self) -> Iterator[Any]:
        """Open a psycopg connection that commits each statement. Close it at the end of the block."""
        connection = self.open_separately()
        try:
            yield connection
        finally:
            connection.close()

    def open_separately(self) -> Any:
        """Open a psycopg connection that commits each statement. It is in no pool: the caller closes it."""
        connection = self._open_postgresql()
        connection.autocommit = True
        with self._opening:
            self._separate.add(connection)
        return connection

    @property
    def locks(self) -> Engine:
        """The pool for the user's locks, one statement at a time.

        On SQLite this is the pool of the heartbeats. The session of a caller may hold the main database's only write
        lock. In that database, acquiring or releasing a lock would then wait for the caller itself.
        """
        return self.heartbeats if self._on_sqlite else self.claims

    def cut(self) -> None:
        """Have each call that waits for PostgreSQL fail now, in any thread. Later calls get new connections."""
        self.cuts += 1
        with self._opening:
            connections = list(self._open)
        for connection in connections:
            _shut_down(connection)
        self.close()

    def _end_separate(self) -> None:
        """End the connections in no pool, so that their users open others. A read-only server notifies no client."""
        with self._opening:
            connections = list(self._separate)
        for connection in connections:
            _shut_down(connection)

    def close(self) -> None:
        """Close idle connections now, and each connection in use when it is given back."""
        self._closed += 1
        for opened in ("claims", "heartbeats"):
            if opened in self.__dict__:
                self.__dict__[opened].pool.dispose()  # keep the pool itself, as other threads may be using it

    def _engine(
        self,
        opened: Callable[[], Any],
        schema: str | None,
        connecting: Callable[[Dialect, Any], object] = lambda dialect, record: None,
        **options: Any,
    ) -> Engine:
        """Return an engine whose connections `opened` opens.

        A connection that is in use during `close` is closed when it is given back.
        """

        def create(connection_record: Any = None) -> Any:
            connection_record.info["closed"] = self._closed
            connecting(engine.dialect, connection_record)
            return opened()

        tables = {"schema_translate_map": {None: schema}} if schema else {}
        engine = create_engine(
            self._shared.url,
            creator=create,
            module=self._shared.dialect.dbapi,
            poolclass=QueuePool,
            max_overflow=-1,
            hide_parameters=True,
            execution_options=tables,
            **options,
        )

        @event.listens_for(engine, "checkin")
        def returned(connection: Any, record: Any) -> None:
            if connection is not None and record.info["closed"] != self._closed:
                record.invalidate()

        return engine

    def _open_beside(self, file: str) -> Any:
        """Open the small database. The application's own function may open only the main database."""
        connection = self._opener.open(file)
        if os.path.realpath(sqlite.file_of(connection)) != os.path.realpath(file):
            connection.close()
            connection = self._shared.dialect.connect(file, check_same_thread=False)
        return connection

    def _postgresql(self, pool_size: int) -> Engine:
        """Return an engine whose own statements run at READ COMMITTED, whatever the server's default."""
        engine = self._engine(
            self._open_postgresql, self._schema, isolation_level="READ COMMITTED", pool_size=pool_size
        )
        engine.dialect.reads_utc = True  # type: ignore[attr-defined]  # each connection does, see `read_any_moment`
        postgresql.prepare(engine)
        postgresql.hide_refused_rows(engine)
        self._outages.watch(engine)

        @event.listens_for(engine, "connect")
        def connected(connection: Any, _record: Any) -> None:
            if connection in self._strict and is_new(engine, self._begin):
                event.listen(engine, "begin", self._begin)

        return engine

    def _begin(self, connection: Connection) -> None:
        """Begin a single statement's transaction at READ COMMITTED, where the server's default is stricter."""
        driver: Any = connection.connection.driver_connection
        if driver.autocommit and driver in self._strict:
            connection.exec_driver_sql("BEGIN ISOLATION LEVEL READ COMMITTED")

    def _open_postgresql(self) -> Any:
        connection = self._opener.open()
        try:
            if connection.autocommit:
                raise autocommit_refused(self._shared.url)
            connection.commit()  # keep the settings of a `connect` listener, such as a role
            connection.prepare_threshold = None
            postgresql.read_any_moment(connection)
            connection.autocommit = True
            (default,) = connection.execute("SHOW default_transaction_isolation").fetchone()
            connection.autocommit = False
        except BaseException:
            connection.close()
            raise
        with self._opening:
            self._open.add(connection)
            if default in ("repeatable read", "serializable"):
                self._strict.add(connection)
                self.sessions.is_strict = True
        return connection


def _shut_down(connection: Any) -> None:
    with suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as its_socket:
        its_socket.shutdown(socket.SHUT_RDWR)


def _make(connection: Any, table: Table, dialect: Dialect) -> None:
    """Make the table and its later columns, if they are missing.

    Concurrency: each process that opens the file may do the same.
    """
    connection.execute(str(CreateTable(table, if_not_exists=True).compile(dialect=dialect)))
    known = {row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")}
    for column in table.columns:
        if column.name not in known:
            with suppress(sqlite3.OperationalError):  # another process was first
                kind = column.type.compile(dialect)
                connection.execute(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}")


def again_if_stale(ask: Callable[[], Answer]) -> Answer:
    """Return the result of `ask`, which may be called once more for each pool.

    A pooled connection may be older than the server's last restart. Its first use fails then, so call `ask` again.
    """
    for _ in range(_POOLS):
        try:
            return ask()
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
    return ask()


_POOLS = 3  # the application's, the engine's and its heartbeats'

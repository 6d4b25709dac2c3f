"""SQLite has one writer: what every connection needs so that "database is locked" reaches nobody."""

import os
import sqlite3
import threading
import time
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import OperationalError

from .errors import InvalidConfig

BUSY_SECONDS = 30
_MOMENT_SECONDS = 0.1


def prepare(engine: Engine) -> None:
    """Set every later connection of a SQLite `engine` up; any other engine is left alone.

    The driver's legacy transactions with BEGIN IMMEDIATE: a read keeps no snapshot, and the first write
    waits for the lock. (A read and then a write in one deferred transaction fails at once, whatever the
    time-out, if anybody committed in between.)
    """
    if engine.dialect.name == "sqlite" and not event.contains(engine, "connect", _connected):
        event.listen(engine, "do_connect", _make_private)
        event.listen(engine, "connect", _connected)
        event.listen(engine, "savepoint", _begin_before_savepoint)


def refuse_memory(engine: Engine) -> None:
    """A database in memory is a single connection, on which a heartbeat's read would roll a run back."""
    if engine.dialect.name == "sqlite" and engine.url.database in (None, "", ":memory:"):
        raise InvalidConfig(
            f"The database {engine.url} is in the memory of one connection; expected one that several connections "
            "can share: use a file, in a test one of its temporary folder."
        )


def configure(connection: Any, isolation_level: str | None) -> None:
    """Set one connection of the driver's up; `isolation_level` is the driver's, None to commit each statement."""
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    _use_wal(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.isolation_level = isolation_level


def _use_wal(connection: Any) -> None:
    """Of several that open a new file at once one makes it a WAL; SQLite does not have the others wait for that."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            threading.Event().wait(0.01)


def _make_private(_dialect: Any, _record: Any, arguments: Any, _parameters: Any) -> None:
    """A new file, which SQLite would let everybody on the machine read; one that is there stays as it is."""
    with suppress(OSError):
        if os.path.isabs(arguments[0]):  # it is no `:memory:`, and no URI
            os.close(os.open(arguments[0], os.O_CREAT | os.O_EXCL, 0o600))


def _connected(connection: Any, _record: Any) -> None:
    configure(connection, "IMMEDIATE")


def _begin_before_savepoint(connection: Connection, _name: str) -> None:
    """The driver opens no transaction for a SAVEPOINT, so releasing it would commit on its own."""
    if not connection.connection.dbapi_connection.in_transaction:  # type: ignore[union-attr]
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def refuse_read_only(engine: Engine) -> None:
    """Raise OperationalError where the database takes no writes; a lock that another process holds is fine."""
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.execute("PRAGMA busy_timeout = 0")
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except OperationalError as error:
            if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
                raise
        finally:
            connection.rollback()
            driver.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")


def lock_soon(connection: Connection) -> None:
    """Take the write lock now, unless somebody keeps it for longer than a moment: then the first write waits for it."""
    driver: Any = connection.connection.driver_connection
    driver.execute(f"PRAGMA busy_timeout = {_MOMENT_SECONDS * 1000:.0f}")
    with suppress(sqlite3.Error):  # whatever it is, the next statement meets it, and SQLAlchemy tells of it
        driver.execute("BEGIN IMMEDIATE")
    driver.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")

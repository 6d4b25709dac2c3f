"""Settings that each connection to SQLite needs, so that no user sees "database is locked"."""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Dialect, Engine, event
from sqlalchemy.exc import OperationalError

from ...errors import InvalidConfig
from ...host.listeners import is_new
from . import sqlite_files as database_files
from .error_codes import is_busy
from .write_lock import waiting
from .writes import COMMITS_ITSELF, changes_rows, has_cte

BUSY_SECONDS = 30
OPEN_SECONDS = 10
"""The longest wait for a new connection while another process keeps the file locked."""
_CHILDS_WAIT_SECONDS = 1.0
_MOMENT_SECONDS = 0.1
# The dialects of engines that have opened their file since their last `dispose`.
_opened_before: WeakSet[Dialect] = WeakSet()


def prepare(engine: Engine) -> None:
    """Have each later connection of a SQLite `engine` set up. Leave other engines alone.

    Use the driver's legacy transactions with BEGIN IMMEDIATE. A read keeps no snapshot, and the first write waits for
    the lock. In a deferred transaction, a write after a read fails immediately if another connection committed in
    between. No time-out helps there.
    """
    if engine.dialect.name == "sqlite" and is_new(engine, _connected):
        event.listen(engine, "do_connect", connecting)
        event.listen(engine, "connect", _connected)
        event.listen(engine, "engine_disposed", _disposed)
        database_files.watch(engine)
        event.listen(engine, "savepoint", _begin_before_savepoint)
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            event.listen(engine, name, _begin_before_write)


def wait_briefly(engine: Engine) -> None:
    """Have each later connection of a SQLite `engine` wait only briefly for a lock, in a forked child of a run.

    SQLite keeps its locks in memory too. A lock that the parent held during the fork stays held in the child for ever.
    """
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _wait_briefly)


def _wait_briefly(connection: Any, _record: Any) -> None:
    connection.execute(f"PRAGMA busy_timeout = {_CHILDS_WAIT_SECONDS * 1000:.0f}")


def refuse_memory(engine: Engine) -> None:
    """Raise InvalidConfig for a database in memory. A heartbeat on its only connection would roll a run back."""
    if engine.dialect.name == "sqlite" and engine.url.database in (None, "", ":memory:"):
        raise in_memory(engine)


def in_memory(engine: Engine) -> InvalidConfig:
    """Return the error for a database that only one connection can use."""
    return InvalidConfig(
        f"The database {engine.url} is in the memory of one connection; expected one that several connections "
        "can share: use a file, in a test a file in its temporary folder."
    )


def is_locked(engine: Engine) -> bool:
    """Return whether a connection holds the write lock now. Raises OperationalError for a read-only database."""
    with engine.connect() as connection:
        return not _is_lock_taken(connection)


def _is_lock_taken(connection: Connection) -> bool:
    """Take the write lock without waiting, until the connection is given back. Return False if it is taken."""
    driver: Any = connection.connection.driver_connection
    driver.execute("PRAGMA busy_timeout = 0")
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    except OperationalError as error:
        if not is_busy(error):
            raise
        return False
    finally:
        driver.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    return True


def configure(connection: Any, isolation_level: str | None) -> None:
    """Set up one connection of the driver. With the `isolation_level` None, it commits each statement."""
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {OPEN_SECONDS * 1000:.0f}")
    _use_wal(connection)
    connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.isolation_level = isolation_level


def _use_wal(connection: Any) -> None:
    """Turn the write-ahead log on. Raises InvalidConfig if the file system refuses it.

    Concurrency: several processes may open a new file at the same time. One of them turns the log on. SQLite does not
    make the other processes wait, so they try again.
    """
    mode = _made_wal(connection)
    if mode != "wal" and (path := file_of(connection)):
        raise InvalidConfig(
            f"The file system of {path} refuses SQLite's write-ahead log (journal_mode is {mode!r}); "
            "expected one that supports it: move the database to a local disk, or use PostgreSQL."
        )


def _made_wal(connection: Any) -> str:
    """Try to turn the log on, again and again while the file is locked. Return the journal's mode."""
    until = time.monotonic() + OPEN_SECONDS
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if time.monotonic() <= until:
                threading.Event().wait(0.01)
            elif "locked" in str(error):
                raise sqlite3.OperationalError(_locked(file_of(connection))) from error
            else:
                raise


def file_of(connection: Any) -> str:
    """Return the path of the file that a connection has open. Empty for a database in memory."""
    _number, _name, path = connection.execute("PRAGMA database_list").fetchone()
    return str(path or "")


def _locked(path: str) -> str:
    return (
        f"database is locked: another process has kept {path} locked for {OPEN_SECONDS} s. "
        f"Expected an unlocked file within that time: end that process (`fuser {path}` shows it)."
    )


def connecting(dialect: Dialect, record: Any, arguments: Any, _parameters: Any = None) -> None:
    """Make a new file private, as SQLite would let every user read it. Remember which file is opened."""
    path = arguments[0]
    if not os.path.isabs(path):  # `:memory:`, or a URI
        return
    if dialect in _opened_before:
        expect_file(path)
    database_files.make_private(path)
    with suppress(FileNotFoundError):  # SQLite reports a missing folder
        database_files.expect(record, path)
        _opened_before.add(dialect)


def expect_file(path: str) -> None:
    """Raise sqlite3.OperationalError for a missing file. SQLite would make an empty file and so hide the loss."""
    if not os.path.exists(path):
        raise sqlite3.OperationalError(
            f"The database file {path} was deleted; expected it at that path: restore it, or make another with "
            "`flask db upgrade`."
        )


def _connected(connection: Any, record: Any) -> None:
    with closed_on_error(connection):
        configure(connection, "IMMEDIATE")
        database_files.note(record)


@contextmanager
def closed_on_error(connection: Any) -> Iterator[None]:
    """Close a connection that cannot be set up. The pool forgets it, and Python warns of an open connection."""
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _disposed(engine: Engine) -> None:
    _opened_before.discard(engine.dialect)


def _begin_before_savepoint(connection: Connection, _name: str) -> None:
    """Begin a transaction before a SAVEPOINT. The release of the savepoint would commit otherwise."""
    if not connection.connection.dbapi_connection.in_transaction:  # type: ignore[union-attr]
        with waiting(database_files.folder(connection)):
            connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_before_write(cursor: Any, statement: str, *more: Any) -> bool:
    """Begin a transaction before its first write, and show that this connection may have to wait for it.

    The driver begins none before a write with WITH. SQLite would commit such a write at once.
    Return True if the statement was sent as well: a write that commits itself holds the lock for this one step only.
    """
    driver, context = cursor.connection, more[-1]
    if driver.isolation_level is None or driver.in_transaction or not changes_rows(statement):
        return False
    with waiting(database_files.folder(context.root_connection)):
        if context.execution_options.get(COMMITS_ITSELF) and has_cte(statement):
            cursor.execute(statement, *more[:-1])
            return True
        driver.execute("BEGIN IMMEDIATE")
        return False


def lock_soon(connection: Connection, seconds: float | None = None) -> bool:
    """Take the write lock now, unless another connection keeps it for longer. The first write waits for it then.

    Return whether the lock is taken.
    """
    driver: Any = connection.connection.driver_connection
    driver.execute(f"PRAGMA busy_timeout = {(seconds or _MOMENT_SECONDS) * 1000:.0f}")
    # The next statement meets the same error, and SQLAlchemy reports it.
    with suppress(sqlite3.Error), waiting(database_files.folder(connection)):
        driver.execute("BEGIN IMMEDIATE")
    driver.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    return bool(driver.in_transaction)

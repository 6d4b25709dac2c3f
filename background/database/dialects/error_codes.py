"""Error codes of PostgreSQL and SQLite, and tests of an error.

Each test takes the driver's error or SQLAlchemy's error for it. The result is False for any other error.
"""

import sqlite3

from sqlalchemy.exc import DBAPIError, OperationalError

# SQLSTATE, the codes of PostgreSQL. A shorter text stands for each code that begins with it.
_CONNECTION_BROKEN = "08"
_FEATURE_NOT_SUPPORTED = "0A000"
_READ_ONLY = "25006"
_LOGIN_REFUSED = "28"
_UNDEFINED = ("42P01", "42703")  # a table, a column
_DUPLICATE = ("42P07", "42701", "42710")  # a table or an index, a column, another object
_SCHEMA_UNKNOWN = "3F000"
_DATABASE_UNKNOWN = "3D"
_SERIALIZATION_FAILURE = "40001"
_OUT_OF_RESOURCES = "53"
_LIMIT_EXCEEDED = "54"
_NOT_IN_THIS_STATE = "55000"
_LOCK_NOT_AVAILABLE = "55P03"
_SERVER_ENDED = "57P"  # shut down, crashed, starting, dropped, or idle for too long
_INTERNAL = "XX000"

_OF_A_FILE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)
_OF_STORAGE = (*_OF_A_FILE, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


def is_database_unknown(error: BaseException) -> bool:
    """Return whether PostgreSQL has no database of that name."""
    return _has(error, _DATABASE_UNKNOWN)


def is_undefined(error: BaseException) -> bool:
    """Return whether the database has no such table or column. SQLite has no code for this."""
    text = str(error.orig) if isinstance(error, DBAPIError) else ""
    return _has(error, *_UNDEFINED) or text.startswith(("no such table: ", "no such column: "))


def is_of_another_schema(error: BaseException) -> bool:
    """Return whether a statement does not fit the tables that are there. SQLite has no code for this."""
    text = str(error.orig) if isinstance(error, DBAPIError) else ""
    return is_undefined(error) or _has(error, *_DUPLICATE, _SCHEMA_UNKNOWN) or text.endswith(" already exists")


def is_of_storage(error: BaseException) -> bool:
    """Return whether SQLite cannot read or write its file: a full disk, a read-only folder, another kind of file."""
    return _sqlite_code(error) in _OF_STORAGE


def is_lock_unavailable(error: BaseException) -> bool:
    """Return whether PostgreSQL ended a statement because another transaction kept a lock for too long."""
    return _has(error, _LOCK_NOT_AVAILABLE)


def is_too_large(error: BaseException) -> bool:
    """Return whether PostgreSQL refused a statement because of its size or the size of a value."""
    return _has(error, _LIMIT_EXCEEDED)


def is_read_only(error: BaseException) -> bool:
    """Return whether PostgreSQL refused a write in a transaction that only reads."""
    return _has(error, _READ_ONLY)


def is_connection_ended(error: BaseException) -> bool:
    """Return whether PostgreSQL or the network ended the connection."""
    return _has(error, _CONNECTION_BROKEN, _SERVER_ENDED)


def is_of_recovery(error: BaseException) -> bool:
    """Return whether a PostgreSQL server in recovery gives this error. Other servers give it for other reasons."""
    return _has(error, _FEATURE_NOT_SUPPORTED, _SERIALIZATION_FAILURE, _NOT_IN_THIS_STATE, _INTERNAL)


def is_busy(error: BaseException) -> bool:
    """Return whether another connection holds SQLite's lock."""
    return _sqlite_code(error) == sqlite3.SQLITE_BUSY


def is_unreachable(error: DBAPIError) -> bool:
    """Return whether the database served no request: broken, refused, unknown, out of resources, or starting."""
    if (code := _sqlite_code(error)) is not None:
        return code in _OF_A_FILE
    if _sqlstate(error) is None:
        return error.statement is None and isinstance(error, OperationalError)  # no connection could be opened
    return is_connection_ended(error) or _has(error, _LOGIN_REFUSED, _DATABASE_UNKNOWN, _OUT_OF_RESOURCES)


def is_connect_failure(error: DBAPIError) -> bool:
    """Return whether no PostgreSQL server answered, or the server ended the connection while it was opened.

    The server gives its own errors a code.
    """
    return error.statement is None and (getattr(error.orig, "sqlstate", "") is None or is_connection_ended(error))


def _has(error: BaseException, *codes: str) -> bool:
    return (_sqlstate(error) or "").startswith(codes)


def _sqlstate(error: BaseException) -> str | None:
    state = getattr(_of_driver(error), "sqlstate", None)
    return state if isinstance(state, str) else None


def _sqlite_code(error: BaseException) -> int | None:
    """Return SQLite's code without the bits that give details."""
    code = getattr(_of_driver(error), "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _of_driver(error: BaseException) -> BaseException | None:
    return error.orig if isinstance(error, DBAPIError) else error

"""Texts of bounded length for the errors of a user's code, and the database errors that may pass by themselves."""

from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import DBAPIError

_LOCK_NOT_AVAILABLE = "55P03"


def waited_in_vain(error: DBAPIError) -> bool:
    """Return whether PostgreSQL ended a statement because another transaction kept a lock for too long."""
    return getattr(error.orig, "sqlstate", None) == _LOCK_NOT_AVAILABLE


def prepare(engine: Engine) -> None:
    """Pin each new connection of a PostgreSQL engine. Leave other engines alone."""
    if engine.dialect.name == "postgresql" and not event.contains(engine, "connect", _pin):
        event.listen(engine, "first_connect", _pin, insert=True)  # before SQLAlchemy asks for the server's version
        event.listen(engine, "connect", _pin)


def _pin(connection: Any, _record: Any) -> None:
    """Have psycopg's `connection` write moments by ISO 8601 and text in an encoding that the driver knows.

    The server reports its settings at the connect, so nothing is sent if they already fit. Poolers keep these two
    settings with their client. The order of day and month, and the time zone, stay as they are.
    """
    wanted = []
    if not (reported(connection, "DateStyle") or "").startswith("ISO"):
        wanted.append("SET DateStyle = ISO")
    if _is_foreign(reported(connection, "client_encoding"), reported(connection, "server_encoding")):
        wanted.append("SET client_encoding = 'UTF8'")
    for statement in wanted:
        connection.execute(statement)
    if wanted and not connection.autocommit:
        connection.commit()


def _is_foreign(client: str | None, server: str | None) -> bool:
    """Return whether text may get lost on the way, or cannot be read by the driver."""
    return client == "SQL_ASCII" or client not in ("UTF8", server)  # of SQL_ASCII the driver gives bytes


def reported(connection: Any, name: str) -> str | None:
    """Return the setting `name` as the server last reported it. None if the server or the driver does not report it."""
    info = getattr(connection, "info", None)
    return info.parameter_status(name) if info is not None and not connection.closed else None

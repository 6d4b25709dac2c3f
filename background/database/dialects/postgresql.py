"""Settings that each connection to PostgreSQL needs, and errors without the refused row."""

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Engine, ExceptionContext, event
from sqlalchemy.exc import DataError, IntegrityError

from ...host.listeners import is_new


def prepare(engine: Engine) -> None:
    """Have each later connection of a PostgreSQL engine set up. Leave other engines alone."""
    if engine.dialect.name == "postgresql" and is_new(engine, _configure):
        event.listen(engine, "first_connect", _configure, insert=True)  # before SQLAlchemy queries the version
        event.listen(engine, "connect", _configure)


def _configure(connection: Any, _record: Any) -> None:
    """Have the server write moments by ISO 8601 on psycopg's `connection`, and text in an encoding that psycopg knows.

    The server reports its settings while it connects, so nothing is sent if they already fit. Poolers keep these two
    settings for each client. The order of day and month, and the time zone, stay as they are.
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


def read_any_moment(connection: Any) -> None:
    """Have psycopg's `connection` read each moment that PostgreSQL can hold, such as 'infinity', in UTC."""
    connection.adapters.register_loader("timestamptz", _moments())


@lru_cache(maxsize=1)
def _moments() -> Any:
    """Return a loader of moments in UTC. It reads a moment beyond Python's range as 1970 or 9000.

    The error of psycopg's own loader would end each page and each claim.
    """
    import psycopg  # deferred, as an application on SQLite needs no psycopg
    from psycopg.adapt import Loader

    class Moments(Loader):
        def __init__(self, oid: int, context: Any = None) -> None:
            super().__init__(oid, context)
            usual: Any = psycopg.adapters.get_loader(oid, self.format)
            self._load = usual(oid, context).load

        def load(self, data: Any) -> Any:
            try:
                at = datetime.fromisoformat(str(data, "ascii"))  # takes a third of the time of psycopg's loader
            except ValueError:
                at = self._other(data)
            return at if at.tzinfo is UTC else at.astimezone(UTC)

        def _other(self, data: Any) -> Any:
            try:
                return self._load(data)
            except psycopg.DataError:
                is_before = bytes(data).startswith(b"-") or bytes(data).endswith(b"BC")
                return datetime(1970 if is_before else 9000, 1, 1, tzinfo=UTC)

    return Moments


def hide_refused_rows(engine: Engine) -> None:
    """Keep the row that PostgreSQL refuses out of errors. Its messages quote the row despite `hide_parameters`."""
    event.listen(engine, "handle_error", _hide_row)


def _hide_row(context: ExceptionContext) -> None:
    """Shorten the error to the server's first sentence, which does not quote the row."""
    error, wrapped = context.original_exception, context.sqlalchemy_exception
    sentence = getattr(getattr(error, "diag", None), "message_primary", None)  # None if the driver itself raised it
    if sentence and isinstance(wrapped, IntegrityError | DataError):
        wrapped.args = (str(wrapped.args[0]).replace(str(error), sentence),)
        error.args = (sentence,)


def _is_foreign(client: str | None, server: str | None) -> bool:
    """Return whether characters may be lost between client and server, or the driver cannot read the text."""
    return client == "SQL_ASCII" or client not in ("UTF8", server)  # for SQL_ASCII the driver returns bytes


def reported(connection: Any, name: str) -> str | None:
    """Return the setting `name` that the server last reported. None if the server or the driver does not report it."""
    info = getattr(connection, "info", None)
    return info.parameter_status(name) if info is not None and not connection.closed else None

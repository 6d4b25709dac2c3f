"""Pages while the database is away: 503 and one line in the log, not 500 and a traceback."""

import sqlite3

from flask import current_app, request
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from werkzeug.exceptions import ServiceUnavailable

from ..database.outages import is_cut_off
from ..errors import first_line
from ..host.logs import logger_of

log = logger_of(__name__)

_RETRY_AFTER_SECONDS = 5
_OF_SQLITE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)  # the low bytes of the codes, whose other bits are details
_OF_POSTGRESQL = ("08", "28", "3D", "53", "57P")  # broken, refused, unknown, out of resources, stopping or starting


def unavailable(error: SQLAlchemyError) -> ResponseReturnValue:
    """Answer 503 with Retry-After, in the application's own look. Raise `error` again if the database did answer.

    Register it as the error handler of an application or a blueprint.
    """
    if not is_away(error):
        raise error
    log.warning("The database is away, so %s is answered with 503: %s", request.endpoint, first_line(error))
    sorry = ServiceUnavailable("The database does not answer at the moment.", retry_after=_RETRY_AFTER_SECONDS)
    return current_app.handle_http_exception(sorry)


def is_away(error: SQLAlchemyError) -> bool:
    """Return whether the database could not be asked: out of reach, its connection broken, or none left in the pool."""
    if isinstance(error, PoolTimeout) or is_cut_off(error):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code, state = getattr(error.orig, "sqlite_errorcode", None), getattr(error.orig, "sqlstate", None)
    if code is None and state is None:
        return error.statement is None and isinstance(error, OperationalError)  # no connection could be opened
    return (code is not None and code & 0xFF in _OF_SQLITE) or (state or "").startswith(_OF_POSTGRESQL)

"""Responds to requests while the database is away: 503 and one line in the log, not 500 and a traceback."""

from flask import current_app, request
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from werkzeug.exceptions import ServiceUnavailable

from ..database.dialects.error_codes import is_unreachable
from ..database.outages import is_cut_off
from ..errors import first_line
from ..host.logs import logger_of

log = logger_of(__name__)

_RETRY_AFTER_SECONDS = 5


def unavailable(error: SQLAlchemyError) -> ResponseReturnValue:
    """Respond with 503 and Retry-After, in the application's own look. Raise `error` again if the database did answer.

    Register it as the error handler of an application or a blueprint.
    """
    if not is_away(error):
        raise error
    log.warning(
        "The database is away, so %s is answered with 503: %s", request.endpoint or request.path, first_line(error)
    )
    sorry = ServiceUnavailable("The database does not answer at the moment.", retry_after=_RETRY_AFTER_SECONDS)
    return current_app.handle_http_exception(sorry)


def is_away(error: SQLAlchemyError) -> bool:
    """Return whether the database is out of reach, its connection broken, or no connection left in the pool."""
    if isinstance(error, PoolTimeout) or is_cut_off(error):
        return True
    return isinstance(error, DBAPIError) and is_unreachable(error)

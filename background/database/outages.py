"""Outages of the database: the errors that show an outage, and the pools that it empties."""

from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import URL, Engine, ExceptionContext, event
from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    InternalError,
    OperationalError,
    SQLAlchemyError,
    TimeoutError,
)

from ..host.forks import ForkSafeLock
from ..host.listeners import is_new
from .dialects.error_codes import is_connect_failure, is_connection_ended, is_of_recovery, is_read_only, is_too_large
from .dialects.postgresql import reported

_STAMP = "outages"


def may_pass(error: BaseException) -> bool:
    """Return whether the same statement may succeed later: the database is away or busy, and refused no value."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, TimeoutError | DisconnectionError | OSError)
    is_of_the_moment = isinstance(error, OperationalError | InterfaceError | InternalError)
    return error.connection_invalidated or (is_of_the_moment and not is_too_large(error))


class Outages:
    """Empties the pools of one database's engines together."""

    def __init__(self) -> None:
        self.emptied: list[Callable[[], None]] = []
        """Functions that each outage calls. They end connections that are in no pool."""
        self._number = 0
        self._counting = ForkSafeLock()

    def watch(self, engine: Engine) -> None:
        """Watch the pool of `engine`. An outage that one of its connections meets empties all watched pools."""
        if engine.dialect.name != "postgresql" or not is_new(engine, self._failed):
            return
        event.listen(engine, "connect", self._opened)
        event.listen(engine, "checkout", self._check)
        event.listen(engine, "handle_error", self._failed)

    def notice(self, error: BaseException) -> None:
        """Empty the pools if the driver's own error shows an outage. No engine saw that error."""
        if any(_shows_outage(each, None) for each in causes(error) if not isinstance(each, SQLAlchemyError)):
            self._empty(self._number)

    def _opened(self, _connection: Any, record: Any) -> None:
        record.info[_STAMP] = self._number

    def _check(self, _connection: Any, record: Any, _proxy: Any) -> None:
        if record.info.get(_STAMP, 0) != self._number:
            raise DisconnectionError("the connection is older than the last outage of its database")

    def _failed(self, context: ExceptionContext) -> None:
        pooled = context.connection.connection if context.connection is not None else None
        driver = getattr(pooled, "driver_connection", None)
        if pooled is None or not _shows_outage(context.original_exception, driver):
            return
        context.is_disconnect = True
        self._empty(pooled.info.get(_STAMP, 0))

    def _empty(self, opened: int) -> None:
        """Empty the pools, unless that was done after the outage with the number `opened`.

        Concurrency: many threads of this process meet one outage. Later errors of old connections empty no new pool.
        """
        with self._counting:
            if opened != self._number:
                return
            self._number += 1
        for call in self.emptied:
            call()


def place(url: URL) -> tuple[object, ...]:
    """Return the host, the port and the name of a database, without the user and the options of a connection."""
    return url.host or url.query.get("host"), str(url.port or url.query.get("port") or 5432), url.database


def is_cut_off(error: BaseException) -> bool:
    """Return whether the database ended a run by going away or by refusing writes."""
    for each in causes(error):
        if not isinstance(each, DBAPIError):
            if _shows_outage(each, None):
                return True
        elif each.connection_invalidated or is_connect_failure(each):
            return True
    return False


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and each error that led to it, once. SQLAlchemy's error stands for the driver's."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # A handled error is not a cause, except under an error of SQLAlchemy's session.
        led = error.__cause__ or (error.__context__ if isinstance(error, SQLAlchemyError) else None)
        is_same = led is not None and isinstance(error, DBAPIError) and led is error.orig
        error = led.__cause__ if led is not None and is_same else led


def _shows_outage(error: BaseException, driver: Any) -> bool:
    """Return whether `error` means that the server can no longer serve the connection `driver`, if that is known."""
    if is_read_only(error):
        return not _is_read_only_by_choice(driver)
    if is_connection_ended(error):
        return True
    return is_of_recovery(error) and reported(driver, "in_hot_standby") == "on"


def _is_read_only_by_choice(driver: Any) -> bool:
    """Return whether the server takes writes, so that the user made the transaction read-only.

    PostgreSQL reports both settings since version 14. For older servers the result is False.
    """
    return all(reported(driver, name) == "off" for name in ("default_transaction_read_only", "in_hot_standby"))

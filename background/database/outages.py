"""Texts of bounded length for the errors of a user's code, and the database errors that may pass by themselves."""

import threading
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

from ..database.dialects.postgresql import reported

_TOO_LARGE = "54"  # the class of PostgreSQL's "program limit exceeded"


def may_pass(error: BaseException) -> bool:
    """Return whether the same statement may succeed later: the database is away or busy, and refused no value."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, TimeoutError | DisconnectionError | OSError)
    is_of_the_moment = isinstance(error, OperationalError | InterfaceError | InternalError)
    is_too_large = str(getattr(error.orig, "sqlstate", "")).startswith(_TOO_LARGE)
    return error.connection_invalidated or (is_of_the_moment and not is_too_large)


_READ_ONLY = "25006"
_ENDED = ("57P01", "57P02", "57P03", "57P04", "57P05")  # shut down, crashed, starting, dropped, or idle for too long
_DURING_RECOVERY = ("0A000", "40001", "55000", "XX000")  # and other errors: the server must say that it recovers
_STAMP = "outages"


class Outages:
    """The pools of one database's engines, which are emptied together."""

    def __init__(self) -> None:
        self.emptied: list[Callable[[], None]] = []
        """Called at each outage, for connections that are in no pool."""
        self._number = 0
        self._counting = threading.Lock()

    def watch(self, engine: Engine) -> None:
        """Have an error on a connection of `engine` empty all pools, and empty its pool with the others'."""
        if engine.dialect.name != "postgresql" or event.contains(engine, "handle_error", self._failed):
            return
        event.listen(engine, "connect", self._opened)
        event.listen(engine, "checkout", self._asked_for)
        event.listen(engine, "handle_error", self._failed)

    def notice(self, error: BaseException) -> None:
        """Empty the pools for an error that came from the driver itself, past any engine."""
        if any(_is_of_no_use(each, None) for each in causes(error) if not isinstance(each, SQLAlchemyError)):
            self._empty(self._number)

    def _opened(self, _connection: Any, record: Any) -> None:
        record.info[_STAMP] = self._number

    def _asked_for(self, _connection: Any, record: Any, _proxy: Any) -> None:
        if record.info.get(_STAMP, 0) != self._number:
            raise DisconnectionError("the connection is older than the last outage of its database")

    def _failed(self, context: ExceptionContext) -> None:
        pooled = context.connection.connection if context.connection is not None else None
        driver = getattr(pooled, "driver_connection", None)
        if pooled is None or not _is_of_no_use(context.original_exception, driver):
            return
        context.is_disconnect = True
        self._empty(pooled.info.get(_STAMP, 0))

    def _empty(self, opened: int) -> None:
        """Empty the pools once per outage.

        Concurrency: many threads meet one outage. Later errors of old connections empty no new pool.
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
    """Return whether a run ended because the database went away or refused writes, not by a fault of its own."""
    for each in causes(error):
        if not isinstance(each, DBAPIError):
            if _is_of_no_use(each, None):
                return True
            continue
        # The server gives its errors a code. A failure to connect has none.
        cannot_connect = each.statement is None and getattr(each.orig, "sqlstate", "") is None
        if each.connection_invalidated or cannot_connect:
            return True
    return False


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and each error that led to it, once. A driver's error comes as SQLAlchemy's error for it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # An error that was handled on the way is not the cause, unless the session says so.
        led = error.__cause__ or (error.__context__ if isinstance(error, SQLAlchemyError) else None)
        is_same = led is not None and isinstance(error, DBAPIError) and led is error.orig
        error = led.__cause__ if led is not None and is_same else led


def _is_of_no_use(error: BaseException | None, driver: Any) -> bool:
    """Return whether `error` says that the server can no longer serve the connection `driver` (None: not known)."""
    code = getattr(error, "sqlstate", None)
    if not isinstance(code, str):
        return False
    if code == _READ_ONLY:
        return not _is_read_only_by_choice(driver)
    is_standby = reported(driver, "in_hot_standby") == "on"
    return code.startswith("08") or code in _ENDED or (is_standby and code in _DURING_RECOVERY)


def _is_read_only_by_choice(driver: Any) -> bool:
    """Return whether the server itself takes writes: then the user made the transaction read-only.

    PostgreSQL reports both settings since version 14. Before that the answer is no.
    """
    return all(reported(driver, name) == "off" for name in ("default_transaction_read_only", "in_hot_standby"))

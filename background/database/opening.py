"""Opens the driver's connections in the same way as the application's own engine."""

import threading
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, event

from ..errors import InvalidConfig
from ..host.listeners import is_new

_thread = threading.local()


def prepare(engine: Engine) -> None:
    """Let an Opener connect through `engine`. Call this before any thread connects."""
    if is_new(engine, _connect):
        event.listen(engine, "do_connect", _connect)


class Opener:
    """Opens connections with the URL, the arguments, the `creator` and the listeners of the engine `shared`.

    The connections do not come from the application's pool, so the engine never waits for that pool.
    """

    def __init__(self, shared: Engine, arguments: Mapping[str, Any]) -> None:
        self._shared, self._arguments = shared, arguments
        prepare(shared)

    def open(self, file: str | None = None) -> Any:
        """Open one connection. On SQLite open `file` instead, unless the application's own function connects."""
        _thread.request = file, self._arguments
        try:
            pooled = self._shared.pool.recreate().connect()
        finally:
            _thread.request = None
        pooled.detach()
        return pooled.dbapi_connection


def _connect(dialect: Any, record: Any, given: Any, named: Any) -> Any:
    """Connect with the arguments of the Opener that this thread uses, after the application's own listeners."""
    request, _thread.request = getattr(_thread, "request", None), None
    if request is None:
        return None
    file, arguments = request
    given, named = [file, *given[1:]] if file else given, {**named, **arguments}
    listeners = list(dialect.dispatch.do_connect)
    for later in listeners[listeners.index(_connect) + 1 :]:
        if (connection := later(dialect, record, given, named)) is not None:
            return connection
    return dialect.connect(*given, **named)


def refuse_driver(engine: Engine) -> None:
    """Raise InvalidConfig for a database or a driver that the engine does not support."""
    dialect = engine.dialect
    is_known = dialect.name == "sqlite" or (dialect.name, dialect.driver) == ("postgresql", "psycopg")
    if not is_known or dialect.is_async:
        kind = " (async)" if dialect.is_async else ""
        raise InvalidConfig(
            f"The database is reached by {dialect.name}+{dialect.driver}{kind}; expected SQLite, or PostgreSQL by "
            "psycopg 3. Write postgresql+psycopg://... and install it with `pip install psycopg`."
        )


def has_creator(engine: Engine) -> bool:
    """Return whether the application has its own function to connect. The URL does not name the database then."""
    made_by = getattr(getattr(engine.pool, "_creator", None), "__module__", "")
    return made_by != "sqlalchemy.engine.create"

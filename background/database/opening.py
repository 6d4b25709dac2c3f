"""Opens the driver's connections in the same way as the application's own engine."""

import threading
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, event

_here = threading.local()


def prepare(engine: Engine) -> None:
    """Let an Opener open later connections of `engine`, too. No thread may connect while another adds this."""
    if not event.contains(engine, "do_connect", _connect):
        event.listen(engine, "do_connect", _connect)


class Opener:
    """Opens connections with the URL, the arguments, the `creator` and the listeners of the engine `shared`.

    No connection comes from that engine's pool, so the engine never waits for the application's connections.
    """

    def __init__(self, shared: Engine, arguments: Mapping[str, Any]) -> None:
        self._shared, self._arguments = shared, arguments
        prepare(shared)

    def open(self, file: str | None = None) -> Any:
        """Open one connection. On SQLite open `file` instead, unless the application's own function connects."""
        _here.asked = file, self._arguments
        try:
            pooled = self._shared.pool.recreate().connect()
        finally:
            _here.asked = None
        pooled.detach()
        return pooled.dbapi_connection


def _connect(dialect: Any, record: Any, given: Any, named: Any) -> Any:
    """Connect with an Opener's arguments, after the application's own listeners, if this thread asked for it."""
    asked, _here.asked = getattr(_here, "asked", None), None
    if asked is None:
        return None
    file, arguments = asked
    given, named = [file, *given[1:]] if file else given, {**named, **arguments}
    listeners = list(dialect.dispatch.do_connect)
    for later in listeners[listeners.index(_connect) + 1 :]:
        if (connection := later(dialect, record, given, named)) is not None:
            return connection
    return dialect.connect(*given, **named)


def has_creator(engine: Engine) -> bool:
    """Return whether the application connects by a function of its own, so that the URL does not name the place."""
    made_by = getattr(getattr(engine.pool, "_creator", None), "__module__", "")
    return made_by != "sqlalchemy.engine.create"

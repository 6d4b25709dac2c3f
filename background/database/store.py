"""The engine's transactions on one database, and the SQL that differs between the two databases."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, Connection, CursorResult, Engine, func, select
from sqlalchemy.dialects import postgresql, sqlite

from .clock import single_statements
from .sessions import Sessions

_LOCK_SECONDS = 1.0  # after waiting this long for a row lock, free the thread and try again later


class Store:
    """Transactions on the engine's own connections.

    `ring` is called when a row becomes available to any instance. `sessions` adds the engine's statements to the
    application's sessions.
    """

    def __init__(self, engine: Engine, lease: float, ring: Callable[[], None], sessions: Sessions) -> None:
        self.engine, self.ring, self.sessions = engine, ring, sessions
        self.single = single_statements(engine)
        """The same engine, with a transaction for each statement."""
        self.on_sqlite = engine.dialect.name == "sqlite"
        self.insert = sqlite.insert if self.on_sqlite else postgresql.insert
        self.idle: tuple[ColumnElement[str], ...] = ()
        """Columns for a SELECT or a RETURNING that holds a worker's row: they limit how long the row is held."""
        self.limits: tuple[ColumnElement[str], ...] = ()
        """Columns for the first SELECT of a transaction. They also limit how long the transaction waits."""
        if not self.on_sqlite:
            # PostgreSQL ends a transaction that holds a worker's row for longer than a lease, even if its process is
            # frozen. The limit is set for one transaction, because a pooler may stand in between.
            self.idle = (_limit("idle_in_transaction_session_timeout", lease),)
            waiting = _limit("lock_timeout", min(lease, _LOCK_SECONDS))
            self.limits = (*self.idle, waiting, _limit("statement_timeout", lease))

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Begin a transaction that does not wait long for a row, and holds a row for at most a lease."""
        with self.engine.begin() as connection:
            if self.limits:
                connection.execute(select(*self.limits))
            yield connection


def _limit(setting: str, seconds: float) -> ColumnElement[str]:
    return func.set_config(setting, f"{seconds * 1000:.0f}", True)


def count(result: Any) -> int:
    """Return how many rows an INSERT, an UPDATE or a DELETE changed."""
    assert isinstance(result, CursorResult)  # noqa: S101 - for the type checker, as each of these statements has such a result
    return result.rowcount

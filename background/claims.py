"""How each database takes one claim: what is looked at and written while nobody else can."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, Select, select
from sqlalchemy.exc import OperationalError

from .claiming import CLAIM, CLAIM_PENDING, CLAIM_PENDING_AND_START, LOOK, LOOK_AND_CLAIM, START, WAIT
from .clock import single_statements
from .sqlite import lock_soon

Values = Mapping[str, Any]

_SERIALIZATION_FAILURE = "40001"


class Found(NamedTuple):
    """What a look says of a tick: an `id` says that it was claimed."""

    is_open: bool
    is_claimable: bool | None
    token: int | None
    id: int | None


class Started(NamedTuple):
    """The execution of a claim."""

    id: int
    token: int
    attempt: int
    trigger: str


def start(connection: Connection, values: Values, token: int, attempt: int, trigger: str) -> Started:
    """Write the execution's row of a claim that was won in this transaction."""
    more = {"token": token, "attempt": attempt, "trigger": trigger}
    return Started(*connection.execute(START, {**values, **more}).one())


class ClaimsOnSQLite:
    """The only write lock there is comes first: whoever waited for it sees by one look what became of the tick."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def tick(self, values: Values) -> Found | None:
        """Claim a tick that may be claimed; None where there is no such worker."""
        with self._engine.begin() as connection:
            lock_soon(connection)
            row = connection.execute(LOOK, values).one_or_none()
            if row is None or not row.is_claimable:
                return Found(*row) if row else None
            token = connection.execute(CLAIM, values).scalar_one_or_none()
            if token is None:  # somebody was here while this waited for the lock
                return Found(True, False, None, None)
            return Found(True, True, token, start(connection, values, token, 1, "schedule").id)

    def pending(self, values: Values) -> Started | None:
        """Claim a tick that is to be run again."""
        with self._engine.begin() as connection:
            row = connection.execute(CLAIM_PENDING, values).one_or_none()
            return start(connection, values, *row) if row else None


class _Together:
    """Two statements of PostgreSQL's in one request, which is one transaction: the first sets limits to the second.

    A request with parameters has one statement only, so what they stand for is written into its text, by the driver.
    """

    def __init__(self, engine: Engine, first: Select[*tuple[Any, ...]], second: Select[Any]) -> None:
        self.second = second
        self._first, self._second = first.compile(engine), second.compile(engine)

    def row(self, connection: Connection, values: Values) -> Any:
        """The second's only row as a tuple, or None."""
        from psycopg import ClientCursor

        driver: Any = connection.connection.driver_connection
        cursor = ClientCursor(driver)
        texts = (cursor.mogrify(str(each), each.construct_params(values)) for each in (self._first, self._second))
        sent = connection.exec_driver_sql("; ".join(texts), execution_options={"no_parameters": True})
        sent.cursor.nextset()
        row = sent.cursor.fetchone()
        sent.close()
        return row


class ClaimsOnPostgreSQL:
    """One request looks, locks, claims and writes the execution's row. `limits` go with it, for its transaction."""

    def __init__(
        self,
        engine: Engine,
        limits: Sequence[ColumnElement[str]],
        begin: Callable[[], AbstractContextManager[Connection]],
    ) -> None:
        self._single, self._begin = single_statements(engine), begin
        self._tick = _Together(engine, select(WAIT, *limits), LOOK_AND_CLAIM)
        self._pending = _Together(engine, select(*limits), CLAIM_PENDING_AND_START)

    def tick(self, values: Values) -> Found | None:
        """As on SQLite."""
        row = self._sent(self._tick, values)
        return Found(*row) if row else None

    def pending(self, values: Values) -> Started | None:
        """As on SQLite."""
        row = self._sent(self._pending, values)
        return Started(*row) if row else None

    def _sent(self, together: _Together, values: Values) -> Any:
        try:
            with self._single.connect() as connection:
                return together.row(connection, values)
        except OperationalError as error:  # by default this database isolates more strictly, and somebody was here
            if getattr(error.orig, "sqlstate", None) != _SERIALIZATION_FAILURE:
                raise
        with self._begin() as connection:
            return connection.execute(together.second, values).one_or_none()

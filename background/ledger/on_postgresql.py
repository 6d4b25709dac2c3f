"""What decides about one tick of one worker: claim it, skip it, or record as missed those before it.

The statements are built once, as building takes longer than asking. Their values are those of `at_tick`, with the
instance's where an execution begins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Select, select
from sqlalchemy.engine.interfaces import Compiled
from sqlalchemy.sql.compiler import SQLCompiler

from ..database.clock import single_statements
from .claim import NotClaimed, Started
from .statements import CLAIM_PENDING_AND_START, LOOK_AND_CLAIM, WAIT, Values, why_not


class Together:
    """Two statements of PostgreSQL's in one request, which is one transaction: the first sets limits to the second.

    A request with parameters has one statement only, so what they stand for is written into its text, by the driver.
    """

    def __init__(self, engine: Engine, first: Select[*tuple[Any, ...]], second: Any) -> None:
        self.second = second
        tables = engine.get_execution_options().get("schema_translate_map")
        options: dict[str, Any] = {"schema_translate_map": tables, "render_schema_translate": True} if tables else {}
        self._first, self._second = first.compile(engine, **options), second.compile(engine, **options)

    def row(self, connection: Connection, values: Values) -> Any:
        """The second's only row as a tuple, or None."""
        from psycopg import ClientCursor

        driver: Any = connection.connection.driver_connection
        cursor = ClientCursor(driver)
        texts = (cursor.mogrify(*_written(each, values)) for each in (self._first, self._second))
        sent = connection.exec_driver_sql("; ".join(texts), execution_options={"no_parameters": True})
        sent.cursor.nextset()
        row = sent.cursor.fetchone()
        sent.close()
        return row


def _written(statement: Compiled, values: Values) -> tuple[str, Mapping[str, Any] | None]:
    """Return the text of a statement and its parameters."""
    if not isinstance(statement, SQLCompiler) or not statement.literal_execute_params:
        return str(statement), statement.construct_params(values)
    whole = statement.construct_expanded_state(values)  # with the values that SQLAlchemy itself writes into the text
    made: Any = statement._bind_processors
    return whole.statement, {
        name: made[name](value) if name in made else value for name, value in (whole.parameters or {}).items()
    }


class ClaimsOnPostgreSQL:
    """One request looks, locks, claims and writes the execution's row. `limits` go with it, for its transaction."""

    def __init__(self, engine: Engine, limits: Sequence[ColumnElement[str]]) -> None:
        self._single = single_statements(engine)
        self._tick = Together(engine, select(WAIT, *limits), LOOK_AND_CLAIM)
        self._pending = Together(engine, select(*limits), CLAIM_PENDING_AND_START)

    def tick(self, values: Values) -> Started | NotClaimed:
        """Claim a tick that may be claimed."""
        row = self._sent(self._tick, values)
        return why_not(row) if row is None or row[-1] is None else Started(*row[1:])

    def pending(self, values: Values) -> Started | None:
        """Claim a tick that must run again."""
        row = self._sent(self._pending, values)
        return Started(*row) if row else None

    def _sent(self, together: Together, values: Values) -> Any:
        with self._single.begin() as connection:
            return together.row(connection, values)

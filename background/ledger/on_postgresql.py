"""Claims on PostgreSQL: limits, look, lock, claim and the execution's row, in one request."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Select, select
from sqlalchemy.engine.interfaces import Compiled
from sqlalchemy.sql.compiler import SQLCompiler

from ..database.clock import single_statements
from .claim import NotClaimed, Started
from .statements import CLAIM_PENDING_AND_START, LOOK_AND_CLAIM, WAIT, Values, why_not


class OneRequest:
    """Two statements in one request to PostgreSQL, which is one transaction. The first sets limits to the second.

    A request with parameters may have only one statement. So the driver writes the values into the text.
    """

    def __init__(self, engine: Engine, first: Select[*tuple[Any, ...]], second: Any) -> None:
        tables = engine.get_execution_options().get("schema_translate_map")
        options: dict[str, Any] = {"schema_translate_map": tables, "render_schema_translate": True} if tables else {}
        self._first, self._second = first.compile(engine, **options), second.compile(engine, **options)

    def row(self, connection: Connection, values: Values) -> Any:
        """Send the request. Return the only row of the second statement as a tuple, or None."""
        from psycopg import ClientCursor

        driver: Any = connection.connection.driver_connection
        cursor = ClientCursor(driver)
        texts = (cursor.mogrify(*_text_and_parameters(each, values)) for each in (self._first, self._second))
        sent = connection.exec_driver_sql("; ".join(texts), execution_options={"no_parameters": True})
        sent.cursor.nextset()
        row = sent.cursor.fetchone()
        sent.close()
        return row


def _text_and_parameters(statement: Compiled, values: Values) -> tuple[str, Mapping[str, Any] | None]:
    """Return the statement as text, and the parameters in it, for the driver."""
    if not isinstance(statement, SQLCompiler) or not statement.literal_execute_params:
        return str(statement), statement.construct_params(values)
    expanded = statement.construct_expanded_state(values)  # SQLAlchemy itself writes some values into the text
    processors: Any = statement._bind_processors
    return expanded.statement, {
        name: processors[name](value) if name in processors else value
        for name, value in (expanded.parameters or {}).items()
    }


class ClaimsOnPostgreSQL:
    """Sends each claim as one request. `limits` are set in it, for its transaction alone."""

    def __init__(self, engine: Engine, limits: Sequence[ColumnElement[str]]) -> None:
        self._single = single_statements(engine)
        self._tick = OneRequest(engine, select(WAIT, *limits), LOOK_AND_CLAIM)
        self._pending = OneRequest(engine, select(*limits), CLAIM_PENDING_AND_START)

    def tick(self, values: Values) -> Started | NotClaimed:
        """Claim a tick that may be claimed."""
        row = self._send(self._tick, values)
        return why_not(row) if row is None or row[-1] is None else Started(*row[1:])

    def pending(self, values: Values) -> Started | None:
        """Claim a tick that must run again."""
        row = self._send(self._pending, values)
        return Started(*row) if row else None

    def _send(self, request: OneRequest, values: Values) -> Any:
        with self._single.begin() as connection:
            return request.row(connection, values)

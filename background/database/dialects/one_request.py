"""Two statements in one request to the database. The first limits the second."""

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, Engine, Select

Values = Mapping[str, Any]


def limited(engine: Engine, limits: Select[*tuple[Any, ...]], statement: Any) -> Callable[[Connection, Values], Any]:
    """Return a function that executes `statement` under `limits`, and returns its only row or None.

    SQLite needs no limits: there, a reader waits for no lock.
    """
    if engine.dialect.name == "sqlite":
        return lambda connection, values: connection.execute(statement, values).one_or_none()
    return OneRequest(engine, limits, statement).row


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
        texts = (cursor.mogrify(str(each), _parameters(each, values)) for each in (self._first, self._second))
        sent = connection.exec_driver_sql("; ".join(texts), execution_options={"no_parameters": True})
        sent.cursor.nextset()
        row = sent.cursor.fetchone()
        sent.close()
        return row


def _parameters(statement: Any, values: Values) -> Values:
    """Return the parameters of the statement, as the driver takes them."""
    given, processors = statement.construct_params(values), statement._bind_processors
    return {name: processors[name](value) if name in processors else value for name, value in given.items()}

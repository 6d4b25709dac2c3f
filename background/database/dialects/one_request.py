"""Two statements in one request to the database. The first limits the second."""

from collections.abc import Callable, Mapping, Sequence
from secrets import token_hex
from typing import Any

from sqlalchemy import Connection, Engine, Select, func, select
from sqlalchemy.exc import NotSupportedError, ProgrammingError

from ..clock import clocks_of_tests

Values = Mapping[str, Any]

_IS_DIRECT, _PLANNED = "background_is_direct", "background_planned"


def limited(
    name: str, engine: Engine, limits: Select[*tuple[Any, ...]], statement: Any
) -> Callable[[Connection, Values], Any]:
    """Return a function that executes `statement` under `limits`, and returns its only row or None.

    SQLite needs no limits: there, a reader waits for no lock.
    """
    if engine.dialect.name == "sqlite":
        return lambda connection, values: connection.execute(statement, values).one_or_none()
    return OneRequest(name, engine, limits, statement).row


def parsed_once(name: str, engine: Engine, statement: Any) -> Callable[[Connection, Values], Sequence[Any]]:
    """Return a function that executes `statement`, and returns its rows.

    PostgreSQL parses it once per connection. It plans it each time: the plan for a small table is slow for a large one.
    """
    if engine.dialect.name == "sqlite":
        return lambda connection, values: connection.execute(statement, values).all()
    no_old_plan = select(func.set_config("plan_cache_mode", "force_custom_plan", True))
    return OneRequest(name, engine, no_old_plan, statement).rows


class OneRequest:
    """Two statements in one request to PostgreSQL, which is one transaction. The first sets limits to the second.

    A request with parameters may have only one statement. So the values are written into the text.

    Parsing and planning the second statement takes long. So each connection prepares it once. Behind a pooler, the next
    request may reach another connection of the server. There, the statement is planned each time. `name` is in the text
    of the request, for logs.
    """

    def __init__(self, name: str, engine: Engine, first: Select[*tuple[Any, ...]], second: Any) -> None:
        tables = engine.get_execution_options().get("schema_translate_map")
        options: dict[str, Any] = {"schema_translate_map": tables, "render_schema_translate": True} if tables else {}
        compiled: list[Any] = [each.compile(engine, **options) for each in (first, second)]
        self._names = list(dict.fromkeys(name for each in compiled for name in _names(each)))
        self._processors = {name: each for one in compiled for name, each in one._bind_processors.items()}
        self._first, self._second = map(_with_constants, compiled)
        self._plan = f"background_{name}_{token_hex(8)}"  # no other process has a plan of this name
        places = {name: f"${place}" for place, name in enumerate(self._names, 1)}
        self._prepare = f"PREPARE {self._plan} AS {self._second % places}; "

    def row(self, connection: Connection, values: Values) -> Any:
        """Send the request. Return the only row of the second statement as a tuple, or None."""
        return next(iter(self.rows(connection, values)), None)

    def rows(self, connection: Connection, values: Values) -> Sequence[Any]:
        """Send the request. Return the rows of the second statement as tuples."""
        from psycopg.adapt import Transformer

        driver, info = connection.connection.driver_connection, connection.info
        quoting = Transformer.from_context(driver)
        literals = {
            name: quoting.as_literal(self._value(name, values)).decode(quoting.encoding) for name in self._names
        }
        limits = f"{self._first % literals}; "
        if not clocks_of_tests and _is_direct(driver, info) and _is_idle(driver):
            planned = info.pop(_PLANNED, None)  # after an error, the connection prepares its statements again
            before = "DEALLOCATE ALL; " if planned is None else ""
            if planned is None or self._plan not in planned:
                before += self._prepare
            try:
                rows = _last_rows(connection, f"{limits}{before}EXECUTE {self._plan}({', '.join(literals.values())})")
            except (NotSupportedError, ProgrammingError):  # a migration changed a column, or the plan is gone
                pass
            else:
                info[_PLANNED] = {self._plan, *(planned or ())}
                return rows
        return _last_rows(connection, limits + self._second % literals)

    def _value(self, name: str, values: Values) -> Any:
        processor = self._processors.get(name)
        return processor(values[name]) if processor else values[name]


def _is_direct(driver: Any, info: dict[str, Any]) -> bool:
    """Return whether psycopg's connection reaches the server without a pooler, which has process ids of its own."""
    if _IS_DIRECT not in info:
        (process,) = driver.execute("SELECT pg_backend_pid()").fetchone()
        info[_IS_DIRECT] = process == driver.info.backend_pid
    return bool(info[_IS_DIRECT])


def _is_idle(driver: Any) -> bool:
    """Return whether no transaction is open. After an error, an open transaction takes no second request."""
    return bool(driver.info.transaction_status == 0)


def _last_rows(connection: Connection, statements: str) -> Sequence[Any]:
    """Send the statements. Return the rows of the last one as tuples."""
    with connection.connection.cursor() as cursor:  # type: ignore[attr-defined]
        # Not `exec_driver_sql`: it spends more time on the columns of the first result than the driver on the request.
        connection._cursor_execute(cursor, statements, None)  # type: ignore[arg-type]
        while cursor.nextset():
            pass
        rows: Sequence[Any] = cursor.fetchall()
        return rows


def _names(compiled: Any) -> list[str]:
    """Return the names of the parameters. The other binds of the statement are constants."""
    return [name for name, bind in compiled.binds.items() if bind.required]


def _with_constants(compiled: Any) -> str:
    """Return the text of the statement with its constants, and with a place for each parameter."""
    from psycopg.sql import quote

    texts = {name: f"%({name})s" for name in _names(compiled)}
    for name, value in compiled.construct_params(dict.fromkeys(texts)).items():
        if name not in texts:
            processor = compiled._bind_processors.get(name)
            texts[name] = quote(processor(value) if processor else value).replace("%", "%%")
    text: str = str(compiled).replace("%%", "%%%%") % texts
    return text

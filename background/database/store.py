"""The engine's transactions on one database, and the SQL that differs between the two databases."""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    CursorResult,
    Engine,
    Executable,
    Subquery,
    Table,
    Text,
    Update,
    any_,
    bindparam,
    cast,
    func,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.types import NullType

from .clock import now, single_statements
from .sessions import Sessions

_LOCK_SECONDS = 1.0  # after waiting this long for a row lock, free the thread and try again later


class Statements:
    """Statements on one engine, each in a transaction of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.single = engine, single_statements(engine)
        """`single` is the same engine, with a transaction for each statement."""
        self.on_sqlite = engine.dialect.name == "sqlite"
        self.insert: Callable[[Table], Any] = sqlite.insert if self.on_sqlite else postgresql.insert
        """The engine's `insert`, which knows ON CONFLICT."""
        self.keeps_old_entries = not self.on_sqlite
        """True if an index keeps the entries of changed rows while an old transaction is open."""
        self.began: ColumnElement[datetime] = now() if self.on_sqlite else func.statement_timestamp()
        """The moment at which a statement began."""

    def read(self, query: Executable, values: dict[str, Any] | None = None) -> Sequence[Any]:
        """Return the rows (of SQLAlchemy) that `query` finds."""
        with self.single.connect() as connection:
            return connection.execute(query, values).all()

    def change(self, statement: Executable, values: dict[str, Any] | None = None) -> int:
        """Execute an INSERT, an UPDATE or a DELETE. Return how many rows it changed."""
        with self.single.begin() as connection:
            return count(connection.execute(statement, values))


class Store(Statements):
    """Transactions on the engine's own connections.

    `ring` is called when a row becomes available to any instance. `sessions` adds the engine's statements to the
    application's sessions.
    """

    def __init__(self, engine: Engine, lease: float, ring: Callable[[], None], sessions: Sessions) -> None:
        super().__init__(engine)
        self.ring, self.sessions = ring, sessions
        self.has_one_writer = self.on_sqlite
        """True if a write locks the whole database, so that a read should come first."""
        self.idle: tuple[ColumnElement[str], ...] = ()
        """Columns for a SELECT or a RETURNING that holds a worker's row: they limit how long the row is held."""
        self.limits: tuple[ColumnElement[str], ...] = ()
        """Columns for the first SELECT of a transaction. They also limit how long the transaction waits."""
        if not self.on_sqlite:
            # PostgreSQL ends a transaction that holds a worker's row for longer than a lease, even if its process is
            # frozen. The limit is set for one transaction, because a pooler may stand in between.
            self.idle = (limit("idle_in_transaction_session_timeout", lease),)
            waiting = limit("lock_timeout", min(lease, _LOCK_SECONDS))
            self.limits = (*self.idle, waiting, limit("statement_timeout", lease))

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Begin a transaction that does not wait long for a row, and holds a row for at most a lease."""
        with self.engine.begin() as connection:
            if self.limits:
                connection.execute(select(*self.limits))
            yield connection

    # -- lists of any length, in one parameter -------------------------------------------------

    def packed(self, ids: Collection[int]) -> str:
        """Return `ids` as text: a list of JSON on SQLite, an array on PostgreSQL. The driver converts lists slowly."""
        listed = ",".join(map(str, ids))
        return f"[{listed}]" if self.on_sqlite else f"{{{listed}}}"

    def is_among(self, column: ColumnElement[int], ids: Collection[int] | str) -> ColumnElement[bool]:
        """Return the condition that `column` is one of `ids`. A text names the parameter that has them, `packed`."""
        name, value = (ids, None) if isinstance(ids, str) else (None, self.packed(ids))
        if self.on_sqlite:
            listed = func.json_each(bindparam(name, value, type_=Text)).table_valued("value")
            return column.in_(select(listed.c.value))
        # The parameter has no type of its own. So PostgreSQL reads it as an array before it plans the statement.
        return column == any_(cast(bindparam(name, value, type_=NullType()), ARRAY(BigInteger)))

    def table_of(self, rows: Sequence[tuple[str | None, ...]], *names: str) -> Subquery:
        """Return `rows` of texts as a table: their columns with these `names`, and `place`, the order of the rows."""
        if self.on_sqlite:
            each = func.json_each(json.dumps(rows)).table_valued("key", "value")
            texts = (
                func.json_extract(each.c.value, f"$[{at}]", type_=Text).label(name) for at, name in enumerate(names)
            )
            return select(each.c.key.label("place"), *texts).subquery()
        arrays = (bindparam(None, list(texts), type_=ARRAY(Text)) for texts in zip(*rows, strict=True))
        return select(func.unnest(*arrays).table_valued(*names, with_ordinality="place").render_derived()).subquery()

    # -- rows that a session holds -------------------------------------------------------------

    def holding(self, change: Update) -> Executable:
        """Return `change` as a statement that also limits how long its rows are held. See `number_held`."""
        if self.on_sqlite:
            return change
        rows = change.returning(change.table.c.id).cte()
        return select(func.count(rows.c.id), *self.idle)

    def number_held(self, result: Any) -> int:
        """Return how many rows the statement of `holding` changed, by its result."""
        number: int = count(result) if self.on_sqlite else result.scalar_one()
        return number


def limit(setting: str, seconds: float) -> ColumnElement[str]:
    """Return a column that gives PostgreSQL a time limit, until the end of the transaction."""
    return func.set_config(setting, f"{seconds * 1000:.0f}", True)


def count(result: Any) -> int:
    """Return how many rows an INSERT, an UPDATE or a DELETE changed."""
    assert isinstance(result, CursorResult)  # noqa: S101 - for the type checker, as each of these statements has such a result
    return result.rowcount

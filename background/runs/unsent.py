"""Sends the new rows of a batch together. A flush for each message takes many times as long."""

from collections.abc import Iterable
from dataclasses import is_dataclass
from functools import lru_cache
from itertools import groupby
from sys import getrefcount
from typing import Any

from sqlalchemy import Connection, Table, event, insert, literal_column
from sqlalchemy.orm import Mapper, Session, class_mapper
from sqlalchemy.sql.expression import ClauseElement, FunctionElement

_AT_FLUSH = ("before_flush", "after_flush", "after_flush_postexec", "pending_to_persistent", "pending_to_transient")
_AT_ADDING = ("before_attach", "after_attach", "transient_to_pending")
_AT_INSERT = ("before_insert", "after_insert")
_HARMLESS_MODULES = {"builtins", "random", "secrets", "time", "uuid"}
_OUR_TYPES = {"sqlalchemy", __name__.partition(".")[0]}
_MOST_ROWS = 1_000  # more would fill the memory while they wait


class Unsent:
    """The rows of handled messages that wait, outside of `session`, for the session's next statement.

    The database receives the same rows in the same order as with a flush after each message. So the rows of a message
    wait only if it does nothing but add rows of one class, without relationships. They do not wait in two other cases:

    - A function of the application runs at the flush. It may ask for the current message.
    - The application keeps one of the rows. It may read the row's id or change the row later.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._rows: list[Any] = []
        self._class: type[Any] | None = None
        self._connection: Connection | None = None
        self._may_wait = not any(getattr(session.dispatch, name) for name in (*_AT_FLUSH, *_AT_ADDING))
        self._open = session.connection
        session.connection = self._open_for_caller  # type: ignore[method-assign]

    def end_message(self) -> None:
        """Keep the new rows of the message that was just handled, or flush its changes."""
        session, new = self.session, list(self.session.new)
        is_changed = session.identity_map.check_modified()  # faster than `session.dirty`
        if not new or not self._may_wait or is_changed or session.deleted or not self._can_wait(new):
            session.flush()
            return
        if not self._rows:
            self._wait_on(self._open(bind_arguments={"mapper": self._mapper}))
        for each in new:
            session.expunge(each)
        del each  # `_are_kept` counts the references
        if _are_kept(new):
            session.add_all(new)
            session.flush()
        else:
            self._rows += new

    def _can_wait(self, new: list[Any]) -> bool:
        """Return whether the rows `new` may wait. Send the rows that wait if they are of another class."""
        classes = set(map(type, new))
        if len(classes) != 1 or len(self._rows) + len(new) > _MOST_ROWS:
            return False
        if self._class not in classes:
            self.send()
            (self._class,) = classes
            self._mapper: Mapper[Any] = class_mapper(self._class)
            self._is_plain = _is_plain(self._mapper)
            self._relationships = frozenset(self._mapper.relationships.keys())
        if not self._is_plain:
            return False
        for values in map(vars, new):
            if not self._relationships.isdisjoint(values) or not all(map(_is_fixed, map(type, values.values()))):
                return False
        return True

    def _wait_on(self, connection: Connection) -> None:
        """Send the rows before the next statement on `connection`."""
        if connection is not self._connection:
            self._connection = connection
            event.listen(connection, "before_cursor_execute", lambda *_: self.send())

    def send(self) -> None:
        """Send the rows in the session's transaction. The changes of the current message stay in the session."""
        rows, self._rows = self._rows, []
        if not rows or self._connection is None or self._connection.closed:  # after a rollback
            return
        with Session(self._connection, join_transaction_mode="rollback_only") as session:
            try:
                if _needs_flush(self._mapper):
                    session.add_all(rows)
                    session.flush()
                else:
                    _insert(self._mapper, rows, session.connection())
            except BaseException:
                session.rollback()  # and the session's transaction, which then cannot be committed
                raise

    def _open_for_caller(self, *given: Any, **named: Any) -> Connection:
        """Let no row wait from now on: the caller may use the driver's cursor, which no listener sees."""
        self.send()
        self._may_wait = False
        return self._open(*given, **named)


def _are_kept(rows: list[Any]) -> bool:
    """Return whether another object than the list refers to one of the rows, such as a service of the application."""
    return max(map(getrefcount, rows)) > max(map(getrefcount, [object()]))


@lru_cache
def _is_fixed(kind: type[Any]) -> bool:
    """Return whether values of this type stay as they are. A later message may change a list, a dict or the like.

    An SQL expression is not fixed: it may read the rows that earlier messages added.
    """
    return kind.__hash__ is not None and not hasattr(kind, "__clause_element__") and not issubclass(kind, ClauseElement)


def _is_plain(mapper: Mapper[Any]) -> bool:
    """Return whether an INSERT of this class runs no function of the application, and reads no row."""
    columns: list[Any] = [column for table in mapper.tables for column in table.columns]
    return not (
        any(getattr(mapper.dispatch, name) for name in _AT_INSERT)
        or any(type(each.type).__module__.partition(".")[0] not in _OUR_TYPES for each in columns)
        or any(_asks(each.default) for each in columns if each.default)
    )


def _asks(default: Any) -> bool:
    """Return whether a default may ask for the current message, or for the rows that earlier messages added."""
    if default.is_clause_element:
        return not isinstance(default.arg, FunctionElement) or len(default.arg.clauses) > 0
    return bool(default.is_callable and default.arg.__module__ not in _HARMLESS_MODULES)


def _needs_flush(mapper: Mapper[Any]) -> bool:
    """Return whether a flush of this class does more than write the attributes of each row into one table."""
    return (
        not isinstance(mapper.persist_selectable, Table)
        or mapper.version_id_col is not None
        or is_dataclass(mapper.class_)  # its attributes have defaults of their own
        or any(column.type.should_evaluate_none for column in mapper.columns)
    )


def _insert(mapper: Mapper[Any], rows: Iterable[Any], connection: Connection) -> None:
    """Send the INSERT that a flush would send. A flush takes longer, because it also reads the new ids."""
    table: Any = mapper.persist_selectable
    statement, dialect = insert(table), connection.dialect
    # Without RETURNING, psycopg sends one statement for each row.
    if dialect.name == "postgresql" and dialect.insert_executemany_returning:
        statement = statement.returning(literal_column("1"))
    mapped = [each for each in mapper.columns if getattr(each, "table", None) is table]
    columns = [(mapper.get_property_by_column(each).key, each) for each in mapped]
    nulls = {each for each in table.columns if not (each.primary_key or each.default or each.server_default)}

    def values_of(row: Any) -> dict[str, Any]:
        given = vars(row)
        return {
            column.key: value for name, column in columns if (value := given.get(name)) is not None or column in nulls
        }

    for _, values in groupby(map(values_of, rows), dict.keys):
        connection.execute(statement, list(values))

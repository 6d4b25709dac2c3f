"""Sends the new rows of a batch by one flush. A flush for each message takes many times as long."""

from collections.abc import Collection
from sys import getrefcount
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.orm import Mapper, Session, object_mapper
from sqlalchemy.sql.expression import FunctionElement

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
        self._mapper: Mapper[Any] | None = None
        self._may_wait = not any(getattr(session.dispatch, name) for name in (*_AT_FLUSH, *_AT_ADDING))
        self._open = session.connection
        session.connection = self._open_for_caller  # type: ignore[method-assign]

    def end_message(self) -> None:
        """Keep the new rows of the message that was just handled, or flush its changes."""
        session, new = self.session, list(self.session.new)
        if not new or not self._may_wait or session.dirty or session.deleted or not self._can_wait(new):
            session.flush()
            return
        if not self._rows:
            self._connection = self._open(bind_arguments={"mapper": self._mapper})
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
        mappers = {object_mapper(each) for each in new}
        if len(mappers) != 1 or len(self._rows) + len(new) > _MOST_ROWS:
            return False
        if self._mapper not in mappers:
            self.send()
            (self._mapper,) = mappers
            self._is_plain = _is_plain(self._mapper)
            self._relationships = frozenset(self._mapper.relationships.keys())
        return self._is_plain and all(
            self._relationships.isdisjoint(vars(each)) and not _can_change(vars(each).values()) for each in new
        )

    def send_before_statements(self, connection: Connection) -> None:
        """Send the rows before the next statement that the session sends on `connection`."""
        event.listen(connection, "before_cursor_execute", lambda *_: self.send())

    def send(self) -> None:
        """Send the rows in the session's transaction. The changes of the current message stay in the session."""
        rows, self._rows = self._rows, []
        if not rows or self._connection.closed:  # after a rollback
            return
        # If the database refuses them, the transaction is rolled back and cannot be committed.
        with Session(self._connection, join_transaction_mode="rollback_only") as session:
            session.add_all(rows)
            session.flush()

    def _open_for_caller(self, *given: Any, **named: Any) -> Connection:
        """Let no row wait from now on: the caller may use the driver's cursor, which no listener sees."""
        self.send()
        self._may_wait = False
        return self._open(*given, **named)


def _are_kept(rows: list[Any]) -> bool:
    """Return whether another object than the list refers to one of the rows, such as a service of the application."""
    return max(map(getrefcount, rows)) > max(map(getrefcount, [object()]))


def _can_change(values: Collection[Any]) -> bool:
    """Return whether one of the values is a list, a dict or the like, which a later message may change."""
    return any(type(each).__hash__ is None for each in values)


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

"""A run that is rolled back, and the rows that it would have changed."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from math import inf
from types import MappingProxyType
from typing import Any
from uuid import uuid4

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Connection, Delete, Insert, TextClause, Update, event, func, select
from sqlalchemy.orm import Session

from ..context import WorkerContext
from ..database.dialects.writes import is_write
from ..database.sessions import Sessions, commits_each_statement
from ..database.store import Store
from ..database.tables import messages
from ..errors import DryRunCommits, shortened
from ..host.forks import ended_in_a_fork
from ..ledger.claim import Claim
from ..ledger.leases import Instance
from ..worker import PeriodicWorker
from .execution import await_result
from .fence import current_run

MOST_EXAMPLES = 10
_LONGEST_VALUE = 40


@dataclass
class Change:
    """The rows of one table that a run inserted, updated or deleted."""

    table: str
    kind: str
    number: int = 0
    examples: list[str] = field(default_factory=list)


class UnclaimedContext(WorkerContext):
    """The context of a run whose claim is in no row. The history does not show the run."""

    def __init__(self, claim: Claim, db: SQLAlchemy, sessions: Sessions, cursor: Any = None) -> None:
        super().__init__(claim, claim, Instance(timedelta(days=1), deadline=inf), db, sessions)
        self.cursor = cursor
        self._cursor_is_new = False


class DryContext(UnclaimedContext):
    """The context of a dry run, which may not commit."""

    refusal: DryRunCommits | None = None
    """The refusal of a commit, which the worker may have caught."""

    def check(self, session: Session) -> None:
        """Refuse the commit of the run. Raises DryRunCommits."""
        self.refusal = DryRunCommits(
            f"The worker {self.worker!r} commits during its run, so a dry run cannot roll it back; expected a worker "
            "that commits only at its end. Run it with `flask workers trigger`, on a copy of the database."
        )
        raise self.refusal


def dry_run(app: Flask, db: SQLAlchemy, store: Store, worker: type[PeriodicWorker], at: datetime) -> list[Change]:
    """Run `worker` in this process and roll its session back. Return the changes in the order of their first rows.

    Raises the worker's own error, and DryRunCommits for a worker that commits. Effects outside the database stay.
    """
    claim = Claim(worker.name, at, 1, token=0, trigger="manual", execution=None, id=uuid4().hex)
    with app.app_context():
        context = DryContext(claim, db, store.sessions)
        [(newest,)] = store.read(select(func.max(messages.c.id)))
        token = current_run.set(context)
        try:
            with Recorder(context).listening(db) as changes, ended_in_a_fork(f"The dry run of {worker.__name__}"):
                await_result(worker().do_work(context))
                context.session.flush()
                if context.refusal:
                    raise context.refusal
            cursor = [Change("context.cursor", "assigned", 1, [text]) for text in context.new_cursor.values() if text]
            return [*changes.values(), *_enqueued(store, context.session, newest or 0), *cursor]
        finally:
            context.session.invalidate()  # SQLAlchemy counts a refused commit of the connection as done
            current_run.reset(token)


Changes = dict[tuple[str, str], Change]
_KINDS = {"insert": "inserted", "update": "updated", "delete": "deleted"}
_CHANGING = re.compile(r"\s*(insert\s+into|update|delete\s+from)\s+([^\s(]+)", re.IGNORECASE)


class Recorder:
    """Records the changes that the connections of an application make, and refuses to commit them."""

    def __init__(self, context: DryContext) -> None:
        self._context = context
        self._changes: Changes = {}
        self._before: dict[Connection, tuple[int, list[str]]] = {}
        self._rowcounts: dict[Connection, int] = {}
        self._changed: set[Connection] = set()

    @contextmanager
    def listening(self, db: SQLAlchemy) -> Iterator[Changes]:
        """Listen to each engine of `db` during the block. Give the changes so far."""
        listeners: dict[str, Callable[..., Any]] = {
            "before_execute": self._executing,
            "after_execute": self._executed,
            "before_cursor_execute": self._sending,
            "after_cursor_execute": self._sent,
            "commit": self._committing,
        }
        with ExitStack() as block:
            for engine in db.engines.values():
                for name, listener in listeners.items():
                    event.listen(engine, name, listener)
                    block.callback(event.remove, engine, name, listener)
            yield self._changes

    def _note(self, table: str, kind: str, number: int, examples: list[str]) -> None:
        if table != messages.name and number:
            change = self._changes.setdefault((table, kind), Change(table, kind))
            change.number += number
            change.examples += examples[: MOST_EXAMPLES - len(change.examples)]

    def _executing(self, connection: Connection, statement: Any, many: Any, one: Any, options: Any) -> None:
        if isinstance(statement, Update | Delete):
            self._before[connection] = _rows(connection, statement, many or [one])

    def _executed(self, connection: Connection, statement: Any, many: Any, one: Any, options: Any, result: Any) -> None:
        if isinstance(statement, Update | Delete):
            kind = "updated" if isinstance(statement, Update) else "deleted"
            self._note(str(statement.table), kind, *self._before.pop(connection))
        elif isinstance(statement, Insert):
            given = many or [one]
            number = len(given) if len(given) > 1 else max(self._rowcounts[connection], int(result.returns_rows))
            table: Any = statement.table
            shown = [_shown({own.name: each[own.key] for own in table.c if own.key in each}) for each in given if each]
            self._note(str(table), "inserted", number, shown)

    def _sending(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        if is_write(statement):
            self._changed.add(connection)
            if _commits_at_once(connection, statement):
                self._committing(connection)

    def _sent(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, sent: Any, many: bool
    ) -> None:
        self._rowcounts[connection] = cursor.rowcount
        is_text = sent.compiled is None or isinstance(sent.compiled.statement, TextClause)
        if is_text and (found := _CHANGING.match(statement)):
            kind = _KINDS[found[1].split()[0].lower()]
            self._note(found[2], kind, max(cursor.rowcount, 0), [])

    def _committing(self, connection: Connection) -> None:
        if connection in self._changed:
            connection.dialect.do_rollback(connection.connection)
            self._context.check(self._context.session)


def _commits_at_once(connection: Connection, statement: str) -> bool:
    """Return whether the write is outside a transaction. SQLite's driver begins none for DDL."""
    driver: Any = connection.connection.driver_connection
    is_begun = connection.dialect.name != "sqlite" or driver.in_transaction
    return commits_each_statement(connection) or not (is_begun or _CHANGING.match(statement))


def _enqueued(store: Store, session: Session, newest: int) -> list[Change]:
    """Return the messages above the id `newest` that only this session sees, because they are not committed."""
    since = select(messages.c.id, messages.c.topic, messages.c.payload).where(messages.c.id > newest)
    committed = {row.id for row in store.read(since)}
    own = [row for row in store.sessions.within(session).execute(since).all() if row.id not in committed]
    examples = [_shown({"topic": row.topic, "payload": row.payload}) for row in own[:MOST_EXAMPLES]]
    return [Change(str(messages), "inserted", len(own), examples)] if own else []


def _rows(
    connection: Connection, statement: Update | Delete, parameters: list[dict[str, Any]]
) -> tuple[int, list[str]]:
    """Return the number of rows that the statement would change, and its first rows, with their present values."""
    table: Any = statement.table
    number, examples = 0, list[str]()
    for each in parameters:
        criteria = statement._where_criteria
        own = {column.key: column.name for column in table.c}
        new = {own[key]: value for key, value in each.items() if key in own and isinstance(statement, Update)}
        found = select(table).where(*criteria)
        number += connection.scalar(select(func.count()).select_from(found.subquery()), each) or 0
        if left := MOST_EXAMPLES - len(examples):
            examples += [_shown(row._mapping, new) for row in connection.execute(found.limit(left), each)]
    return number, examples


def _shown(columns: Any, new: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the values of a row, and beside them the `new` values."""
    return ", ".join(
        f"{name}={_value(value)}{f' -> {_value(new[name])}' if name in new else ''}"
        for name, value in columns.items()
        if value is not None or name in new
    )


def _value(value: object) -> str:
    return value.isoformat() if isinstance(value, date) else shortened(repr(value), _LONGEST_VALUE)

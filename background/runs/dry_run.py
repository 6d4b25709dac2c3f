"""A run that is rolled back, and the rows that it would have changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from math import inf
from typing import Any
from uuid import uuid4

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Delete, Insert, Table, Update, event, func, inspect, select
from sqlalchemy.orm import ORMExecuteState, Session, UOWTransaction

from ..context import WorkerContext
from ..database.store import Store
from ..database.tables import messages
from ..errors import DryRunCommits, shortened
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


class DryContext(WorkerContext):
    """The context of a run without a claim, which may not commit."""

    def check(self, session: Session) -> None:
        """Refuse the commit of the run. Raises DryRunCommits."""
        raise DryRunCommits(
            f"The worker {self.worker!r} commits during its run, so a dry run cannot roll it back; expected a worker "
            "that commits only at its end. Run it with `flask workers trigger`, on a copy of the database."
        )


def dry_run(app: Flask, db: SQLAlchemy, store: Store, worker: type[PeriodicWorker], at: datetime) -> list[Change]:
    """Run `worker` in this process and roll its session back. Return the changes in the order of their first rows.

    Raises the worker's own error, and DryRunCommits for a worker that commits. Effects outside the session stay.
    """
    claim = Claim(worker.name, at, 1, token=0, trigger="manual", execution=None, id=uuid4().hex)
    with app.app_context():
        context = DryContext(claim, claim, Instance(timedelta(days=1), deadline=inf), db, store.sessions)
        [(newest,)] = store.read(select(func.max(messages.c.id)))
        token = current_run.set(context)
        try:
            with _noted(db) as changes:
                await_result(worker().do_work(context))
                context.session.flush()
            return [*changes.values(), *_enqueued(store, context.session, newest or 0)]
        finally:
            context.session.rollback()
            current_run.reset(token)


Changes = dict[tuple[str, str], Change]


@contextmanager
def _noted(db: SQLAlchemy) -> Iterator[Changes]:
    """Note the changes of every session of `db` during the block."""
    changes: Changes = {}

    def note(table: Any, kind: str, number: int, examples: list[str]) -> None:
        change = changes.setdefault((str(table), kind), Change(str(table), kind))
        change.number += number
        change.examples += examples[: MOST_EXAMPLES - len(change.examples)]

    def flushed(session: Session, context: UOWTransaction, instances: Any) -> None:
        for each in session.new:
            note(_table_of(each), "inserted", 1, [_shown(_columns(each))])
        for each in session.dirty:
            if session.is_modified(each):
                note(_table_of(each), "updated", 1, [_difference(each)])
        for each in session.deleted:
            note(_table_of(each), "deleted", 1, [_shown(_columns(each))])

    def executed(state: ORMExecuteState) -> Any:
        statement = state.statement
        if isinstance(statement, Update | Delete):
            kind = "updated" if isinstance(statement, Update) else "deleted"
            before = _rows(state.session, statement)
            result: Any = state.invoke_statement()
            note(statement.table, kind, max(result.rowcount, 0), before)
            return result
        if isinstance(statement, Insert):
            result = state.invoke_statement()
            given = state.parameters if isinstance(state.parameters, list) else [state.parameters or {}]
            number = result.rowcount if result.rowcount > 0 else len(given)
            note(statement.table, "inserted", number, [_shown(each) for each in given if each])
            return result
        return None

    event.listen(db.session, "before_flush", flushed)
    event.listen(db.session, "do_orm_execute", executed)
    try:
        yield changes
    finally:
        event.remove(db.session, "before_flush", flushed)
        event.remove(db.session, "do_orm_execute", executed)


def _enqueued(store: Store, session: Session, newest: int) -> list[Change]:
    """Return the messages above the id `newest` that only this session sees, because they are not committed."""
    since = select(messages.c.id, messages.c.topic, messages.c.payload).where(messages.c.id > newest)
    committed = {row.id for row in store.read(since)}
    own = [row for row in store.sessions.within(session).execute(since).all() if row.id not in committed]
    examples = [_shown({"topic": row.topic, "payload": row.payload}) for row in own[:MOST_EXAMPLES]]
    return [Change(str(messages), "inserted", len(own), examples)] if own else []


def _rows(session: Session, statement: Update | Delete) -> list[str]:
    """Return the first rows that the statement would change, with their present values."""
    table: Any = statement.table
    if not isinstance(table, Table):
        return []
    found = session.connection().execute(select(table).where(*statement._where_criteria).limit(MOST_EXAMPLES))
    return [_shown(row._mapping) for row in found]


def _table_of(row: object) -> Any:
    return inspect(row).mapper.local_table


def _columns(row: object) -> dict[str, Any]:
    return {each.key: getattr(row, each.key) for each in inspect(row).mapper.column_attrs}


def _difference(row: object) -> str:
    """Return the key of a row, and its changed columns with their values before and after."""
    state: Any = inspect(row)
    changed = {each.key: each.history for each in state.attrs if each.history.has_changes()}
    parts = [
        f"{name}: {_value(past.deleted[0]) if past.deleted else '?'} -> {_value(past.added[0])}"
        for name, past in changed.items()
        if past.added
    ]
    return f"{state.identity}: {', '.join(parts)}"


def _shown(columns: Any) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in columns.items() if value is not None)


def _value(value: object) -> str:
    return value.isoformat() if isinstance(value, date) else shortened(repr(value), _LONGEST_VALUE)

"""The fence: listeners of the session that refuse a commit of a run once its claim is gone."""

import logging
import time
from collections.abc import Callable, Collection
from contextvars import ContextVar
from typing import Any

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from ..context import WorkerContext
from ..host.listeners import is_new

_WHEN_COMMITTED = "background_when_committed"


current_run: ContextVar[WorkerContext | None] = ContextVar("background_run", default=None)


def is_stopping_within(seconds: float) -> bool:
    """Wait so many seconds. In a run, a stop request ends the wait. Return whether the run must stop."""
    run = current_run.get()
    if run is None:
        time.sleep(seconds)
        return False
    return run.stopping.wait(seconds)


class RunFields(logging.Filter):
    """Adds the run's fields to every log record of a run, from any logger, for logs that machines read."""

    def filter(self, record: logging.LogRecord) -> bool:
        run = current_run.get()
        if run is not None:
            for name, value in run.log_fields.items():
                if not hasattr(record, name):
                    setattr(record, name, value)
        return True


def fence(db: SQLAlchemy) -> None:
    """Check the claim before every commit of a run on any session of `db`. This also enables `when_committed`."""
    for name, listener in (
        ("after_transaction_create", _after_transaction_create),
        ("after_transaction_end", _after_transaction_end),
        ("after_begin", _after_begin),
        ("before_commit", _before_commit),
        ("after_commit", _after_commit),
        ("after_rollback", _after_rollback),
    ):
        if is_new(db.session, listener):
            event.listen(db.session, name, listener)


def when_committed(session: Session, call: Callable[[Collection[Any]], None], argument: object) -> None:
    """Call `call` once after `session` commits its transaction, with all its arguments. A rollback drops the call."""
    session.info.setdefault(_WHEN_COMMITTED, {}).setdefault(call, set()).add(argument)


def _after_commit(session: Session) -> None:
    if session.in_nested_transaction():  # releasing a savepoint commits nothing
        return
    for call, arguments in session.info.pop(_WHEN_COMMITTED, {}).items():
        call(arguments)


def _after_rollback(session: Session) -> None:
    if (run := current_run.get()) is None:
        return
    if (savepoint := session.get_nested_transaction()) is None:
        run.rolled_back(session)
    else:  # the work before the savepoint may still be committed
        run.returned_to(savepoint)


def _before_commit(session: Session) -> None:
    run = current_run.get()
    if run is None or session.in_nested_transaction():  # releasing a savepoint commits nothing
        return
    if run.is_at_home(session):  # the session of another application needs no claim of this application
        run.check(session)


def _after_transaction_create(session: Session, transaction: SessionTransaction) -> None:
    if transaction.nested and (run := current_run.get()) is not None:
        run.saved(session, transaction)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:  # after a rollback, or `session.close()`
        session.info.pop(_WHEN_COMMITTED, None)


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    run = current_run.get()
    if run is not None and not transaction.nested and run.is_at_home(session):
        run.began(session, connection)

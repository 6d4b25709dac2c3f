"""What a run is given; and the fence: no commit of a run passes once its claim is gone."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from datetime import datetime, timedelta
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction
from svcs import Container
from svcs.flask import svcs_from

from .errors import BatchRolledBack, ClaimLost, InvalidProgress, RunStopped
from .instances import LEASE_IS_OVER, Instance
from .log_lines import LogLines
from .logs import logger_of
from .sessions import Sessions, Within, home

if TYPE_CHECKING:
    from .ledger import Claim, Ledger
    from .messages import Batch, Message, Messages

_PROGRESS_SECONDS = 5.0
_LOG_SECONDS = 1.0
_WHEN_COMMITTED = "background_when_committed"


class Stopping(threading.Event):
    """True once the run should end: `if context.stopping`, or `context.stopping.wait(seconds)` instead of a sleep."""

    def __bool__(self) -> bool:
        return self.is_set()


class WorkerContext:
    """One run: its tick, its session and services, and how it hears that it should end."""

    def __init__(
        self, claim: "Claim | Batch", what: "Claim | Message", instance: Instance, db: SQLAlchemy, sessions: Sessions
    ) -> None:
        self.worker: str = claim.worker
        self.tick: datetime = what.tick
        """The scheduled moment (aware, UTC); for a manual run the moment it was asked for."""
        self.attempt: int = what.attempt
        self.token: int = what.token
        self.idempotency_key: str = what.idempotency_key
        """The same for every attempt at this tick: hand it to whatever you call outside the database."""
        self.stopping = Stopping()
        self.claim = claim
        self.instance = instance
        self.log_fields = {
            "worker": claim.worker,
            "tick": what.tick.isoformat(),
            "execution": claim.execution,
            "instance": instance.name,
        }
        self.logger = logging.LoggerAdapter(logger_of(f"background.{claim.worker}"), self.log_fields)
        self.timed_out_after: timedelta | None = None
        self.database = db.engine.url
        self._db, self._sessions = db, sessions
        self._process = os.getpid()
        self._lost: str | None = None
        self._finishing = False
        self._progress: dict[str, float | None] = {}
        self._progress_logged = time.monotonic()

    @property
    def session(self) -> Session:
        """`db.session` of this run's app context; its commits are fenced."""
        return self._db.session()

    @property
    def services(self) -> Container:
        """The services of this run's app context: `context.services.get(UserRepository)`."""
        return svcs_from()

    def commit(self) -> None:
        """Commit what is done so far; raises ClaimLost if the claim is gone."""
        self.session.commit()

    def progress(self, done: float, total: float | None = None) -> None:
        """Report `done` (of `total`): written with the next commit, logged every five seconds at most.

        Raises InvalidProgress for a value that is not a finite number.
        """
        done, total = _as_number("done", done), None if total is None else _as_number("total", total)
        self._progress = {"progress_done": done, "progress_total": total}
        if time.monotonic() - self._progress_logged >= _PROGRESS_SECONDS:
            self._progress_logged = time.monotonic()
            share = f" of {total:,} ({done / total:.0%})" if total else ""
            self.logger.info("Progress: %s%s", f"{done:,}", share)

    def raise_if_stopping(self) -> None:
        """End the run here if it should end: it rolls back to the last commit and is handed back."""
        if self.stopping:
            raise RunStopped(
                f"Worker {self.worker!r} was told to stop; {self._what()} is handed back. Let the exception pass."
            )

    # -- the engine's side -----------------------------------------------------------------------

    @property
    def lost_because(self) -> str | None:
        """The reason why the run may not commit. None while it may."""
        return self._lost

    @property
    def is_lost(self) -> bool:
        """True once this run knows that its claim is gone."""
        return self._lost is not None

    def lose(self, why: str) -> None:
        """From now on no commit passes, and the run is told to end."""
        self._lost = self._lost or why
        self.stopping.set()

    def within(self, session: Session) -> Within:
        """Return the engine's own statements in `session`. They go where its tables are, whatever `get_bind` says."""
        return self._sessions.within(session, self._engine_of(session))

    def is_at_home(self, session: Session) -> bool:
        """Return whether `session` is on this run's database.

        A session of another application, in that application's context, may be on another one.
        """
        return bool(self._engine_of(session).url == self.database)

    def began(self, session: Session, connection: Connection) -> None:
        """Judge the transaction that `session` began on `connection`, before anything is sent in it."""
        if connection.engine is home(session, self._engine_of(session)):
            self._sessions.begin(connection)
        else:
            self._sessions.watch(connection, self.worker)

    def _engine_of(self, session: Session) -> Engine:
        """Return the default engine of the session's own extension, in the current application context."""
        db: SQLAlchemy = getattr(session, "_db", self._db)
        return db.engine

    def finish(self) -> None:
        """Commit the effects, and that it is done, together."""
        raise NotImplementedError

    def check(self, session: Session) -> None:
        """Before every commit of the run: is its claim still the one in force?"""
        raise NotImplementedError

    def refuse_if_lost(self) -> None:
        """Raise ClaimLost if this run knows that its claim is gone, and in a forked child of its process."""
        if os.getpid() != self._process:
            raise ClaimLost(
                f"Worker {self.worker!r} runs {self._what()} in the process {self._process}, and its forked child "
                f"{os.getpid()} tried to commit; expected commits of the run's own process only. Hand the result to "
                "that process, and commit there."
            )
        if not self.instance.is_alive:
            self.lose(LEASE_IS_OVER)
        if self._lost:
            raise ClaimLost(
                f"Worker {self.worker!r} lost its claim of {self._what()}: {self._lost}. "
                "What this run had not committed is not kept; let the exception pass."
            )

    def _what(self) -> str:
        return f"the tick {self.tick.isoformat()}"


def _as_number(name: str, value: Any) -> float:
    """Return the number as one that the database can hold. Raises InvalidProgress."""
    try:
        number = float(value) if isinstance(value, Real | Decimal) and not isinstance(value, bool) else math.nan
    except (ArithmeticError, ValueError):  # an int beyond the range of a float, or a signalling NaN
        number = math.nan
    if not math.isfinite(number):
        raise InvalidProgress(
            f"context.progress was given {name} = {value!r:.100}; expected a finite number: "
            "write context.progress(2, 5), for example, and put words into context.logger.info."
        )
    return int(number) if number.is_integer() else number


class TickContext(WorkerContext):
    """The run of a tick."""

    def __init__(self, claim: "Claim", ledger: "Ledger", instance: Instance, db: SQLAlchemy) -> None:
        super().__init__(claim, claim, instance, db, ledger.store.sessions)
        self.claim: Claim = claim
        self.log_lines = LogLines(lambda: current_run.get() is self)
        self._ledger = ledger
        self._log_written = float("-inf")

    def notes(self) -> dict[str, Any]:
        """The words of its execution about it, besides how it ended."""
        return {**self._progress, "log": self.log_lines.text()}

    def _news(self) -> dict[str, Any]:
        """A commit on the way. All of the log is written each time: a long one once a second at most."""
        is_due = self.log_lines.is_short or time.monotonic() - self._log_written >= _LOG_SECONDS
        if not (self.log_lines.is_news and is_due):
            return self._progress
        self._log_written = time.monotonic()
        return self.notes()

    def finish(self) -> None:
        """Commit the effects and "succeeded" together."""
        self.refuse_if_lost()
        self.session.flush()  # first, so that the worker's row is held for the commit only
        self._ledger.finish(self.claim, self.within(self.session), self.notes())
        self._finishing = True
        self.session.commit()

    def check(self, session: Session) -> None:
        """Before every commit of the run: is its claim still the one in force?"""
        self.refuse_if_lost()
        if not self._finishing:
            session.flush()
            try:
                self._ledger.check(self.claim, self.within(session), self._news())
            except ClaimLost:
                self.lose("somebody else has it")
                raise
            self._progress = {}


class MessageContext(WorkerContext):
    """The run of a batch of messages, or of one of it."""

    def __init__(
        self, batch: "Batch", these: "Sequence[Message]", messages: "Messages", instance: Instance, db: SQLAlchemy
    ) -> None:
        super().__init__(batch, these[0], instance, db, messages.sessions)
        self.claim: Batch = batch
        self._messages = messages
        self._open = [message.id for message in these]
        self._handled: list[int] = []
        self._transaction: SessionTransaction | None = None

    def begin(self, message: "Message") -> None:
        """From here on this run is that of `message`; raises ClaimLost where its lease is over."""
        self.refuse_if_lost()
        self.tick, self.attempt, self.token = message.tick, message.attempt, message.token
        self.idempotency_key = message.idempotency_key
        self.log_fields |= {"tick": message.tick.isoformat(), "execution": message.idempotency_key}

    def handled(self, *messages: "Message") -> None:
        """The next commit acknowledges them, together with what the session holds."""
        self.session.flush()  # `book.stock = Book.stock + 1` by the next one would replace this one's
        self._refuse_if_rolled_back()
        self._handled += [message.id for message in messages]
        self._transaction = self._transaction or self.session.get_transaction()

    def finish(self) -> None:
        self.session.flush()
        self.check(self.session)
        self._finishing = True
        self.session.commit()

    def check(self, session: Session) -> None:
        self.refuse_if_lost()
        if self._finishing:
            return
        session.flush()
        done = self._handled if session is self.session else []
        if done:
            self._refuse_if_rolled_back()
        try:
            self._messages.acknowledge(self.claim, done, self._open, self.within(session))
        except ClaimLost:
            self.lose("somebody else has it")
            raise
        self._open = [each for each in self._open if each not in done]
        if done:
            self._handled, self._transaction = [], None

    def _refuse_if_rolled_back(self) -> None:
        """What one message of a batch rolls back is the work of those before it, too."""
        if self._transaction is not None and self.session.get_transaction() is not self._transaction:
            raise BatchRolledBack(
                f"Worker {self.worker!r} rolled back what it had done for other messages of the batch; they are "
                "handled again one by one. Let the exception pass, or set batch_size = 1."
            )

    def _what(self) -> str:
        return f"{len(self._open)} messages" if len(self._open) > 1 else f"the message {self.idempotency_key}"


current_run: ContextVar[WorkerContext | None] = ContextVar("background_run", default=None)


def is_stopping_within(seconds: float) -> bool:
    """Wait that long. In a run, wait only until the run is told to stop, and return whether it was."""
    run = current_run.get()
    if run is None:
        time.sleep(seconds)
        return False
    return run.stopping.wait(seconds)


class RunFields(logging.Filter):
    """Gives every log record of a run, whoever logs it, the run's fields: for logs that machines read."""

    def filter(self, record: logging.LogRecord) -> bool:
        run = current_run.get()
        if run is not None:
            for name, value in run.log_fields.items():
                if not hasattr(record, name):
                    setattr(record, name, value)
        return True


def fence(db: SQLAlchemy) -> None:
    """Check the claim before every commit that a run makes on any session of `db`; and see `when_committed`."""
    for name, listener in (
        ("after_begin", _after_begin),
        ("before_commit", _before_commit),
        ("after_commit", _after_commit),
        ("after_rollback", _after_rollback),
    ):
        if not event.contains(db.session, name, listener):
            event.listen(db.session, name, listener)


def when_committed(session: Session, key: str, call: Callable[[], None]) -> None:
    """Call `call` when `session` has committed what it holds, but not if it rolls back; once per `key`."""
    session.info.setdefault(_WHEN_COMMITTED, {})[key] = call


def _after_commit(session: Session) -> None:
    if session.in_nested_transaction():  # releasing a savepoint commits nothing
        return
    for call in session.info.pop(_WHEN_COMMITTED, {}).values():
        call()


def _after_rollback(session: Session) -> None:
    if not session.in_nested_transaction():  # what came before the savepoint may still be committed
        session.info.pop(_WHEN_COMMITTED, None)


def _before_commit(session: Session) -> None:
    run = current_run.get()
    if run is None or session.in_nested_transaction():  # releasing a savepoint commits nothing
        return
    if run.is_at_home(session):  # the session of another application needs no claim of this one
        run.check(session)


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    run = current_run.get()
    if run is not None and not transaction.nested and run.is_at_home(session):
        run.began(session, connection)

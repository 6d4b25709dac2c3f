"""The context of a run: its tick, session and services, and the checks before each of its commits."""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction
from svcs import Container
from svcs.flask import svcs_from

from .database.sessions import Sessions, Within, home
from .errors import ClaimLost, InvalidCursor, InvalidProgress, RunStopped
from .host.logs import logger_of
from .ledger.claim import Claim
from .ledger.leases import LEASE_IS_OVER, Instance
from .messages.message import Batch, Message
from .messages.payloads import as_json

_PROGRESS_SECONDS = 5.0
_MOST_CURSOR_BYTES = 65_536


class Stopping(threading.Event):
    """A flag that is set once the run should end. `context.stopping.wait(seconds)` replaces a sleep."""

    def __bool__(self) -> bool:
        return self.is_set()


@dataclass
class LogFields(Mapping[str, Any]):
    """The fields of each log record of a run. Each message changes them, so the tick becomes text only when read."""

    worker: str
    tick: datetime
    execution: int | str | None
    instance: str

    def __getitem__(self, name: str) -> Any:
        value = vars(self)[name]
        return value.isoformat() if name == "tick" else value

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))


class WorkerContext:
    """One run: its tick, its session and services, and the request to stop."""

    def __init__(
        self, claim: Claim | Batch, work: Claim | Message, instance: Instance, db: SQLAlchemy, sessions: Sessions
    ) -> None:
        self.worker: str = claim.worker
        self.tick: datetime = work.tick
        """The scheduled moment (aware, UTC). For a manual run, the moment of the request."""
        self.attempt: int = work.attempt
        self.token: int = work.token
        self.idempotency_key: str = work.idempotency_key
        """A text that all attempts at this tick share: pass it to every service outside the database."""
        self.stopping = Stopping()
        self.claim = claim
        self.instance = instance
        self.log_fields = LogFields(claim.worker, work.tick, claim.execution, instance.name)
        self.logger = logging.LoggerAdapter(logger_of(f"background.{claim.worker}"), self.log_fields)
        self.timed_out_after: timedelta | None = None
        self.database = db.engine.url
        self._db, self._sessions = db, sessions
        self._process = os.getpid()
        self.is_cancelled = False
        """True once this run knows that a user cancelled it."""
        self.lost_because: str | None = None
        """The reason why the run may not commit. None while it may commit."""
        self._finishing = False
        self._progress: dict[str, float | None] = {}
        self._progress_logged = time.monotonic()
        self._cursor: str | None = None
        """The cursor as JSON. None if it was neither read nor set since the last rollback."""
        self._cursor_is_new = False
        self._saved: WeakKeyDictionary[SessionTransaction, tuple[str | None, bool]] = WeakKeyDictionary()

    @property
    def session(self) -> Session:
        """`db.session` of this run's app context. Its commits are fenced."""
        return self._db.session()

    @property
    def services(self) -> Container:
        """The services of this run's app context: `context.services.get(UserRepository)`."""
        return svcs_from()

    def commit(self) -> None:
        """Commit the work so far. Raises ClaimLost if the claim is gone."""
        self.session.commit()

    def progress(self, done: float, total: float | None = None) -> None:
        """Report `done` (of `total`). The next commit writes it, and the log has it every five seconds at most.

        Raises InvalidProgress for a value that is not a finite number.
        """
        done, total = _as_number("done", done), None if total is None else _as_number("total", total)
        self._progress = {"progress_done": done, "progress_total": total}
        if time.monotonic() - self._progress_logged >= _PROGRESS_SECONDS:
            self._progress_logged = time.monotonic()
            share = f" of {total:,} ({done / total:.0%})" if total else ""
            self.logger.info("Progress: %s%s", f"{done:,}", share)

    @property
    def cursor(self) -> Any:
        """The position of this tick's work: a JSON value of at most 64 KiB. None at the first attempt.

        Assign it before the commit of a slice: the same transaction stores both. The next attempt at the tick begins
        with the last committed cursor, and a rollback returns to it. The value is a copy: assign a changed one again.

        Raises InvalidCursor for a value that JSON cannot carry, or that is too large.
        """
        if self._cursor is None:
            self._cursor = self._stored_cursor() or "null"
        try:
            return json.loads(self._cursor)
        except ValueError:
            raise InvalidCursor(
                f"The cursor of {self._work()} of {self.worker!r} is {self._cursor!r:.100} in background_executions; "
                "expected JSON, as the engine writes it: correct that row, or delete the value to begin anew."
            ) from None

    @cursor.setter
    def cursor(self, value: Any) -> None:
        text = as_json(value, "context.cursor", InvalidCursor, "assign it", ensure_ascii=True)
        if (size := len(text)) > _MOST_CURSOR_BYTES:
            raise InvalidCursor(
                f"context.cursor was given {size:,} bytes of JSON; expected at most {_MOST_CURSOR_BYTES:,}: "
                "keep a position in it, such as the last id, and keep data in a table of your own."
            )
        self._cursor, self._cursor_is_new = text, True

    def raise_if_stopping(self) -> None:
        """End the run here if it should stop. It rolls back to the last commit, and is handed back or cancelled."""
        if self.stopping:
            end = "cancelled" if self.is_cancelled else "handed back"
            raise RunStopped(f"Worker {self.worker!r} must stop; {self._work()} is {end}. Let the exception pass.")

    # -- the engine's side -----------------------------------------------------------------------

    def lose(self, why: str) -> None:
        """Refuse every later commit, and ask the run to stop."""
        self.lost_because = self.lost_because or why
        self.stopping.set()

    def within(self, session: Session) -> Within:
        """Return the engine's own statements in `session`: on the database of its tables, not that of `get_bind`."""
        return self._sessions.within(session, self._engine_of(session))

    def is_at_home(self, session: Session) -> bool:
        """Return whether `session` is on this run's database.

        A session of another application, in that application's context, may be on another database.
        """
        return bool(self._engine_of(session).url == self.database)

    def began(self, session: Session, connection: Connection) -> None:
        """Check the transaction that `session` began on `connection`, before its first statement."""
        if connection.engine is home(session, self._engine_of(session)):
            self._sessions.begin(connection)
        else:
            self._sessions.watch(connection, self.worker)

    def _engine_of(self, session: Session) -> Engine:
        """Return the default engine of the session's own extension, in the current application context."""
        db: SQLAlchemy = getattr(session, "_db", self._db)
        return db.engine

    def finish(self) -> None:
        """Commit the run's effects and its success together."""
        raise NotImplementedError

    def check(self, session: Session) -> None:
        """Check, before every commit of the run, that its claim is in force. Raises ClaimLost."""
        self.refuse_if_lost()
        if self._finishing:
            return
        session.flush()
        try:
            self._check_claim(session)
        except ClaimLost:
            self.lose("another instance took it over")
            raise

    def _stored_cursor(self) -> str | None:
        """Return the last committed cursor as JSON, or None."""
        return None

    @property
    def new_cursor(self) -> dict[str, str | None]:
        """The column of the execution for a cursor that no commit has stored yet."""
        return {"cursor": self._cursor} if self._cursor_is_new else {}

    def rolled_back(self, session: Session) -> None:
        """Forget the cursor that the work since the last commit set."""
        if session is self.session:
            self._cursor, self._cursor_is_new = None, False

    def saved(self, session: Session, savepoint: SessionTransaction) -> None:
        """Remember the cursor at the beginning of a savepoint."""
        if session is self.session:
            self._saved[savepoint] = self._cursor, self._cursor_is_new

    def returned_to(self, savepoint: SessionTransaction) -> None:
        """Set the cursor to its value at the beginning of a savepoint that was rolled back."""
        self._cursor, self._cursor_is_new = self._saved.get(savepoint, (self._cursor, self._cursor_is_new))

    def _check_claim(self, session: Session) -> None:
        """Check the claim in the session's transaction, and write the columns of this commit. Raises ClaimLost."""
        raise NotImplementedError

    def refuse_if_lost(self) -> None:
        """Raise ClaimLost if this run knows that its claim is gone, or in a forked child of its process."""
        if os.getpid() != self._process:
            raise ClaimLost(
                f"Worker {self.worker!r} runs {self._work()} in the process {self._process}, and its forked child "
                f"{os.getpid()} tried to commit; expected commits of the run's own process only. Hand the result to "
                "that process, and commit there."
            )
        if not self.instance.is_alive:
            self.lose(LEASE_IS_OVER)
        if self.lost_because:
            raise ClaimLost(
                f"Worker {self.worker!r} lost its claim of {self._work()}: {self.lost_because}. "
                "The run's uncommitted work is discarded; let the exception pass."
            )

    def _work(self) -> str:
        return f"the tick {self.tick.isoformat()}"


def _as_number(name: str, value: Any) -> float:
    """Return the number in a form that the database can hold. Raises InvalidProgress."""
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

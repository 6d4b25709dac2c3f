"""What a run is given; and the fence: no commit of a run passes once its claim is gone."""

import logging
import math
import os
import threading
import time
from datetime import datetime, timedelta
from decimal import Decimal
from numbers import Real
from typing import Any

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session
from svcs import Container
from svcs.flask import svcs_from

from .database.sessions import Sessions, Within, home
from .errors import ClaimLost, InvalidProgress, RunStopped
from .host.logs import logger_of
from .ledger.claim import Claim
from .ledger.leases import LEASE_IS_OVER, Instance
from .messages.message import Batch, Message

_PROGRESS_SECONDS = 5.0


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

"""What a run is given; and the fence: no commit of a run passes once its claim is gone."""

import logging
import threading
import time
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import event
from sqlalchemy.orm import Session
from svcs import Container
from svcs.flask import svcs_from

from .errors import ClaimLost, RunStopped
from .instances import LEASE_IS_OVER, Instance

if TYPE_CHECKING:
    from .ledger import Claim, Ledger

_PROGRESS_SECONDS = 5.0


class Stopping(threading.Event):
    """True once the run should end: `if context.stopping`, or `context.stopping.wait(seconds)` instead of a sleep."""

    def __bool__(self) -> bool:
        return self.is_set()


class WorkerContext:
    """One run: its tick, its session and services, and how it hears that it should end."""

    def __init__(self, claim: "Claim", ledger: "Ledger", instance: "Instance", db: SQLAlchemy) -> None:
        self.worker: str = claim.worker
        self.tick: datetime = claim.tick
        """The scheduled moment (aware, UTC); for a manual run the moment it was asked for."""
        self.attempt: int = claim.attempt
        self.token: int = claim.token
        self.idempotency_key: str = claim.idempotency_key
        """The same for every attempt at this tick: hand it to whatever you call outside the database."""
        self.stopping = Stopping()
        self.claim = claim
        self.instance = instance
        self.logger = logging.LoggerAdapter(
            logging.getLogger(f"background.{claim.worker}"),
            {
                "worker": claim.worker,
                "tick": claim.tick.isoformat(),
                "execution": claim.execution,
                "instance": instance.name,
            },
        )
        self.timed_out_after: timedelta | None = None
        self._ledger = ledger
        self._db = db
        self._lost: str | None = None
        self._finishing = False
        self._progress: tuple[float, float | None] | None = None
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
        """Report `done` (of `total`): written with the next commit, logged every five seconds at most."""
        self._progress = (done, total)
        if time.monotonic() - self._progress_logged >= _PROGRESS_SECONDS:
            self._progress_logged = time.monotonic()
            share = f" of {total:,} ({done / total:.0%})" if total else ""
            self.logger.info("Progress: %s%s", f"{done:,}", share)

    def raise_if_stopping(self) -> None:
        """End the run here if it should end: it rolls back to the last commit and is handed back."""
        if self.stopping:
            raise RunStopped(
                f"Worker {self.worker!r} was told to stop; its tick is handed back. Let the exception pass."
            )

    # -- the engine's side -----------------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        """Whether this run knows that its claim is gone."""
        return self._lost is not None

    def lose(self, why: str) -> None:
        """From now on no commit passes, and the run is told to end."""
        self._lost = self._lost or why
        self.stopping.set()

    def finish(self) -> None:
        """Commit the effects and "succeeded" together."""
        self._refuse_if_lost()
        self.session.flush()  # first, so that the worker's row is held for the commit only
        self._ledger.finish(self.claim, self.session, self._progress)
        self._finishing = True
        self.session.commit()

    def check(self, session: Session) -> None:
        """Before every commit of the run: is its claim still the one in force?"""
        self._refuse_if_lost()
        if not self._finishing:
            session.flush()
            try:
                self._ledger.check(self.claim, session, self._progress)
            except ClaimLost:
                self.lose("somebody else has it")
                raise
            self._progress = None

    def _refuse_if_lost(self) -> None:
        if not self.instance.is_alive:
            self.lose(LEASE_IS_OVER)
        if self._lost:
            raise ClaimLost(
                f"Worker {self.worker!r} lost its claim of the tick {self.tick.isoformat()}: {self._lost}. "
                "What this run had not committed is not kept; let the exception pass."
            )


current_run: ContextVar[WorkerContext | None] = ContextVar("background_run", default=None)


def fence(db: SQLAlchemy) -> None:
    """Check the claim before every commit that a run makes on any session of `db`."""
    if not event.contains(db.session, "before_commit", _before_commit):
        event.listen(db.session, "before_commit", _before_commit)


def _before_commit(session: Session) -> None:
    run = current_run.get()
    if run is not None and not session.in_nested_transaction():  # releasing a savepoint commits nothing
        run.check(session)

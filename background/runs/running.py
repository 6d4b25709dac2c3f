"""Runs one claim: a fresh app context, the worker's method, and one outcome, written once."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from ..context import WorkerContext
from ..database.outages import Outages
from ..errors import first_line
from ..host.forks import ended_in_a_fork
from ..host.logs import logger_of
from ..ledger.claim import Claim
from ..ledger.leases import Instance
from ..ledger.ledger import Ledger
from ..signals import execution_started, send
from ..worker import PeriodicWorker
from .execution import (
    Execution,
    Outcome,
    TickContext,
    await_result,
    cancelled_after,
    timed_out_after,
    write_failure,
)
from .fence import current_run

log = logger_of(__name__)


class Runs:
    """The runs of this process, and requests to stop them."""

    def __init__(self, app: Flask, db: SQLAlchemy, outages: Outages, hung: Callable[[int], None]) -> None:
        """Call `hung` with the thread of each run that timed out or was cancelled. The thread may never come back."""
        self.app, self.db, self._outages, self._hung = app, db, outages, hung
        self._contexts: set[WorkerContext] = set()
        self._changed = threading.Condition()
        self.stopping = threading.Event()
        self._told_at = 0.0
        self._hurried = False

    def open(self) -> None:
        """Let runs begin (again)."""
        self.stopping.clear()
        self._hurried = False

    def tell(self) -> None:
        """Ask every run to stop, and each run that begins later."""
        with self._changed:
            if not self.stopping.is_set():
                self._told_at = time.monotonic()
                self.stopping.set()
            for context in self._contexts:
                context.stopping.set()

    def hurry(self) -> None:
        """Ask every run to stop, and end `wait` immediately."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            self.tell()

    def lose(self, why: str, instance: Instance | None = None) -> None:
        """Refuse every later commit of the runs (of `instance`): another instance may be running their ticks."""
        with self._changed:
            for context in self._contexts:
                if instance is None or context.instance.id == instance.id:
                    context.lose(why)

    def cancel(self, claims: Mapping[str, str | None]) -> None:
        """Ask the runs of `claims` to stop: by the claim's id, the user who cancelled it. Ignore other claims.

        A run that does not end within WORKERS_SHUTDOWN_SECONDS can no longer commit.
        """
        with self._changed:
            for context in self._contexts:
                if isinstance(context, TickContext) and (id := context.claim.id) in claims:
                    context.cancel(claims[str(id)])

    def has(self, claim: Claim) -> bool:
        """Return whether `claim` runs in this process."""
        with self._changed:
            return any(context.claim.id == claim.id for context in self._contexts)

    def wait(self, seconds: float) -> bool:
        """Wait until no run is left. False if `seconds` passed since `tell`, or a second signal hurries."""
        with self._changed:
            left = self._told_at + seconds - time.monotonic()
            self._changed.wait_for(lambda: not self._contexts or self._hurried, max(left, 0.0))
            return not self._contexts

    def run(self, worker: type[PeriodicWorker], claim: Claim, ledger: Ledger, instance: Instance) -> Execution:
        """Run `claim` and write its outcome. This raises no error of the worker's code."""
        hung, patience = partial(self._hung, threading.get_ident()), self.app.config["WORKERS_SHUTDOWN_SECONDS"]
        # Around the context, too: the application may also fork at the end of the context.
        with ended_in_a_fork(f"The run of {worker.__name__}"), self.app.app_context():
            context = TickContext(claim, ledger, instance, self.db)
            outcome = Outcome(self.app, context, ledger)
            with (
                cancelled_after(patience, context, outcome, hung),
                self.entered(context),
                context.log_lines.attached(),
                timed_out_after(worker.timeout, context, outcome, hung),
            ):
                # After `entered`: a run that is not registered counts as stranded, and another instance takes over.
                send(self.app, execution_started, claim=claim)
                return Execution(claim, self._run(worker, context, outcome))

    @contextmanager
    def entered(self, context: WorkerContext) -> Iterator[None]:
        """Register `context` as running: it receives stop requests, `wait` waits for it, and its commits are fenced."""
        with self._changed:
            self._contexts.add(context)
            if self.stopping.is_set():
                context.stopping.set()
        token = current_run.set(context)
        try:
            yield
        finally:
            current_run.reset(token)
            with self._changed:
                self._contexts.discard(context)
                self._changed.notify_all()

    def _run(self, worker: type[PeriodicWorker], context: TickContext, outcome: Outcome) -> str:
        claim, began = context.claim, time.monotonic()
        try:
            context.raise_if_stopping()
            context.refuse_if_lost()  # the run may have timed out while the receivers of the signal ran
            with ended_in_a_fork(f"{worker.__name__}.do_work"):
                await_result(worker().do_work(context))
            with ended_in_a_fork(f"The commit of {worker.__name__}"):
                context.finish()
        except BaseException as error:
            self.roll_back(error)
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                outcome.write("handed back", next_attempt=claim.attempt)  # a Ctrl-C reaches only the main thread
                raise
            return write_failure(worker, context, outcome, error)
        context.logger.info("Ran the tick %s in %.3f s", claim.tick.isoformat(), time.monotonic() - began)
        outcome.signal("succeeded")
        return "succeeded"

    def roll_back(self, why: BaseException) -> None:
        """Undo the work of a failed run since its last commit."""
        self._outages.notice(why)
        try:
            self.db.session.rollback()
        except Exception as error:  # the connection broke, or a listener failed. The database rolls back by itself
            log.warning("Closed the connection of a run, which cannot roll back: %s", first_line(error))
            self.db.session().invalidate()

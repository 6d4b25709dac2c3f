"""Running one claim: a fresh app context, the worker's method, and one outcome, written once."""

import threading
import time
from collections.abc import Callable, Iterator
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
from .execution import Ending, Execution, TickContext, finish, timed_out_after, unfinished
from .fence import current_run

log = logger_of(__name__)


class Runs:
    """The runs of this process: who is told to stop, and who is waited for."""

    def __init__(self, app: Flask, db: SQLAlchemy, outages: Outages, hung: Callable[[int], None]) -> None:
        """Call `hung` with the thread of each run that timed out. The thread may never come back."""
        self._app, self._db, self._outages, self._hung = app, db, outages, hung
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
        """Set `stopping` in every run, at once, and in those that begin later."""
        with self._changed:
            if not self.stopping.is_set():
                self._told_at = time.monotonic()
                self.stopping.set()
            for context in self._contexts:
                context.stopping.set()

    def hurry(self) -> None:
        """Tell them, and let `wait` wait no longer."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            self.tell()

    def lose(self, why: str, instance: Instance | None = None) -> None:
        """Refuse every later commit of the runs (of `instance`): others may be running their ticks by now."""
        with self._changed:
            for context in self._contexts:
                if instance is None or context.instance.id == instance.id:
                    context.lose(why)

    def has(self, claim: Claim) -> bool:
        """Whether `claim` runs in this process."""
        with self._changed:
            return any(context.claim.id == claim.id for context in self._contexts)

    def wait(self, seconds: float) -> bool:
        """Wait until nothing runs. False when `seconds` went by since `tell`, or a second signal hurries."""
        with self._changed:
            left = self._told_at + seconds - time.monotonic()
            self._changed.wait_for(lambda: not self._contexts or self._hurried, max(left, 0.0))
            return not self._contexts

    def run(self, worker: type[PeriodicWorker], claim: Claim, ledger: Ledger, instance: Instance) -> Execution:
        """Run `claim` to its end, whatever that is, and write it down; no error of the worker's comes out."""
        hung = partial(self._hung, threading.get_ident())
        # Around the context, too: what the application does at its end may fork as well.
        with ended_in_a_fork(f"The run of {worker.__name__}"), self._app.app_context():
            context = TickContext(claim, ledger, instance, self._db)
            ending = Ending(self._app, context, ledger)
            with (
                self.entered(context),
                context.log_lines.attached(),
                timed_out_after(worker.timeout, context, ending, hung),
            ):
                # Afterwards: a run that is not registered counts as stranded, and another instance takes it.
                send(self._app, execution_started, claim=claim)
                return Execution(claim, self._outcome(worker, context, ending))

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

    def _outcome(self, worker: type[PeriodicWorker], context: TickContext, ending: "Ending") -> str:
        claim, began = context.claim, time.monotonic()
        try:
            context.raise_if_stopping()
            context.refuse_if_lost()  # it may have timed out while the receivers of the signal ran
            with ended_in_a_fork(f"{worker.__name__}.do_work"):
                finish(worker().do_work(context))
            with ended_in_a_fork(f"The commit of {worker.__name__}"):
                context.finish()
        except BaseException as error:
            self.roll_back(error)
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                ending.write("handed back", next_attempt=claim.attempt)  # a Ctrl-C: it reaches no other thread
                raise
            return unfinished(worker, context, ending, error)
        context.logger.info("Ran the tick %s in %.3f s", claim.tick.isoformat(), time.monotonic() - began)
        ending.tell("succeeded")
        return "succeeded"

    def roll_back(self, why: BaseException) -> None:
        """Undo what the run that ended badly did since its last commit."""
        self._outages.notice(why)
        try:
            self._db.session.rollback()
        except Exception as error:  # the connection broke, or a listener; the database rolls back by itself
            log.warning("Gave up the connection of a run: %s", first_line(error))
            self._db.session().invalidate()

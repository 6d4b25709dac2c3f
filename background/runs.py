"""Running one claim: a fresh app context, the worker's method, and one outcome, written once."""

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain, repeat
from typing import Any, TypeVar

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import SQLAlchemyError

from .context import TickContext, WorkerContext, current_run
from .errors import ClaimLost, InvalidWorker, RunStopped, first_line
from .failures import may_pass, told
from .forks import ended_in_a_fork
from .instances import Instance
from .ledger import NOTHING, Claim, Ledger, Notes
from .logs import logger_of
from .mending import Mending
from .outages import Outages, is_cut_off
from .signals import execution_started, of_state, send
from .worker import PeriodicWorker, attempt_after

log = logger_of(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Execution:
    """What this instance did about one tick; `state` is how it ended."""

    claim: Claim
    state: str


class Runs:
    """The runs of this process: who is told to stop, and who is waited for."""

    def __init__(self, app: Flask, db: SQLAlchemy, outages: Outages) -> None:
        self._app, self._db, self._outages = app, db, outages
        self._contexts: set[WorkerContext] = set()
        self._changed = threading.Condition()
        self.stopping = threading.Event()
        self._told_at = 0.0
        self._hurried = False
        self.hung: Callable[[int], None] = lambda thread: None
        """Called with the thread of a run that timed out: it may never come back."""

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
        hung = partial(self.hung, threading.get_ident())
        # Around the context, too: what the application does at its end may fork as well.
        with ended_in_a_fork(f"The run of {worker.__name__}"), self._app.app_context():
            context = TickContext(claim, ledger, instance, self._db)
            ending = Ending(self._app, context, ledger)
            with (
                self.entered(context),
                context.log_lines.attached(),
                _timed_out_after(worker.timeout, context, ending, hung),
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
            return _unfinished(worker, context, ending, error)
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


def _unfinished(worker: type[PeriodicWorker], context: TickContext, ending: "Ending", error: BaseException) -> str:
    """Write down why the run did not succeed, and return that."""
    claim, tick = context.claim, context.tick.isoformat()
    if context.timed_out_after:
        return _time_out(context, ending)
    if context.lost_because or not context.instance.is_alive or isinstance(error, ClaimLost):
        # Once the claim is lost, the code's error follows from that, even a broken connection.
        why = None if isinstance(error, ClaimLost) else context.lost_because
        context.logger.warning("Lost the tick %s: %s", tick, why or first_line(error))
        ending.disown()
        return "lost"  # an instance that finds this one gone writes it
    if isinstance(error, RunStopped):
        state = ending.write("handed back", next_attempt=claim.attempt)
        if state == "handed back":
            context.logger.info("Handed the tick %s back", tick)
        return state
    if is_cut_off(error):
        again = attempt_after(worker, claim.attempt)
        state = ending.write("lost", f"its database connection broke: {first_line(error)}", again)
        if state == "lost":
            context.logger.warning("Lost the tick %s, its database connection broke: %s", tick, follows(again))
    else:
        state = ending.write("failed", told(error), error=error)
        if state != "succeeded":
            context.logger.error("Failed at the tick %s", tick, exc_info=error)
    if state == "succeeded":  # the reply to its last commit got lost, or a listener to that failed
        context.logger.warning("Succeeded at the tick %s, but afterwards: %s", tick, first_line(error))
        ending.tell("succeeded")
    return state


def follows(attempt: int | None) -> str:
    """What becomes of a lost tick, in words."""
    return f"attempt {attempt} follows" if attempt else "it is given up"


def finish(result: Awaitable[None] | None) -> None:
    """Await the result of an `async` method. If the caller runs in a loop, use another loop beside it.

    Raises InvalidWorker for a generator, which has not done anything yet.
    """
    if inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise InvalidWorker(
            f"{result.__qualname__} returned a generator, so nothing was done; expected a method that does its work "
            "when it is called: loop over the generator in it."
        )
    if not inspect.isawaitable(result):
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(_awaited(result))
    else:
        with ThreadPoolExecutor(1) as beside:
            beside.submit(copy_context().run, asyncio.run, _awaited(result)).result()


async def _awaited(result: Awaitable[None]) -> None:
    with ended_in_a_fork("An async method"):  # before the child closes the loop, which would disturb its parent's
        await result


class Ending:
    """Writes once how a run ends. The writer signals it to the application."""

    def __init__(self, app: Flask, context: TickContext, ledger: Ledger) -> None:
        self._app, self._context, self._ledger = app, context, ledger

    def write(
        self,
        state: str,
        reason: str | None = None,
        next_attempt: int | None = None,
        error: BaseException | None = None,
    ) -> str:
        """Write how the run ended and return that, or what was written before; "lost" where the lease was over."""
        context, is_in_doubt = self._context, False

        def end(state: str, reason: str | None, notes: Notes) -> str:
            nonlocal is_in_doubt
            try:
                ended = self._ledger.end(context.claim, state, reason, next_attempt, notes)
            except SQLAlchemyError:
                is_in_doubt = True  # perhaps only the reply got lost
                raise
            found = state if ended else self._ledger.outcome(context.claim)
            if ended or (is_in_doubt and found == state):
                self.tell(state, **({"error": error} if error and state == "failed" else {"reason": reason}))
            return found

        ways = (
            lambda: end(state, reason, context.notes()),
            lambda: end(state, None, NOTHING),
            lambda: end("lost", None, NOTHING),  # the claim must end, or its worker would never run again
        )
        return insist(context.instance, f"that {context.worker} {state}", *ways) or "lost"

    def disown(self) -> None:
        """Give the tick of a lost claim an answer, also if its execution was deleted by hand."""
        if self._context.instance.is_alive:
            disown = partial(Mending(self._ledger).disown, self._context.claim)
            insist(self._context.instance, f"that {self._context.worker} lost its claim", disown)

    def tell(self, state: str, **details: Any) -> None:
        """Send the signal of `state`."""
        send(self._app, of_state[state], claim=self._context.claim, **details)


def insist(instance: Instance, what: str, *ways: Callable[[], T]) -> T | None:
    """Return the result of the first of `ways` to write that succeeds. None if the lease ends first, or none does.

    One way is tried again while its error may pass by itself. If the database refuses it for another reason, the next
    way is tried, which writes less.
    """
    pauses = chain((0.1, 0.2, 0.5, 1.0), repeat(2.0))
    for write in ways:
        while True:
            try:
                return write()
            except Exception as error:
                if not may_pass(error):
                    log.exception(
                        "Cannot write %s%s", what, ", so less of it is written" if write is not ways[-1] else ""
                    )
                    break
                if not instance.is_alive:
                    return None
                log.warning("Cannot write %s, trying again: %s", what, first_line(error))
                threading.Event().wait(next(pauses))
    return None


@contextmanager
def _timed_out_after(
    timeout: timedelta | None, context: TickContext, ending: Ending, hung: Callable[[], None]
) -> Iterator[None]:
    """After `timeout`, end the run in the ledger, so that the next ticks go on; the hung one can commit no more."""
    if timeout is None:
        yield
        return

    def time_out() -> None:
        context.timed_out_after = timeout
        context.lose(f"it ran longer than its timeout of {timeout}")
        hung()
        if _time_out(context, ending) == "timed out":
            context.logger.warning("Timed out: the tick %s ran longer than %s", context.tick.isoformat(), timeout)

    timer = threading.Timer(timeout.total_seconds(), time_out)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _time_out(context: TickContext, ending: Ending) -> str:
    """Called when the time is up, and again by the run when it ends: on SQLite it may hold the lock until then."""
    return ending.write("timed out", f"ran longer than its timeout of {context.timed_out_after}")

"""The run of a tick: its context, its time-out, and its outcome, which is written once."""

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
from sqlalchemy.orm import Session

from ..context import WorkerContext
from ..database.dialects.error_codes import is_undefined
from ..database.outages import is_cut_off, may_pass
from ..errors import ClaimLost, InvalidWorker, RunStopped, first_line
from ..host.forks import ended_in_a_fork
from ..host.logs import logger_of
from ..ledger.claim import Claim
from ..ledger.leases import Instance
from ..ledger.ledger import NOTHING, Ledger, Notes
from ..repair.edited_rows import RowRepair
from ..signals import of_state, send
from ..worker import PeriodicWorker, attempt_after, pause_after
from .failures import traceback_of
from .fence import current_run
from .run_log import LogLines

log = logger_of(__name__)

T = TypeVar("T")
_LOG_SECONDS = 1.0


class TickContext(WorkerContext):
    """The run of a tick."""

    def __init__(self, claim: Claim, ledger: Ledger, instance: Instance, db: SQLAlchemy) -> None:
        super().__init__(claim, claim, instance, db, ledger.store.sessions)
        self.claim: Claim = claim
        self.log_lines = LogLines(lambda: current_run.get() is self)
        self._ledger = ledger
        self._log_written = float("-inf")
        self._cancelled: dict[str, Any] = {}
        self.when_cancelled: Callable[[], None] = lambda: None
        self.hung_for: str | None = None
        """The sentence about a cancelled run that did not end in time."""

    def cancel(self, by: str | None) -> None:
        """Ask the run to stop, because the user `by` cancelled it."""
        if self.is_cancelled:
            return
        self._cancelled = {"cancelled_at": self.instance.database_time(), "cancelled_by": by}
        self.is_cancelled = True
        self.stopping.set()
        self.when_cancelled()

    def notes(self) -> dict[str, Any]:
        """Return the columns of the execution besides its state and reason: progress, log, and who cancelled it."""
        return {**self._progress, **self._cancelled, "log": self.log_lines.text()}

    def _new_notes(self) -> dict[str, Any]:
        """Return the columns that a commit during the run writes. It writes a long log once a second at most."""
        is_due = self.log_lines.is_short or time.monotonic() - self._log_written >= _LOG_SECONDS
        if not (self.log_lines.has_news and is_due):
            return self._progress
        self._log_written = time.monotonic()
        return self.notes()

    def finish(self) -> None:
        """Commit the effects and "succeeded" together. Raises RunStopped if the run was cancelled."""
        self.refuse_if_lost()
        if self.is_cancelled:  # the run may have ended early, so its work may not be complete
            self.raise_if_stopping()
        self.session.flush()  # first, so that the worker's row is locked during the commit only
        self._ledger.finish(self.claim, self.within(self.session), self.notes() | self.new_cursor)
        self._finishing = True
        self.session.commit()

    def _check_claim(self, session: Session) -> None:
        cursor = self.new_cursor if session is self.session else {}
        self._ledger.check(self.claim, self.within(session), self._new_notes() | cursor)
        self._progress = {}
        if cursor:  # if this commit fails, the rollback forgets the cursor
            self._cursor_is_new = False

    def _stored_cursor(self) -> str | None:
        return self._ledger.cursor(self.claim)


@dataclass(frozen=True)
class Execution:
    """The run of one tick on this instance, and the state in which it ended."""

    claim: Claim
    state: str


def write_failure(worker: type[PeriodicWorker], context: TickContext, outcome: "Outcome", error: BaseException) -> str:
    """Write why the run did not succeed. Return the state that was written."""
    claim, tick = context.claim, context.tick.isoformat()
    if context.timed_out_after:
        return _time_out(context, outcome)
    if context.is_cancelled and context.instance.is_alive:
        return _cancelled(context, outcome, error)
    if context.lost_because or not context.instance.is_alive or isinstance(error, ClaimLost):
        # Once the claim is lost, it is the cause of the error, even of a broken connection.
        why = None if isinstance(error, ClaimLost) else context.lost_because
        context.logger.warning("Lost the tick %s: %s", tick, why or first_line(error))
        outcome.disown()
        return "lost"  # the instance that takes the tick over writes it
    if isinstance(error, RunStopped):
        state = outcome.write("handed back", next_attempt=claim.attempt)
        if state == "handed back":
            context.logger.info("Handed the tick %s back", tick)
        elif state == "cancelled":  # the request is in the row, and did not reach this run
            context.logger.info("Cancelled at the tick %s", tick)
        return state
    if is_cut_off(error):
        again = attempt_after(worker, claim.attempt)
        state = outcome.write("lost", f"its database connection broke: {first_line(error)}", again)
        if state == "lost":
            context.logger.warning("Lost the tick %s, its database connection broke: %s", tick, follows(again))
    else:
        again = attempt_after(worker, claim.attempt, has_failed=True) if claim.trigger == "schedule" else None
        pause = pause_after(worker, claim.attempt) if again else None
        state = outcome.write("failed", traceback_of(error), again, error, pause)
        if state != "succeeded":
            follow = f"; attempt {again} follows in {pause.total_seconds():.0f} s, or the next tick" if pause else ""
            context.logger.error("Failed at the tick %s%s", tick, follow, exc_info=error)
            if is_undefined(error):
                context.logger.error("The database lacks a table or a column of the models: see `flask workers check`")
    if state == "succeeded":  # the reply to its last commit was lost, or a listener of the commit failed
        context.logger.warning("Succeeded at the tick %s, but afterwards: %s", tick, first_line(error))
        outcome.signal("succeeded")
    return state


def follows(attempt: int | None) -> str:
    """Return a text about the next attempt at a lost tick."""
    return f"attempt {attempt} follows" if attempt else "it is given up"


def await_result(result: Awaitable[None] | None) -> None:
    """Await the result of an `async` method. If this thread runs a loop, use a loop on another thread.

    Raises InvalidWorker for a generator, which has not run yet.
    """
    if result is None:
        return
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
    with ended_in_a_fork("An async method"):  # before the child closes the loop, which would disturb the parent's loop
        await result


class Outcome:
    """Writes the outcome of a run once, and sends its signal to the application."""

    def __init__(self, app: Flask, context: TickContext, ledger: Ledger) -> None:
        self._app, self._context, self._ledger = app, context, ledger

    def write(
        self,
        state: str,
        reason: str | None = None,
        next_attempt: int | None = None,
        error: BaseException | None = None,
        pause: timedelta | None = None,
    ) -> str:
        """Write the outcome. Return its state, or the state that was written before. "lost" if the lease was over."""
        context, is_in_doubt = self._context, False

        def end(state: str, reason: str | None, notes: Notes) -> str:
            nonlocal is_in_doubt
            try:
                ended = self._ledger.end(context.claim, state, reason, next_attempt, notes, pause)
            except SQLAlchemyError:
                is_in_doubt = True  # the write may have succeeded: perhaps only its reply is missing
                raise
            found = ended or self._ledger.outcome(context.claim)
            if ended or (is_in_doubt and found in (state, "cancelled")):
                self.signal(found, **({"error": error} if error and found == "failed" else {"reason": reason}))
            return found

        writes = (
            lambda: end(state, reason, context.notes()),
            lambda: end(state, None, NOTHING),
            lambda: end("lost", None, NOTHING),  # the claim must end, or its worker would never run again
        )
        return write_with_retries(context.instance, f"that {context.worker} {state}", *writes) or "lost"

    def correct(self, state: str, reason: str) -> str:
        """Write the outcome. If `state` was written before, write the `reason` anew. Return as `write`."""
        found, claim = self.write(state, reason), self._context.claim
        if found == state:
            write_with_retries(self._context.instance, reason, partial(self._ledger.explain, claim, reason))
        return found

    def disown(self) -> None:
        """Write the execution of a lost claim if it was deleted by hand, so that its tick has an outcome."""
        if self._context.instance.is_alive:
            disown = partial(RowRepair(self._ledger).disown, self._context.claim)
            write_with_retries(self._context.instance, f"that {self._context.worker} lost its claim", disown)

    def signal(self, state: str, **details: Any) -> None:
        """Send the signal of `state`."""
        send(self._app, of_state[state], claim=self._context.claim, **details)


def write_with_retries(instance: Instance, what: str, *writes: Callable[[], T]) -> T | None:
    """Return the result of the first of `writes` that succeeds. None if the lease ends first, or all writes fail.

    A write is tried again while its error may pass by itself. After another error, the next write is tried, which
    writes less. `what` names the fact for the log.
    """
    pauses = chain((0.1, 0.2, 0.5, 1.0), repeat(2.0))
    for write in writes:
        while True:
            try:
                return write()
            except Exception as error:
                if not may_pass(error):
                    log.exception(
                        "Cannot write %s%s", what, ", so less of it is written" if write is not writes[-1] else ""
                    )
                    break
                if not instance.is_alive:
                    return None
                log.warning("Cannot write %s, trying again: %s", what, first_line(error))
                threading.Event().wait(next(pauses))
    return None


@contextmanager
def timed_out_after(
    timeout: timedelta | None, context: TickContext, outcome: Outcome, hung: Callable[[], None]
) -> Iterator[None]:
    """End the run in the ledger after `timeout`, so that the next ticks go on. The hung run can no longer commit."""
    if timeout is None:
        yield
        return

    def time_out() -> None:
        context.timed_out_after = timeout
        context.lose(f"it ran longer than its timeout of {timeout}")
        hung()
        if _time_out(context, outcome) == "timed out":
            context.logger.warning("Timed out: the tick %s ran longer than %s", context.tick.isoformat(), timeout)

    timer = threading.Timer(timeout.total_seconds(), time_out)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def cancelled_after(seconds: float, context: TickContext, outcome: Outcome, hung: Callable[[], None]) -> Iterator[None]:
    """End the run in the ledger `seconds` after a user cancelled it, so that the next ticks go on.

    The hung run can no longer commit.
    """

    def give_up() -> None:
        context.hung_for = f"it did not end within {seconds:g} s"
        context.lose(f"it was cancelled, and {context.hung_for}")
        hung()
        if outcome.write("cancelled", f"{context.hung_for}, so its thread may still run") == "cancelled":
            context.logger.warning("Hung at the cancelled tick %s: %s", context.tick.isoformat(), context.hung_for)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    context.when_cancelled = timer.start
    try:
        yield
    finally:
        timer.cancel()  # a start after this calls nothing


def _cancelled(context: TickContext, outcome: Outcome, error: BaseException) -> str:
    """Write "cancelled", and that the thread of a hung run ended after all."""
    tick = context.tick.isoformat()
    if context.hung_for:
        context.logger.info("Ended long after it was cancelled: the run of the tick %s", tick)
        at = context.instance.database_time().isoformat(timespec="seconds")
        return outcome.correct("cancelled", f"{context.hung_for}. Its thread ended later, at {at}")
    state = outcome.write("cancelled", None if isinstance(error, RunStopped) else traceback_of(error))
    context.logger.info("Cancelled at the tick %s", tick)
    return state


def _time_out(context: TickContext, outcome: Outcome) -> str:
    """Write "timed out". The timer calls this, and later the run: on SQLite, the run may hold the lock to its end."""
    return outcome.write("timed out", f"ran longer than its timeout of {context.timed_out_after}")

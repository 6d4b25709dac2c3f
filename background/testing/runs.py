"""Runs of a worker in a test: one tick, an instance, and a context for a call of `do_work`."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from flask import Flask, current_app

from ..context import WorkerContext
from ..errors import BackgroundError, InvalidCursor
from ..ledger.claim import Claim
from ..manager import BackgroundWorkerManager, the_manager
from ..messages.payloads import as_json
from ..runs.dry_run import UnclaimedContext
from ..runs.execution import Execution
from ..signals import execution_failed
from ..worker import PeriodicWorker
from .clock import Clock

_JOINING_SECONDS = 30.0


class TickNotRun(BackgroundError):
    """The tick that a test asked for did not run."""


def run_worker(app: Flask, worker: type[PeriodicWorker], at: datetime | None = None, cursor: Any = None) -> Execution:
    """Run the latest tick of `worker` up to `at` (aware, by default now), and return its execution.

    With `cursor`, the run begins with this cursor, as if an earlier attempt had committed it and was handed back.

    With `at`, the database's clock stands at this moment during the run. So the tick may be years away. Registers the
    worker if the application did not. Raises the worker's own error. Raises TickNotRun, with the reason, if the tick
    does not run: it has run, it runs already, or the worker is paused or disabled.
    """
    manager = manager_of(app)
    if not isinstance(worker, type) or manager.workers.get(worker.name) is not worker:
        manager.add(worker)  # also refuses anything that is no worker class
    errors: list[BaseException] = []

    def note(sender: Flask, claim: Claim, error: BaseException) -> None:
        errors.append(error)

    with ExitStack() as block:
        if at is not None:
            block.enter_context(Clock(at))
        block.enter_context(execution_failed.connected_to(note, app))
        at_last = at or manager.history.clock()
        if cursor is not None:
            _leave_cursor(manager, worker, at_last, cursor)
        execution = manager.tick(worker.name, at_last)
        if execution is None:
            raise TickNotRun(_reason(manager, worker, at))
    if errors:
        raise errors[0]
    return execution


def _leave_cursor(manager: BackgroundWorkerManager, worker: type[PeriodicWorker], at: datetime, cursor: Any) -> None:
    """Claim the tick, store `cursor`, and hand the tick back, as an earlier attempt would."""
    text = as_json(cursor, "cursor", InvalidCursor, "pass it", ensure_ascii=True)
    ledger, state = manager.stores.ledger, manager.recovery.look(worker, asked=at)
    tick = state.schedule.previous(at)
    ledger.miss(state, tick)
    claim = ledger.claim(worker.name, tick, state.schedule_text, (uuid4().hex, "an earlier attempt"))
    if isinstance(claim, Claim):
        ledger.end(claim, "handed back", next_attempt=1, notes={"cursor": text})


def _reason(manager: BackgroundWorkerManager, worker: type[PeriodicWorker], at: datetime | None) -> str:
    if not worker.enabled:
        return f"{worker.__name__} did not run: it is disabled (enabled = False)."
    return f"{worker.__name__} did not run. {manager.why(worker.name, at).sentence}"


@contextmanager
def running(app: Flask, *names: str) -> Iterator[BackgroundWorkerManager]:
    """Run all workers of `app`, or only the workers `names`, in this process until the block ends.

    The block begins once this instance has joined the fleet. Raises TimeoutError if it cannot join within 30 seconds.
    """
    manager = manager_of(app)
    manager.start(names)
    try:
        wait_until_joined(manager)
        yield manager
    finally:
        manager.stop()


def wait_until_joined(manager: BackgroundWorkerManager) -> None:
    """Wait until a started process has joined the fleet. Raises TimeoutError after 30 seconds."""
    until = time.monotonic() + _JOINING_SECONDS
    while manager.supervisor is None or manager.supervisor.heartbeat is None:
        if time.monotonic() > until:
            raise TimeoutError(
                f"The workers have not joined the fleet within {_JOINING_SECONDS:.0f} seconds; expected a database "
                "that is ready: the log says why it is not."
            )
        time.sleep(0.005)


def worker_context(
    worker: str = "a_worker", tick: datetime | None = None, attempt: int = 1, cursor: Any = None
) -> WorkerContext:
    """Return a context for `MyWorker().do_work(context)` in a unit test. Call it in an app context.

    The database must have your own tables, but needs none of the engine's. The writes of `do_work` stay uncommitted in
    `context.session`. `context.stopping.set()` asks the worker to stop.
    """
    if not current_app:
        raise RuntimeError(
            "worker_context() was called outside an app context; expected one, for the session and the services: "
            "write `with app.app_context():`."
        )
    manager = the_manager()
    tick = tick or datetime.now(UTC).replace(microsecond=0)
    made = Claim(worker, tick, attempt, token=1, trigger="schedule", execution=None, id=uuid4().hex)
    return UnclaimedContext(made, manager.db, manager.stores.main.sessions, cursor)


def manager_of(app: Flask) -> BackgroundWorkerManager:
    """Return the manager of `app`. Raises RuntimeError if it has none."""
    try:
        manager: BackgroundWorkerManager = app.extensions["background_workers"]
    except KeyError:
        raise RuntimeError(
            f"The application {app.name!r} has no background workers; expected BackgroundWorkerManager(app, db) in its "
            "factory."
        ) from None
    return manager

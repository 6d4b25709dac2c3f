"""The manager: the engine's public face."""

import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from flask import Flask, current_app
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.local import LocalProxy

from . import models, serving, sqlite
from .context import fence
from .errors import BackgroundError, DuplicateWorker, InvalidSchedule, UnknownWorker, first_line
from .history import History
from .locks import Lock
from .runs import Execution
from .schedule import make_schedule
from .ticks import Ticks
from .why import Answer, why
from .worker import PeriodicWorker, declared_schedule

if TYPE_CHECKING:
    from .membership import Membership

log = logging.getLogger(__name__)


class BackgroundWorkerManager:
    """Runs the workers of one application, once per tick of the fleet that shares its database.

    `add` registers; nothing is opened or started by that. `start` joins the fleet and `stop` leaves it.
    """

    def __init__(self, app: Flask | None = None, db: SQLAlchemy | None = None) -> None:
        self._workers: dict[str, type[PeriodicWorker]] = {}
        self._before_start: list[Callable[[], None]] = []
        self._checks: list[Callable[[], None]] = []
        self._lock = threading.RLock()
        self._membership: Membership | None = None
        self._started_in = self._served_in = 0  # process ids: a fork inherits the rest, but not the threads
        if app is not None and db is not None:
            self.init_app(app, db)

    def init_app(self, app: Flask, db: SQLAlchemy) -> None:
        """Bind to `app` and its initialised `db`: tables, commit fence, `flask workers`; opens no connection."""
        self.app, self.db = app, db
        self.ticks = Ticks(app, db, self._workers)
        app.extensions["background_workers"] = self
        for name, table in models.metadata.tables.items():
            if name not in db.metadata.tables:
                table.to_metadata(db.metadata)
        with app.app_context():
            sqlite.refuse_memory(db.engine)
            for engine in db.engines.values():
                sqlite.prepare(engine)
        fence(db)
        serving.attach(self, app)

    # -- registering ---------------------------------------------------------------------------

    @property
    def workers(self) -> dict[str, type[PeriodicWorker]]:
        """The registered worker classes by name, sorted."""
        return dict(sorted(self._workers.items()))

    def add(self, worker: type[PeriodicWorker]) -> None:
        """Register a worker class. Raises InvalidWorker, InvalidSchedule or DuplicateWorker."""
        declared_schedule(worker)
        taken = self._workers.get(worker.name)
        if taken is not None:
            raise DuplicateWorker(
                f"There is a worker named {worker.name!r} already ({_path(taken)}), "
                f"so {_path(worker)} cannot be added: give one of them another `name`, or add it once."
            )
        self._workers[worker.name] = worker
        if self._membership is not None:
            self._membership.admit(worker.name)

    def remove(self, name: str) -> None:
        """Unregister a worker here; its rows are kept, and other instances go on running it."""
        self._known(name)
        del self._workers[name]
        if self._membership is not None:
            self._membership.dismiss(name)

    def before_start(self, callback: Callable[[], None], check: Callable[[], None] | None = None) -> None:
        """Have `callback` called (in an app context) before the workers of a serving process start.

        It raises DatabaseNotReady to say that they cannot start yet, and why. `check` raises the same, also where
        `callback` would mend it; it changes nothing, and is called for commands that only look.
        """
        self._before_start.append(callback)
        if check is not None:
            self._checks.append(check)

    # -- starting and stopping -----------------------------------------------------------------

    @property
    def is_started(self) -> bool:
        return self._started_in == os.getpid()

    @property
    def has_served(self) -> bool:
        """Whether this process was asked to serve or to start already; it may have stopped since."""
        return self._served_in == os.getpid()

    def start_under_flask_run(self) -> None:
        """The last line of the factory: `serve` in the process that `flask run` serves with, and nowhere else."""
        serving.start_under_flask_run(self)

    def serve(self) -> bool:
        """What a serving process calls when it begins: prepare, and start unless WORKERS_ENABLED is false.

        A database that is not ready is logged and waited for; the web goes on meanwhile. False if it was called
        (or `start` was) before: of several first requests at once, the others wait here for the one.
        """
        with self._lock:
            if self.has_served:
                return False
            enabled = self.app.config["WORKERS_ENABLED"]
            try:
                self.prepare()
            except (BackgroundError, SQLAlchemyError, OSError) as error:
                log.log(logging.DEBUG if enabled else logging.ERROR, "%s", first_line(error))  # `start` says it too
            if enabled:
                serving.stop_when_told(self)
                self.start()
            else:
                log.info("The background workers are off here: WORKERS_ENABLED is false")
            self._served_in = os.getpid()
            return True

    def prepare(self) -> None:
        """Call the `before_start` callbacks, once; raises what they raise."""
        with self.app.app_context():
            while self._before_start:
                self._before_start[0]()
                del self._before_start[0]

    def check(self) -> None:
        """Call the `check` of every `before_start`; raises what they raise, and changes nothing."""
        with self.app.app_context():
            for check in self._checks:
                check()

    def start(self) -> None:
        """Join the fleet, from now until `stop`. Returns at once; waits in the background for a database."""
        with self._lock:
            if self.is_started:
                return
            from .membership import Membership  # brings APScheduler, for those who start

            self._started_in = self._served_in = os.getpid()
            self.ticks.runs.open()
            self._membership = Membership(self.app, self.ticks, self._workers, self.prepare)
            self._membership.join()

    def tell(self) -> None:
        """Set `stopping` in every run, and begin no other: `stop` follows."""
        self.ticks.runs.tell()

    def hurry(self) -> None:
        """Tell them, and let `stop` wait for them no longer."""
        self.ticks.runs.hurry()

    def stop(self, timeout: float | None = None) -> None:
        """Leave the fleet: tell the runs, wait until `timeout` seconds after that, and hand back the rest."""
        with self._lock:
            if self.is_started and self._membership is not None:
                try:
                    self._membership.leave(self.app.config["WORKERS_SHUTDOWN_SECONDS"] if timeout is None else timeout)
                finally:
                    self._started_in, self._membership = 0, None
            self.ticks.close()

    # -- ticking and steering ------------------------------------------------------------------

    def tick(self, name: str, at: datetime) -> Execution | None:
        """Run the tick of worker `name` at `at` (aware; the latest tick up to then), if nobody has or does.

        Returns what became of it, or None where it was not this call's to run. Waits for the database's clock
        to reach the tick, at most one lease. Raises UnknownWorker, and what the database raises.
        """
        worker = self._known(name)
        if not isinstance(at, datetime) or at.tzinfo is None:
            raise InvalidSchedule(
                f"The tick of {name!r} was asked for at {at!r}; expected an aware datetime: write datetime.now(UTC)."
            )
        self._reopen()
        state = self.ticks.look(worker)
        return self.ticks.run(worker, state.schedule.previous(at.astimezone(UTC)), state)

    def trigger(self, name: str) -> Execution | None:
        """Run worker `name` now, here, whatever its schedule says; None where it is running already.

        A manual run takes no tick away, and a pause does not hold it up. Raises UnknownWorker.
        """
        worker = self._known(name)
        self._reopen()
        return self.ticks.run_now(worker)

    def pause(self, name: str) -> bool:
        """Run no more ticks of `name`, anywhere, until `resume`; what runs goes on. False if paused already."""
        self.ticks.look(self._known(name))
        return self.ticks.settings.pause(name)

    def resume(self, name: str) -> bool:
        """Run the ticks of `name` again, from the next one. False if it was not paused."""
        self.ticks.look(self._known(name))
        return self.ticks.settings.resume(name)

    def reschedule(
        self, name: str, period: timedelta | None = None, cron: str | None = None, timezone: str | None = None
    ) -> bool:
        """Give `name` another schedule, for the whole fleet and across restarts; without one, the declared again.

        A release that declares another schedule replaces it. False if that is its schedule already.
        """
        self.ticks.look(self._known(name))
        declared = period is None and cron is None
        changed = self.ticks.settings.reschedule(
            name, None if declared else make_schedule(name, period, cron, timezone)
        )
        if self._membership is not None:
            self._membership.refresh()
        return changed

    # -- locking -------------------------------------------------------------------------------

    def lock(self, name: str, timeout: float = 0) -> AbstractContextManager[Lock | None]:
        """`with workers.lock("invoice-42") as lock:` gives a Lock, or None while others hold it (`timeout`: seconds).

        One block in the whole fleet has it, until the block ends or its process stops or loses its lease. Not
        re-entrant: the thread that has it gets None at once. Those who wait come in no order, and a run that is told
        to stop waits no longer. Raises InvalidLock, and LockNotAcquired where the database does not answer.
        """
        return self.ticks.locks.hold(name, timeout)

    # -- looking -------------------------------------------------------------------------------

    @property
    def history(self) -> History:
        """What is written down about the executions, for people to read."""
        return History(self.ticks.ledger, self.ticks.instances)

    def why(self, name: str, at: datetime | None = None) -> Answer:
        """What became of the tick that `at` (aware; now, if not given) belongs to, and why: one sentence.

        Answers for a worker that only the database knows, too. Raises UnknownWorker.
        """
        around, worker = self.history.around(name, at), self._workers.get(name)
        if around.state is None:
            worker = self._known(name)
        return why(around, worker, self.app.config["WORKERS_HISTORY_DAYS"])

    def _reopen(self) -> None:
        """After a stop, whoever calls `tick` or `trigger` means it."""
        if not self.is_started:
            self.ticks.runs.open()

    def _known(self, name: str) -> type[PeriodicWorker]:
        try:
            return self._workers[name]
        except (KeyError, TypeError):
            raise UnknownWorker(name, self._workers) from None


def _path(worker: type[PeriodicWorker]) -> str:
    return f"{worker.__module__}.{worker.__qualname__}"


current_workers: "BackgroundWorkerManager" = LocalProxy(  # type: ignore[assignment]
    lambda: current_app.extensions["background_workers"]
)

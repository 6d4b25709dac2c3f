"""The manager: registers workers, starts and stops them, and takes every tick to the ledger."""

import logging
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING

from flask import Flask, current_app
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.local import LocalProxy

from . import models, serving, sqlite
from .context import fence
from .errors import BackgroundError, DuplicateWorker, InvalidSchedule, UnknownWorker, first_line
from .instances import Heartbeat, Instance, Instances, instances_engine
from .ledger import Claim, Ledger, WorkerState
from .runs import Execution, Runs
from .schedule import Schedule, make_schedule
from .worker import PeriodicWorker, declared_schedule

if TYPE_CHECKING:
    from .scheduler import Scheduler

log = logging.getLogger(__name__)

_OFFSET_WARNED = timedelta(seconds=1)
_OFFSET_REARMED = timedelta(milliseconds=20)
_RETRY_SECONDS = (1, 2, 5, 10, 30)
_TICK = timedelta(microseconds=1)


class BackgroundWorkerManager:
    """Runs the workers of one application, once per tick of the fleet that shares its database.

    `add` registers; nothing is opened or started by that. `start` joins the fleet and `stop` leaves it.
    """

    def __init__(self, app: Flask | None = None, db: SQLAlchemy | None = None) -> None:
        self._workers: dict[str, type[PeriodicWorker]] = {}
        self._declared: dict[str, Schedule] = {}
        self._before_start: list[Callable[[], None]] = []
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._states: dict[str, WorkerState] = {}
        self._armed: dict[str, datetime] = {}
        self._scheduler: Scheduler | None = None
        self._heartbeat: Heartbeat | None = None
        self._instance: Instance | None = None
        self._pid = self._begun = 0
        if app is not None and db is not None:
            self.init_app(app, db)

    def init_app(self, app: Flask, db: SQLAlchemy) -> None:
        """Bind to `app` and its initialised `db`: tables, commit fence, `flask workers`; opens no connection."""
        self.app, self.db = app, db
        self.runs = Runs(app, db)
        app.extensions["background_workers"] = self
        for table in models.metadata.tables.values():
            if table.name not in db.metadata.tables:  # an earlier app of this process, with the same `db`
                table.to_metadata(db.metadata)
        with app.app_context():
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
        schedule = declared_schedule(worker)
        taken = self._workers.get(worker.name)
        if taken is not None:
            raise DuplicateWorker(
                f"There is a worker named {worker.name!r} already ({_path(taken)}), "
                f"so {_path(worker)} cannot be added: give one of them another `name`, or add it once."
            )
        self._workers[worker.name] = worker
        self._declared[worker.name] = schedule
        if self._instance is not None and self._scheduler is not None:
            self._scheduler.soon(self._admit, [worker.name])

    def remove(self, name: str) -> None:
        """Unregister a worker here; its rows are kept, and other instances go on running it."""
        self._known(name)
        del self._workers[name], self._declared[name]
        self._armed.pop(name, None)
        if self._scheduler is not None:
            self._scheduler.forget(f"tick:{name}")

    def declared(self, name: str) -> Schedule:
        """The schedule that the class of `name` declares; a `reschedule` may have replaced it."""
        self._known(name)
        return self._declared[name]

    def before_start(self, callback: Callable[[], None]) -> None:
        """Have `callback` called (in an app context) before the workers of a serving process start.

        It raises DatabaseNotReady to say that they cannot start yet, and why.
        """
        self._before_start.append(callback)

    # -- starting and stopping -----------------------------------------------------------------

    @property
    def is_started(self) -> bool:
        return self._scheduler is not None and self._pid == os.getpid()

    @property
    def has_begun(self) -> bool:
        """Whether this process was asked to serve, start or stop already."""
        return self._begun == os.getpid()

    def prepare(self) -> None:
        """Call the `before_start` callbacks, once; raises what they raise."""
        with self.app.app_context():
            while self._before_start:
                self._before_start[0]()
                del self._before_start[0]

    def serve(self) -> None:
        """What a serving process calls when it begins: prepare, and start unless WORKERS_ENABLED is false.

        A database that is not ready is logged and waited for; the web goes on meanwhile.
        """
        self._begun = os.getpid()
        try:
            self.prepare()
        except (BackgroundError, SQLAlchemyError, OSError) as error:
            log.error("%s", first_line(error))
        if self.app.config["WORKERS_ENABLED"]:
            serving.stop_when_told(self)
            self.start()

    def start(self) -> None:
        """Join the fleet, from now until `stop`. Returns at once; waits in the background for a database."""
        with self._lock:
            if self.is_started:
                return
            from .scheduler import Scheduler  # APScheduler is imported by those who start

            self._pid = self._begun = os.getpid()
            self._stopping.clear()
            self.runs.open()
            self._scheduler = Scheduler(self.app.config["WORKERS_THREADS"])
            self._scheduler.start()
            self._scheduler.soon(self._join)

    def start_under_flask_run(self) -> None:
        """The last line of the factory: `serve` in the process that `flask run` serves with, and nowhere else."""
        serving.start_under_flask_run(self)

    def stop(self, timeout: float | None = None) -> None:
        """Leave the fleet: tell the runs, wait at most `timeout` seconds for them, and hand back the rest."""
        with self._lock:
            if not self.is_started or self._scheduler is None:
                self._close()
                return
            limit = self.app.config["WORKERS_SHUTDOWN_SECONDS"] if timeout is None else timeout
            self.runs.tell()
            self._stopping.set()
            self._scheduler.stop()
            try:
                if not self.runs.wait(limit):
                    log.warning("Not everything ended in time; what still runs is handed back")
            finally:
                self.runs.lose()
                self._scheduler = None
                self._leave()
                self._close()

    def _join(self, failures: int = 0) -> None:
        try:
            self.prepare()
            self._instance = self._sign_on()
            self._admit(list(self._workers))
        except (BackgroundError, SQLAlchemyError, OSError) as error:
            log.error("The workers cannot start yet: %s", first_line(error))
            self._later("join", failures, self._join)
            return
        self._heartbeat = Heartbeat(self.app.config["WORKERS_HEARTBEAT_SECONDS"], self._beat, self._beat_failed)
        self._heartbeat.start()
        log.info("Instance %s joined with %d workers", self._instance.name, len(self._workers))

    def _leave(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._instance is not None:
            try:
                self.instances.sign_off(self._instance)
                log.info("Instance %s left", self._instance.name)
            except SQLAlchemyError as error:
                log.warning("Could not sign off, so the lease must run out first: %s", first_line(error))
        self._heartbeat = self._instance = None

    def _close(self) -> None:
        """Close the engine's own connections; they open again when they are asked for."""
        for opened in ("ledger", "instances"):
            if opened in self.__dict__:
                self.__dict__[opened].engine.dispose()

    def _sign_on(self) -> Instance:
        instance = Instance(timedelta(seconds=self.app.config["WORKERS_LEASE_SECONDS"]))
        self.instances.beat(instance)
        return instance

    def _admit(self, names: list[str]) -> None:
        self.ledger.register({name: self._declared[name] for name in names})
        self._refresh()
        for name in names:
            worker = self._workers[name]
            if worker.enabled:
                now = self._now()
                self._arm(name, self._states[name].schedule.previous(now) - _TICK if worker.catch_up else now)

    # -- the heartbeat -------------------------------------------------------------------------

    def _beat(self) -> None:
        assert self._instance is not None  # noqa: S101 - the heartbeat begins after signing on
        instance = self._instance
        if not instance.is_alive:
            log.warning("Instance %s could not renew its lease in time; it begins anew", instance.name)
            self.runs.lose(instance)
            self._instance = instance = Instance(instance.lease, clock_offset=instance.clock_offset)
        offset = instance.clock_offset
        self.instances.beat(instance)
        if abs(instance.clock_offset) > _OFFSET_WARNED >= abs(offset):
            log.warning("This host's clock is %+.1f s off the database's", -instance.clock_offset.total_seconds())
        self._refresh(rearm=abs(instance.clock_offset - offset) > _OFFSET_REARMED)

    def _beat_failed(self, error: SQLAlchemyError) -> None:
        log.warning("No heartbeat: %s", first_line(error))
        if self._instance is not None and not self._instance.is_alive:
            self.runs.lose(self._instance)

    def _refresh(self, rearm: bool = False) -> None:
        """Take in what the fleet decided: schedules, claims whose instance is gone, ticks to be claimed again."""
        before, states = self._states, self.ledger.states()
        if self._recover(states.values()):
            states = self.ledger.states()
        self._states = states
        for name in self._armed.keys() & states.keys():
            if before[name].schedule != states[name].schedule:
                self._arm(name, after=states[name].scheduled_at)
            elif rearm:
                self._wake(name, self._armed[name])
        for state in states.values():
            if state.pending_tick and not state.paused_at and state.name in self._workers and self._scheduler:
                self._scheduler.soon(self._run_pending, state.name, state.pending_tick)

    def _recover(self, states: Iterable[WorkerState]) -> bool:
        """End the claims whose instance is gone; True if there were any. A worker unknown here is left alone."""
        held = {
            state.name: state.instance
            for state in states
            if state.instance and state.name in self._workers and state.instance != getattr(self._instance, "id", None)
        }
        gone = self.instances.gone(set(held.values())) if held else {}
        for state in states:
            if held.get(state.name) in gone and state.running:
                self._take_back(self._workers[state.name], state.running, state, gone[held[state.name]])
        return bool(gone)

    def _take_back(self, worker: type[PeriodicWorker], claim: Claim, state: WorkerState, signed_off: bool) -> None:
        if signed_off:
            self.ledger.end(claim, "handed back", f"{state.instance_name} stopped", claim.attempt)
            return
        again = worker.on_lost == "retry" and claim.attempt < worker.max_attempts
        reason = f"{state.instance_name} stopped renewing its lease"
        if self.ledger.end(claim, "lost", reason, claim.attempt + 1 if again else None):
            what = f"attempt {claim.attempt + 1} follows" if again else "it is given up"
            log.warning("%s: lost the tick %s, %s: %s", claim.worker, claim.tick.isoformat(), reason, what)

    # -- ticking -------------------------------------------------------------------------------

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
        state = self._look(worker)
        return self._tick(worker, state.schedule.previous(at.astimezone(UTC)), state)

    def trigger(self, name: str) -> Execution | None:
        """Run worker `name` now, here, whatever its schedule says; None where it is running already.

        A manual run takes no tick away, and a pause does not hold it up. Raises UnknownWorker.
        """
        worker = self._known(name)
        self._reopen()
        state = self._cleared(worker, self._look(worker))
        return self._run(worker, partial(self.ledger.claim_manual, name, state.clock))

    def pause(self, name: str) -> bool:
        """Run no more ticks of `name`, anywhere, until `resume`; what runs goes on. False if paused already."""
        self._look(self._known(name))
        return self.ledger.pause(name)

    def resume(self, name: str) -> bool:
        """Run the ticks of `name` again, from the next one. False if it was not paused."""
        self._look(self._known(name))
        return self.ledger.resume(name)

    def reschedule(
        self, name: str, period: timedelta | None = None, cron: str | None = None, timezone: str | None = None
    ) -> bool:
        """Give `name` another schedule, for the whole fleet and across restarts; without one, the declared again.

        A release that declares another schedule replaces it. False if that is its schedule already.
        """
        self._look(self._known(name))
        back = period is None and cron is None
        changed = self.ledger.reschedule(name, None if back else make_schedule(name, period, cron, timezone))
        if self._instance is not None:
            self._refresh()
        return changed

    def _tick(self, worker: type[PeriodicWorker], tick: datetime, state: WorkerState) -> Execution | None:
        name = worker.name
        while not self.runs.is_stopping:
            state = self._cleared(worker, self._when_due(worker, tick, state))
            if state.clock < tick or (state.mark is not None and state.mark >= tick):
                log.debug("%s: the tick %s is not due yet, or somebody was here before", name, tick.isoformat())
                return None
            if state.paused_at or state.running:
                self.ledger.skip(name, tick, _obstacle(state))
                log.debug("%s: no run for the tick %s: %s", name, tick.isoformat(), _obstacle(state))
                return None
            execution = self._run(worker, partial(self.ledger.claim, name, tick, state.schedule))
            if execution:
                return execution
            seen, state = state, self._look(worker)
            if state.schedule != seen.schedule and state.scheduled_at <= tick:
                log.debug("%s: %s is no tick of %s", name, tick.isoformat(), state.schedule)
                return None
        return None

    def _cleared(self, worker: type[PeriodicWorker], state: WorkerState) -> WorkerState:
        """Out of the way of a new tick: a claim whose instance is gone, and an older tick that is to be run again."""
        if state.running and self._recover([state]):
            state = self._look(worker)
        if state.pending_tick and not state.paused_at:
            self._run_pending(worker.name, state.pending_tick)
            state = self._look(worker)
        return state

    def _when_due(self, worker: type[PeriodicWorker], tick: datetime, state: WorkerState) -> WorkerState:
        """Wait, at most a lease, until the database's clock reaches `tick`; rounding it would be early or late."""
        lease = timedelta(seconds=self.app.config["WORKERS_LEASE_SECONDS"])
        while state.clock < tick <= state.clock + lease and not self._stopping.is_set():
            self._stopping.wait((tick - state.clock).total_seconds())
            state = self._look(worker)
        return state

    def _reopen(self) -> None:
        """After a stop, whoever calls `tick` or `trigger` means it."""
        if not self.is_started:
            self._stopping.clear()
            self.runs.open()

    def _run(
        self, worker: type[PeriodicWorker], claim_with: Callable[[tuple[str, str]], Claim | None]
    ) -> Execution | None:
        with self._present() as instance:
            if self.runs.is_stopping:
                return None
            claim = claim_with((instance.id, instance.name))
            return self.runs.run(worker, claim, self.ledger, instance) if claim else None

    def _run_pending(self, name: str, tick: datetime) -> Execution | None:
        worker = self._known(name)
        return self._run(worker, partial(self.ledger.claim_pending, name, tick))

    @contextmanager
    def _present(self) -> Iterator[Instance]:
        """This process's instance; where it was not started (a command, a test) one that lives as long as the block."""
        if self._instance is not None and self.is_started:
            yield self._instance
            return
        instance = self._sign_on()
        heartbeat = Heartbeat(
            self.app.config["WORKERS_HEARTBEAT_SECONDS"],
            lambda: self.instances.beat(instance) if instance.is_alive else None,
            lambda error: log.warning("No heartbeat: %s", first_line(error)),
        )
        heartbeat.start()
        try:
            yield instance
        finally:
            heartbeat.stop()
            self.instances.sign_off(instance)

    def _look(self, worker: type[PeriodicWorker]) -> WorkerState:
        state = self.ledger.look(worker.name)
        if state is None:
            self.ledger.register({worker.name: self._declared[worker.name]})
            state = self.ledger.look(worker.name)
            assert state is not None  # noqa: S101 - the row was just written, and rows are never deleted
        return state

    def _pass(self, name: str, tick: datetime, why: str) -> None:
        """Nobody's fault, and the usual end of a tick for all instances but one."""
        log.debug("%s: not running the tick %s: %s", name, tick.isoformat(), why)

    # -- waking --------------------------------------------------------------------------------

    def _arm(self, name: str, after: datetime) -> None:
        """Wake up at the first tick after `after`; of several that are due already, only at the latest."""
        schedule = self._states[name].schedule
        self._wake(name, max(schedule.next(after), schedule.previous(self._now())))

    def _wake(self, name: str, tick: datetime) -> None:
        self._armed[name] = tick
        offset = self._instance.clock_offset if self._instance else timedelta()
        late = random.uniform(0, self._workers[name].jitter.total_seconds())  # noqa: S311 - spreads wake-ups
        if self._scheduler is not None:
            self._scheduler.at(tick - offset + timedelta(seconds=late), f"tick:{name}", self._fire, name, tick)

    def _fire(self, name: str, tick: datetime, failures: int = 0) -> None:
        if self._stopping.is_set() or name not in self._workers:
            return
        if not failures:
            self._arm(name, after=tick)
        try:
            worker = self._workers[name]
            self._tick(worker, tick, self._look(worker))
        except SQLAlchemyError as error:
            log.warning("%s: cannot claim the tick %s: %s", name, tick.isoformat(), first_line(error))
            self._later(f"retry:{name}", failures, self._fire, name, tick)

    def _later(self, key: str, failures: int, function: Callable[..., None], *args: object) -> None:
        delay = _RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)]
        if self._scheduler is not None and not self._stopping.is_set():
            when = datetime.now(UTC) + timedelta(seconds=delay)
            self._scheduler.at(when, key, function, *args, failures + 1)

    def _now(self) -> datetime:
        return self._instance.database_time() if self._instance else datetime.now(UTC)

    # -- what is opened late -------------------------------------------------------------------

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self._own_engine())

    @cached_property
    def instances(self) -> Instances:
        with self.app.app_context():
            return Instances(instances_engine(self.db.engine))

    def _own_engine(self) -> Engine:
        """Connections of the engine's own, so that a claim neither joins nor waits for the application's."""
        with self.app.app_context():
            shared = self.db.engine
        if sqlite.is_in_memory(shared):
            return shared
        if shared.dialect.name == "sqlite":
            engine = create_engine(shared.url)
            sqlite.prepare(engine)
            return engine
        return create_engine(shared.url, isolation_level="READ COMMITTED", pool_size=2, max_overflow=-1)

    def _known(self, name: str) -> type[PeriodicWorker]:
        try:
            return self._workers[name]
        except (KeyError, TypeError):
            raise UnknownWorker(name, self._workers) from None


def _obstacle(state: WorkerState) -> str:
    if state.paused_at:
        return f"paused since {state.paused_at.isoformat(timespec='seconds')}"
    tick = state.running.tick.isoformat() if state.running else ""
    return f"still running the tick {tick} on {state.instance_name}"


def _path(worker: type[PeriodicWorker]) -> str:
    return f"{worker.__module__}.{worker.__qualname__}"


current_workers: "BackgroundWorkerManager" = LocalProxy(  # type: ignore[assignment]
    lambda: current_app.extensions["background_workers"]
)

"""One tick's way: wait for the database's clock, clear what is in the way, claim, run. There is no other way."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import cached_property, partial

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, create_engine

from . import sqlite
from .errors import first_line
from .instances import Heartbeat, Instance, Instances, instances_engine
from .ledger import Claim, Ledger, WorkerState
from .runs import Execution, Runs
from .worker import PeriodicWorker, declared_schedule

log = logging.getLogger(__name__)


class Ticks:
    """Takes ticks of `workers` (by name) to the ledger, and runs those that this process gets."""

    def __init__(self, app: Flask, db: SQLAlchemy, workers: dict[str, type[PeriodicWorker]]) -> None:
        self._app, self._db, self._workers = app, db, workers
        self.runs = Runs(app, db)
        self.instance: Instance | None = None
        """This process's, from joining the fleet to leaving it."""

    # -- the way of a tick ---------------------------------------------------------------------

    def run(self, worker: type[PeriodicWorker], tick: datetime, state: WorkerState) -> Execution | None:
        """Run `tick`, seen from the lately read `state`, if nobody has or does; None where it is not ours to run."""
        name = worker.name
        while not self.runs.stopping.is_set():
            state, again = self._cleared(worker, self._when_due(worker, tick, state))
            if again and again.claim.tick == tick:
                return again
            if state.clock < tick or (state.mark is not None and state.mark >= tick):
                log.debug("%s: the tick %s is not due yet, or somebody was here before", name, tick.isoformat())
                return None
            if state.paused_at or state.running:
                self.ledger.skip(name, tick, _obstacle(state))
                log.debug("%s: no run for the tick %s: %s", name, tick.isoformat(), _obstacle(state))
                return None
            execution = self._claim_and_run(worker, partial(self.ledger.claim, name, tick, state.schedule))
            if execution:
                return execution
            seen, state = state, self.look(worker)
            if state.schedule != seen.schedule and state.scheduled_at <= tick:
                log.debug("%s: %s is no tick of %s", name, tick.isoformat(), state.schedule)
                return None
        return None

    def run_now(self, worker: type[PeriodicWorker]) -> Execution | None:
        """A run that no schedule asked for; None where the worker is running already."""
        state, _ = self._cleared(worker, self.look(worker))
        return self._claim_and_run(worker, partial(self.ledger.claim_manual, worker.name, state.clock))

    def run_pending(self, worker: type[PeriodicWorker], tick: datetime) -> Execution | None:
        """A tick that was lost or handed back, if nobody else has taken it meanwhile."""
        return self._claim_and_run(worker, partial(self.ledger.claim_pending, worker.name, tick))

    def look(self, worker: type[PeriodicWorker]) -> WorkerState:
        """The worker's state, in one read once its row is there."""
        state = self.ledger.look(worker.name)
        if state is None:
            self.ledger.register({worker.name: declared_schedule(worker)})
            state = self.ledger.look(worker.name)
            assert state is not None  # noqa: S101 - the row was just written, and rows are never deleted
        return state

    def _when_due(self, worker: type[PeriodicWorker], tick: datetime, state: WorkerState) -> WorkerState:
        """Wait, at most a lease, until the database's clock reaches `tick`; rounding it would be early or late."""
        lease = timedelta(seconds=self._app.config["WORKERS_LEASE_SECONDS"])
        while state.clock < tick <= state.clock + lease and not self.runs.stopping.is_set():
            self.runs.stopping.wait((tick - state.clock).total_seconds())
            state = self.look(worker)
        return state

    def _cleared(self, worker: type[PeriodicWorker], state: WorkerState) -> tuple[WorkerState, Execution | None]:
        """Out of the way of a new tick: a claim whose instance is gone, and a tick that is to be run again."""
        again = None
        if state.running and self.recover([state]):
            state = self.look(worker)
        if state.pending_tick and not state.paused_at:
            again = self.run_pending(worker, state.pending_tick)
            state = self.look(worker)
        return state, again

    def _claim_and_run(
        self, worker: type[PeriodicWorker], claim_with: Callable[[tuple[str, str]], Claim | None]
    ) -> Execution | None:
        with self._present() as instance:
            if self.runs.stopping.is_set():
                return None
            claim = claim_with((instance.id, instance.name))
            return self.runs.run(worker, claim, self.ledger, instance) if claim else None

    # -- who runs it ---------------------------------------------------------------------------

    def sign_on(self) -> Instance:
        """A new life of this process, known to the fleet."""
        instance = Instance(timedelta(seconds=self._app.config["WORKERS_LEASE_SECONDS"]))
        self.instances.beat(instance)
        return instance

    @contextmanager
    def _present(self) -> Iterator[Instance]:
        """This process's instance; where it has not joined (a command, a test) one that lives as long as the block."""
        if self.instance is not None:
            yield self.instance
            return
        instance = self.sign_on()
        heartbeat = Heartbeat(
            self._app.config["WORKERS_HEARTBEAT_SECONDS"],
            lambda: self.instances.beat(instance) if instance.is_alive else None,
            lambda error: log.warning("No heartbeat: %s", first_line(error)),
        )
        heartbeat.start()
        try:
            yield instance
        finally:
            heartbeat.stop()
            self.instances.sign_off(instance)

    # -- those who are gone --------------------------------------------------------------------

    def recover(self, states: Iterable[WorkerState]) -> bool:
        """End the claims whose instance is gone; True if there were any. A worker unknown here is left alone."""
        own = self.instance.id if self.instance else None
        held = [state for state in states if state.running and state.name in self._workers and state.instance != own]
        gone = self.instances.gone({str(state.instance) for state in held}) if held else {}
        for state in held:
            if state.running and state.instance in gone:
                self._take_back(self._workers[state.name], state.running, state, gone[state.instance])
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

    # -- connections of the engine's own, so that a claim neither joins nor waits for the application's ---

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self._own_engine())

    @cached_property
    def instances(self) -> Instances:
        with self._app.app_context():
            return Instances(instances_engine(self._db.engine))

    def close(self) -> None:
        """Close the connections; they open again when they are asked for."""
        for opened in ("ledger", "instances"):
            if opened in self.__dict__:
                self.__dict__[opened].engine.dispose()

    def _own_engine(self) -> Engine:
        with self._app.app_context():
            shared = self._db.engine
        if sqlite.is_in_memory(shared):
            return shared
        if shared.dialect.name == "sqlite":
            engine = create_engine(shared.url)
            sqlite.prepare(engine)
            return engine
        return create_engine(shared.url, isolation_level="READ COMMITTED", pool_size=2, max_overflow=-1)


def _obstacle(state: WorkerState) -> str:
    if state.paused_at:
        return f"paused since {state.paused_at.isoformat(timespec='seconds')}"
    tick = state.running.tick.isoformat() if state.running else ""
    return f"still running the tick {tick} on {state.instance_name}"

"""One tick's way: claim and run it; else wait for the database's clock, clear what is in the way, and claim again.

There is no other way.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import SQLAlchemyError

from . import sqlite
from .claiming import DECIDED, NotClaimed
from .connections import Connections, again_if_stale, made_once
from .errors import first_line
from .healing import Healing
from .instances import LEASE_IS_OVER, Heartbeat, Instance, Instances
from .ledger import Claim, Ledger, WorkerState
from .listener import ring
from .locks import Locks
from .logs import Outage, logger_of
from .mending import GONE, Mending
from .messages import Messages
from .outages import Outages
from .runs import Execution, Runs, follows
from .schedule import MICROSECOND
from .sessions import schema_of
from .signals import execution_handed_back, execution_lost, send
from .steering import Steering
from .worker import PeriodicWorker, attempt_after, begins, declared_schedule

log = logger_of(__name__)

_UNKNOWN = "its claim has neither an id nor an execution, so the instance that runs it is unknown"


class Ticks:
    """Takes ticks of `workers` (by name) to the ledger, and runs those that this process gets."""

    def __init__(self, app: Flask, db: SQLAlchemy, workers: dict[str, type[PeriodicWorker]], outages: Outages) -> None:
        self._app, self._db, self._workers, self.outages = app, db, workers, outages
        self.runs = Runs(app, db, outages)
        self.instance: Instance | None = None
        """This process's, from joining the fleet to leaving it."""
        self.postponed: Callable[[str, datetime, str], None] = lambda name, tick, schedule: None
        """Called with a tick that could not be run yet, and was not skipped; a member of the fleet tries it again."""

    @property
    def _lease(self) -> timedelta:
        return timedelta(seconds=self._app.config["WORKERS_LEASE_SECONDS"])

    # -- the way of a tick ---------------------------------------------------------------------

    def run(
        self, worker: type[PeriodicWorker], tick: datetime, schedule: str, state: WorkerState | None = None
    ) -> Execution | None:
        """Run `tick` of `schedule`, unless an instance has or does. None if it is not this instance's to run.

        Losing costs one statement. Pass `state` to have pending work checked first: a tick that was lost or handed back
        is not above the mark, and must not be mistaken for decided.
        """
        name, why = worker.name, "stopping"
        while not self.runs.stopping.is_set():
            if (instance := self.instance) is not None and not instance.is_alive:
                why = "this instance has lost its lease"
                self.postponed(name, tick, schedule)
                break
            if state is not None:
                state, again = self._cleared(worker, self._when_due(worker, tick, state))
                if again and again.claim.tick == tick:
                    return again
                if answer := _why_not(tick, state) or self._passed_over(worker, tick, state):
                    why = answer
                    break
                schedule = state.schedule_text
            claimed = self._claim_and_run(worker, partial(self.ledger.claim, name, tick, schedule))
            if claimed:
                return claimed
            if claimed is DECIDED:
                why = DECIDED.value
                break
            state = self.look(worker)
        log.debug("%s: not running the tick %s: %s", name, tick.isoformat(), why)
        return None

    def _passed_over(self, worker: type[PeriodicWorker], tick: datetime, state: WorkerState) -> str | None:
        """Return why `tick` does not run now. None if it may be claimed."""
        if self.healing.pass_over(state, tick, partial(attempt_after, worker)):
            return "it ran while the database's clock was ahead"
        return self._skipped_or_postponed(tick, state)

    def _skipped_or_postponed(self, tick: datetime, state: WorkerState) -> str | None:
        """Why `tick` is skipped now, or tried again later; None where it may be claimed."""
        why = _obstacle(state)
        if why and self._postpone(tick, state):
            return why
        self.ledger.miss(state, tick)
        return why if why and self.ledger.skip(state.name, tick, state.schedule_text, why) else None

    def _postpone(self, tick: datetime, state: WorkerState) -> bool:
        """A manual run takes no tick away: one that is due meanwhile is tried again until that has ended."""
        if state.paused_at or state.running is None or state.running.trigger != "manual":
            return False
        self.postponed(state.name, tick, state.schedule_text)
        return True

    def run_now(self, worker: type[PeriodicWorker]) -> Execution | None:
        """A run that no schedule asked for; None where the worker is running already."""
        state, _ = self._cleared(worker, self.look(worker))
        return self._claim_and_run(worker, partial(self.ledger.claim_manual, worker.name, state.clock)) or None

    def run_pending(self, worker: type[PeriodicWorker], tick: datetime) -> Execution | None:
        """Run a tick that was lost or handed back, unless another instance has taken it meanwhile."""
        return self._claim_and_run(worker, partial(self.ledger.claim_pending, worker.name, tick)) or None

    def look(self, worker: type[PeriodicWorker], asked: datetime | None = None) -> WorkerState:
        """Read the worker's state. If it has no row, make the row first.

        A worker without a row begins with its latest tick up to `asked`, if a caller asks for that tick.
        """
        state = self.ledger.look(worker.name)
        if state is None:
            schedule, first = declared_schedule(worker), begins([worker])
            if asked is not None:
                first = {worker.name: schedule.previous(asked) - MICROSECOND, **first}
            self.steering.register({worker.name: schedule}, first=first)
            state = self.ledger.look(worker.name)
            assert state is not None  # noqa: S101 - the row was just written
        return state

    def _when_due(self, worker: type[PeriodicWorker], tick: datetime, state: WorkerState) -> WorkerState:
        """Wait, at most a lease, until the database's clock reaches `tick`; rounding it would be early or late."""
        while state.clock < tick <= state.clock + self._lease and not self.runs.stopping.is_set():
            self.runs.stopping.wait((tick - state.clock).total_seconds())
            state = self.look(worker)
        return state

    def _cleared(self, worker: type[PeriodicWorker], state: WorkerState) -> tuple[WorkerState, Execution | None]:
        """Clear the way of a new tick: a claim whose instance is gone, and a tick that must run again."""
        state, again = self.freed(worker, state), None
        if state.owed:
            again = self.run_pending(worker, state.owed)
            state = self.look(worker)
        return state, again

    def _claim_and_run(
        self, worker: type[PeriodicWorker], claim_with: Callable[[tuple[str, str]], Claim | NotClaimed | None]
    ) -> Execution | NotClaimed | None:
        with self.present() as instance:
            if self.runs.stopping.is_set() or not instance.is_alive:
                return None
            claim = claim_with((instance.id, instance.name))
            return self.runs.run(worker, claim, self.ledger, instance) if isinstance(claim, Claim) else claim

    # -- who runs it ---------------------------------------------------------------------------

    def sign_on(self) -> Instance:
        """A new life of this process, known to the fleet."""
        instance = Instance(self._lease, release=self._app.config.get("RELEASE"))
        self.instances.renew(instance)
        return instance

    def sign_off(self, instance: Instance, forget: bool = False) -> None:
        """The end of that life; what it still holds counts as handed back, or as lost if its lease is over."""
        if not instance.is_alive:
            return
        try:
            if forget:
                self.instances.forget(instance)
            else:
                self.instances.sign_off(instance)
                ring(self.connections)
        except SQLAlchemyError as error:
            log.warning("Could not sign off, so the lease must run out first: %s", first_line(error))

    def lose(self, instance: Instance) -> None:
        """The lease of `instance` ran out: tell its runs, and let nothing wait any longer for an answer."""
        self.runs.lose(LEASE_IS_OVER, instance)
        self.connections.cut()

    @contextmanager
    def present(self, forget: bool = False) -> Iterator[Instance]:
        """This process's instance; where it has not joined (a command, a test) one that lives as long as the block.

        With `forget` nothing is kept of that: for what no execution tells of.
        """
        if (instance := self.instance) is not None:
            yield instance
            return
        instance = again_if_stale(self.sign_on)
        outage = Outage()

        def beat() -> None:
            if instance.is_alive:
                self.instances.renew(instance)
                outage.ended()

        heartbeat = Heartbeat(
            self._app.config["WORKERS_HEARTBEAT_SECONDS"],
            beat,
            lambda error: log.log(outage.level(), "No heartbeat: %s", first_line(error)),
            lambda: instance.deadline,
            lambda: self.lose(instance),
        )
        heartbeat.start()
        try:
            yield instance
        finally:
            heartbeat.stop()
            self.sign_off(instance, forget)

    # -- claims without an instance -------------------------------------------------------------

    def freed(self, worker: type[PeriodicWorker], state: WorkerState) -> WorkerState:
        """Return `state`, or the one after mending its rows and taking back a claim that no instance runs."""
        if state.is_damaged:
            self._mend(worker, state)
            state = self.look(worker)
        return self.look(worker) if state.running and self.recover([state]) else state

    def _mend(self, worker: type[PeriodicWorker], state: WorkerState) -> None:
        if state.is_bare and state.running:
            if state.running.id is not None:
                self.mending.restore(state.running)
            elif self.ledger.end(state.running, "lost", _UNKNOWN):
                self._tell_of_loss(state.running, _UNKNOWN, None)
        for claim in self.mending.strays(worker.name) if state.has_strays else ():
            ended, again = self.mending.end_stray(claim, attempt_after(worker, claim.attempt))
            if ended:
                self._tell_of_loss(claim, GONE, again)

    def _tell_of_loss(self, claim: Claim, reason: str, again: int | None) -> None:
        log.warning("%s: lost the tick %s, %s: %s", claim.worker, claim.tick.isoformat(), reason, follows(again))
        send(self._app, execution_lost, claim=claim, reason=reason)

    def recover(self, states: Collection[WorkerState]) -> bool:
        """End the claims that no instance runs. True if there were any."""
        gone = self.gone(states)
        for state in states:
            if state.name in gone and state.running:
                self._take_back(self._workers[state.name], state.running, state, gone[state.name])
        return bool(gone)

    def gone(self, states: Collection[WorkerState]) -> dict[str, bool]:
        """Return the workers with a claim that no instance runs: True if it was handed back, False if it was lost.

        Only reads. A worker unknown to this release is left alone.
        """
        held = [state for state in states if state.running and state.name in self._workers]
        # After its lease is over, this instance is judged as any other: a heartbeat of its next life may come later.
        own = instance.id if (instance := self.instance) and instance.is_alive else None
        gone = self.instances.gone({str(state.instance) for state in held} - {own}) if held else {}
        return {
            state.name: gone.get(str(state.instance), True)
            for state in held
            if state.instance in gone or (state.instance == own and self._is_stranded(state))
        }

    def _is_stranded(self, state: WorkerState) -> bool:
        """Whether this instance holds a claim that it does not run: the reply to the claim got lost."""
        if state.running is None or state.started_at is None or self.runs.has(state.running):
            return False
        return abs(state.clock - state.started_at) > self._lease  # the clock may have been ahead at the claim

    def _take_back(self, worker: type[PeriodicWorker], claim: Claim, state: WorkerState, signed_off: bool) -> None:
        if signed_off:
            is_own = (own := self.instance) is not None and state.instance == own.id  # else it may have run it in part
            reason = f"{state.instance_name} {'did not run it' if is_own else 'signed off before the run ended'}"
            if self.ledger.end(claim, "handed back", reason, claim.attempt):
                send(self._app, execution_handed_back, claim=claim, reason=reason)
            return
        again = attempt_after(worker, claim.attempt)
        reason = f"{state.instance_name} {self.instances.ending(str(state.instance))}"
        if self.ledger.end(claim, "lost", reason, again):
            self._tell_of_loss(claim, reason, again)

    # -- what it asks --------------------------------------------------------------------------

    @made_once
    def connections(self) -> Connections:
        with self._app.app_context():
            return Connections(self._db.engine, self._lease.total_seconds(), schema_of(self._db), self.outages)

    @made_once
    def ledger(self) -> Ledger:
        connections = self.connections
        return Ledger(connections.claims, self._lease.total_seconds(), partial(ring, connections), connections.sessions)

    @made_once
    def healing(self) -> Healing:
        return Healing(self.ledger, timedelta(days=self._app.config["WORKERS_HISTORY_DAYS"]))

    @made_once
    def steering(self) -> Steering:
        return Steering(self.ledger)

    @made_once
    def mending(self) -> Mending:
        return Mending(self.ledger)

    @made_once
    def messages(self) -> Messages:
        return Messages(self.ledger)

    @made_once
    def instances(self) -> Instances:
        return Instances(self.connections.heartbeats, self._lease.total_seconds())

    @made_once
    def locks(self) -> Locks:
        present = partial(self.present, forget=True)
        return Locks(self.connections.locks, self.instances, present, self._app.config["LOCK_PREFIX"])

    def write(self) -> None:
        """Change nothing, and raise the errors of a database that takes no writes."""
        self.instances.write()
        if self.connections.heartbeat_file:  # on SQLite the instances are not in the main database's file
            sqlite.try_to_write(self.ledger.engine)

    def close(self) -> None:
        """Close the connections; they open again when they are asked for."""
        if "connections" in self.__dict__:
            self.connections.close()


def _why_not(tick: datetime, state: WorkerState) -> str | None:
    """Return why no instance may claim `tick`, or None."""
    if state.clock < tick:
        return "it is not due yet"
    if state.mark is not None and state.mark >= tick:
        return DECIDED.value
    if state.pending_tick and not (state.owed or state.paused_at):
        return f"the tick {state.pending_tick.isoformat()} comes before it, and is not due any more"
    if state.scheduled_at <= tick != state.schedule.previous(tick):
        return f"it is not a tick of the schedule in force, {state.schedule}"
    return None


def _obstacle(state: WorkerState) -> str | None:
    if state.paused_at:
        return f"paused since {state.paused_at.isoformat(timespec='seconds')}"
    if state.running:
        return f"still running the tick {state.running.tick.isoformat()} on {state.instance_name}"
    return None

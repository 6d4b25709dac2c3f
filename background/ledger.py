"""Who runs what. Each race is one statement; those about one tick are in claiming.py."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    CursorResult,
    Engine,
    Row,
    and_,
    bindparam,
    func,
    insert,
    null,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from . import totals
from .claiming import IS_FREE, MISS, NEW_TOKEN, SKIP, ClaimsOnPostgreSQL, ClaimsOnSQLite, NotClaimed, at_tick, start
from .clock import now, single_statements
from .errors import ClaimLost
from .models import executions, workers
from .schedule import MICROSECOND, Schedule, parse_schedule

Notes = Mapping[str, Any]
NOTHING: Notes = MappingProxyType({})

_LOCK_SECONDS = 1.0  # whoever waits longer for a worker's row gives its thread to another worker, and tries again


@dataclass(frozen=True)
class Claim:
    """The right to run one tick of one worker, as long as `token` is the worker's `running` one."""

    worker: str
    tick: datetime
    attempt: int
    token: int
    trigger: str
    execution: int

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt at this tick, and for no other tick."""
        kind = "" if self.trigger == "schedule" else f"{self.trigger}:"
        return f"{self.worker}:{kind}{self.tick.isoformat()}"


@dataclass(frozen=True)
class WorkerState:
    """One worker's row, the claim in force (if any) and the database's clock, all of one read."""

    name: str
    clock: datetime
    mark: datetime | None
    schedule_text: str
    scheduled_at: datetime
    declared: str
    declared_by: str | None
    paused_at: datetime | None
    pending_tick: datetime | None
    pending_trigger: str | None
    running: Claim | None
    started_at: datetime | None
    progress_done: float | None
    progress_total: float | None
    instance: str | None
    instance_name: str | None

    @property
    def overridden(self) -> bool:
        """Whether `reschedule` put another schedule in force than the declared one."""
        return self.schedule_text != self.declared

    @property
    def owed(self) -> datetime | None:
        """The tick that is to be run before any other.

        Unless somebody asked for it by hand, a pause holds it up, and a clock that was set back: until it is due again.
        """
        tick = self.pending_tick
        is_held_up = self.paused_at or (tick and tick > self.clock)
        return None if is_held_up and self.pending_trigger != "manual" else tick

    @property
    def schedule(self) -> Schedule:
        """Raises InvalidSchedule for a text that this release cannot read."""
        return parse_schedule(self.schedule_text)


class Ledger:
    """The worker and execution rows of one database, written on the engine's own connections.

    `ring` is called once there is something in them for whoever comes first.
    """

    def __init__(self, engine: Engine, lease: float, ring: Callable[[], None]) -> None:
        self.engine, self.ring = engine, ring
        self._single = single_statements(engine)
        self.idle: tuple[ColumnElement[str], ...] = ()
        self._limits: tuple[ColumnElement[str], ...] = ()
        self.insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert
        self._claims: ClaimsOnSQLite | ClaimsOnPostgreSQL
        if engine.dialect.name == "sqlite":
            self._claims = ClaimsOnSQLite(engine)
        else:
            # No transaction that holds a worker's row outlasts a lease, even if its process is frozen in the middle of
            # it: PostgreSQL ends it. Set for one transaction, a run's last too: a pooler may stand in between.
            self.idle = (_limit("idle_in_transaction_session_timeout", lease),)
            waiting = _limit("lock_timeout", min(lease, _LOCK_SECONDS))
            self._limits = (*self.idle, waiting, _limit("statement_timeout", lease))
            self._claims = ClaimsOnPostgreSQL(engine, self._limits, self.begin)

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction that neither waits long for a row nor holds one for longer than a lease."""
        with self.engine.begin() as connection:
            if self._limits:
                connection.execute(select(*self._limits))
            yield connection

    # -- what is known -------------------------------------------------------------------------

    def look(self, name: str) -> WorkerState | None:
        """One read that takes no lock; None where nobody registered the worker yet."""
        with self._single.connect() as connection:
            row = connection.execute(_one_state, {"name": name}).one_or_none()
        return _state(row) if row else None

    def states(self, names: Collection[str] | None = None) -> dict[str, WorkerState]:
        """The state of every worker (or of those of `names`), of this release or not, in one read."""
        query = _states if names is None else _states.where(workers.c.name.in_(names))
        with self._single.connect() as connection:
            return {row.name: _state(row) for row in connection.execute(query)}

    # -- claiming ------------------------------------------------------------------------------

    def claim(self, name: str, tick: datetime, schedule: str, instance: tuple[str, str]) -> Claim | NotClaimed:
        """Claim `tick`, or say why not.

        Others may be here: every instance that knows this worker, at the same instant, and late ones.
        A lock puts them in a line: the row's on PostgreSQL, and only while the tick is open; the only one on SQLite.
        The first raises the mark, and the rest find it raised, by the statement that they waited with.
        """
        started = self._claims.tick(at_tick(name, tick, schedule) | _values(name, tick, instance))
        return Claim(name, tick, *started) if started else started

    def claim_pending(self, name: str, tick: datetime, instance: tuple[str, str]) -> Claim | None:
        """Claim a tick that was lost, handed back or requested. Others may be here: all that saw it pending."""
        started = self._claims.pending(_values(name, tick, instance))
        return Claim(name, tick, *started) if started else None

    def claim_manual(self, name: str, tick: datetime, instance: tuple[str, str]) -> Claim | None:
        """Claim a run that no schedule asked for; `tick` is the moment of asking. The mark stays where it is.

        Others may be here: a second click, or the scheduled tick of the same moment; one of them waits its turn.
        """
        with self.begin() as connection:
            token = connection.execute(
                update(workers).where(workers.c.name == name, IS_FREE).values(**NEW_TOKEN).returning(workers.c.token)
            ).scalar_one_or_none()
            if token is None:
                return None
            return Claim(name, tick, *start(connection, _values(name, tick, instance), token, 1, "manual"))

    def request(self, name: str) -> bool:
        """Have whichever instance comes first claim a manual run; False where it runs, or is to be run, already.

        Others may be here: a second click, and every claim. The worker has one pending tick, and one claim in force.
        """
        with self.begin() as connection:
            asked = (
                update(workers)
                .where(workers.c.name == name, IS_FREE)
                .values(pending_tick=now(), pending_attempt=1, pending_trigger="manual")
            )
            requested = count(connection.execute(asked)) == 1
        if requested:
            self.ring()
        return requested

    def skip(self, name: str, tick: datetime, schedule: str, reason: str) -> bool:
        """Record that `tick` is not run because the worker is paused or still running; True for the one who did.

        Others may be here: every instance finds the same obstacle. Whoever raises the mark writes the row.
        """
        with self.begin() as connection:
            is_first = count(connection.execute(SKIP, at_tick(name, tick, schedule))) == 1
            if is_first:
                self._record_skipped(connection, name, tick, reason)
            return is_first

    def miss(self, state: WorkerState, tick: datetime) -> None:
        """Record the ticks between the mark and `tick`, which no instance came to run, if there are any.

        Others may be here: every instance that comes to run `tick`. Whoever raises the mark writes the row.
        """
        schedule, last = state.schedule, state.schedule.previous(tick - MICROSECOND)
        if max(state.mark or state.scheduled_at, state.scheduled_at) >= last:
            return
        with self.begin() as connection:
            raised = connection.execute(MISS, at_tick(state.name, last, state.schedule_text)).one_or_none()
            if raised is not None:
                first = schedule.next(max(raised.previous_mark or raised.scheduled_at, raised.scheduled_at))
                why = "no instance came to run it in time"
                self._record_not_run(connection, "missed", state.name, first, last, why)

    # -- ending --------------------------------------------------------------------------------

    def check(self, claim: Claim, session: Session, notes: Notes = NOTHING) -> None:
        """Hold the worker's row in the session's transaction while its token is `claim`'s; else raise ClaimLost.

        `notes` are written into its execution's row, by column.

        Others may be here: whoever takes the claim over. They wait for this commit, or this finds them first.
        """
        held = and_(workers.c.name == claim.worker, workers.c.running == claim.token)
        if session.get_bind().dialect.name == "sqlite":  # has no row locks; a write takes the only lock there is
            result = session.execute(update(workers).where(held).values(running=workers.c.running))
            ours = count(result) == 1
        else:
            row = select(workers.c.token, *self.idle).where(held).with_for_update(read=True)
            ours = session.execute(row).first() is not None
        if not ours:
            raise _lost(claim)
        if notes:
            session.execute(update(executions).where(executions.c.id == claim.execution).values(notes))

    def finish(self, claim: Claim, session: Session, notes: Notes = NOTHING) -> None:
        """Write "succeeded" into the run's own transaction; its commit makes the effects and the mark one."""
        if not self._end(session, claim, "succeeded", notes=notes):
            raise _lost(claim)

    def end(
        self,
        claim: Claim,
        state: str,
        reason: str | None = None,
        next_attempt: int | None = None,
        notes: Notes = NOTHING,
    ) -> bool:
        """End a claim that did not succeed; with `next_attempt` its tick is claimed again.

        Others may be here: the run itself, its time-out, and the instances that believe it lost. The first wins.
        """
        with self.begin() as connection:
            ended = self._end(connection, claim, state, reason, next_attempt, notes)
        if ended and state == "handed back":  # not "lost": while the database is away, its attempts would soon be over
            self.ring()
        return ended

    def outcome(self, claim: Claim) -> str:
        """The state of the claim's execution; "lost" where its row is gone."""
        with self._single.connect() as connection:
            state = connection.scalar(select(executions.c.state).where(executions.c.id == claim.execution))
            return str(state or "lost")

    # -- helpers -------------------------------------------------------------------------------

    def _end(
        self,
        connection: Connection | Session,
        claim: Claim,
        state: str,
        reason: str | None = None,
        next_attempt: int | None = None,
        notes: Notes = NOTHING,
    ) -> bool:
        pending: dict[str, Any] = {}
        if next_attempt is not None:
            pending = {
                "pending_tick": claim.tick,
                "pending_attempt": next_attempt,
                "pending_trigger": claim.trigger,
            }
        released = connection.execute(
            update(workers)
            .where(workers.c.name == claim.worker, workers.c.running == claim.token)
            .values(running=null(), **pending)
            .returning(workers.c.token, *self.idle)
        )
        if released.first() is None:
            return False
        ended = connection.execute(
            update(executions)
            .where(executions.c.id == claim.execution)
            .values(state=state, finished_at=now(), reason=reason, **notes)
            .returning(executions.c.started_at, executions.c.finished_at)
        ).one_or_none()
        if ended is not None:  # and not pruned while it ran
            totals.add_execution(connection, claim, state, *ended)
        return True

    def _record_skipped(self, connection: Connection, name: str, tick: datetime, reason: str) -> None:
        """In a row of its own, or in the newest one if that says the same: a pause of a month is one row."""
        newest = (
            select(executions.c.id)
            .where(executions.c.worker == name)
            .order_by(executions.c.tick.desc(), executions.c.id.desc())
            .limit(1)
            .scalar_subquery()
        )
        extended_at = connection.execute(
            update(executions)
            .where(
                executions.c.id == newest,
                executions.c.state == "skipped",
                executions.c.reason == reason,
            )
            .values(through=tick, finished_at=now())
            .returning(executions.c.finished_at)
        ).scalar_one_or_none()
        if extended_at is None:
            self._record_not_run(connection, "skipped", name, tick, tick, reason)
        else:
            totals.add_not_run(connection, name, "skipped", extended_at)

    def _record_not_run(
        self, connection: Connection, state: str, name: str, first: datetime, last: datetime, reason: str
    ) -> None:
        at = connection.execute(
            insert(executions)
            .values(
                worker=name,
                tick=first,
                through=last,
                trigger="schedule",
                state=state,
                reason=reason,
                finished_at=now(),
            )
            .returning(executions.c.finished_at)
        ).scalar_one()
        totals.add_not_run(connection, name, state, at)


_states = select(
    workers,
    now().label("clock"),
    executions.c.id.label("execution"),
    executions.c.tick,
    executions.c.attempt,
    executions.c.trigger,
    executions.c.started_at,
    executions.c.progress_done,
    executions.c.progress_total,
    executions.c.instance,
    executions.c.instance_name,
).outerjoin(executions, and_(executions.c.worker == workers.c.name, executions.c.token == workers.c.running))
_one_state = _states.where(workers.c.name == bindparam("name"))  # built once: that takes as long as asking does


def _state(row: Row[Any]) -> WorkerState:
    running = None
    if row.running is not None:
        running = Claim(row.name, row.tick, row.attempt, row.running, row.trigger, row.execution)
    return WorkerState(
        name=row.name,
        clock=row.clock,
        mark=row.mark,
        schedule_text=row.schedule,
        scheduled_at=row.scheduled_at,
        declared=row.declared,
        declared_by=row.declared_by,
        paused_at=row.paused_at,
        pending_tick=row.pending_tick,
        pending_trigger=row.pending_trigger,
        running=running,
        started_at=row.started_at,
        progress_done=row.progress_done,
        progress_total=row.progress_total,
        instance=row.instance,
        instance_name=row.instance_name,
    )


def _values(name: str, tick: datetime, instance: tuple[str, str]) -> dict[str, Any]:
    return {"of": name, "at": tick, "on": instance[0], "on_name": instance[1]}


def _limit(setting: str, seconds: float) -> ColumnElement[str]:
    return func.set_config(setting, f"{seconds * 1000:.0f}", True)


def count(result: Any) -> int:
    """How many rows an INSERT, an UPDATE or a DELETE changed."""
    assert isinstance(result, CursorResult)  # noqa: S101 - for the type checker: they give no other
    return result.rowcount


def _lost(claim: Claim) -> ClaimLost:
    return ClaimLost(
        f"Worker {claim.worker!r} no longer holds its claim of the tick {claim.tick.isoformat()} "
        f"(token {claim.token}): it was taken over, timed out or handed back. "
        "What this run had not committed is not kept; let the exception pass."
    )

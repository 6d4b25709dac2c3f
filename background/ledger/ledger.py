"""The ledger: claims a tick, ends the claim, and records each tick that did not run. `statements.py` has the SQL."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    String,
    and_,
    bindparam,
    case,
    insert,
    literal,
    literal_column,
    null,
    or_,
    select,
    true,
    update,
)

from ..database.clock import now
from ..database.sessions import Executes
from ..database.store import Store, count
from ..database.tables import executions, workers
from ..errors import ClaimLost
from ..host.logs import logger_of
from ..schedule.periods import MICROSECOND
from . import counters
from .claim import Claim, NotClaimed, WorkerState
from .on_postgresql import ClaimsOnPostgreSQL
from .on_sqlite import ClaimsOnSQLite
from .statements import IS_FREE, MISS, SKIP, Values, at_tick, claimed, start

log = logger_of(__name__)

MOMENTS = executions.c.started_at, executions.c.finished_at

Notes = Mapping[str, Any]
"""Columns of an execution besides its outcome: progress and log."""
NOTHING: Notes = MappingProxyType({})


class Ledger:
    """The worker and execution rows of one database, written on the engine's own connections."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._claims = ClaimsOnSQLite(store) if store.on_sqlite else ClaimsOnPostgreSQL(store)

    # -- reading -------------------------------------------------------------------------------

    def look(self, name: str) -> WorkerState | None:
        """Read the worker's state, without a lock. None if no instance has registered the worker yet."""
        rows = self.store.read(_one_state, {"name": name})
        return _state(rows[0]) if rows else None

    def states(self, names: Collection[str] | None = None) -> dict[str, WorkerState]:
        """Read the state of every worker in the database, or of the workers in `names`."""
        query = _states if names is None else _states.where(workers.c.name.in_(names))
        return {row.name: _state(row) for row in self.store.read(query)}

    # -- claiming ------------------------------------------------------------------------------

    def claim(self, name: str, tick: datetime, schedule: str, instance: tuple[str, str]) -> Claim | NotClaimed:
        """Claim `tick`, or return why not.

        Concurrency: every instance that knows this worker may run this at the same moment, or late. The row lock
        (PostgreSQL, while the tick is open) or the write lock (SQLite) orders them. The first raises the mark.
        Every later instance reads the raised mark in the same statement.
        """
        return self._claims.tick(at_tick(name, tick, schedule) | _values(name, tick, instance))

    def claim_pending(self, name: str, tick: datetime, instance: tuple[str, str]) -> Claim | None:
        """Claim a tick that was lost, handed back or requested.

        Concurrency: every instance that saw the tick pending may do this. The first claims the tick.
        """
        return self._claims.pending(_values(name, tick, instance))

    def claim_manual(self, name: str, tick: datetime, instance: tuple[str, str]) -> Claim | None:
        """Claim a run that a user requested. `tick` is the moment of the request. The mark does not move.

        Concurrency: a second click, and the scheduled tick of the same moment, may claim too. The first claims.
        """
        values = _values(name, tick, instance)
        with self.store.begin() as connection:
            token = connection.execute(_CLAIM_MANUAL, values).scalar_one_or_none()
            return None if token is None else start(connection, values, token, 1, "manual")

    def request(self, name: str) -> bool:
        """Let any instance claim a manual run. False if the worker runs already, or has a pending tick.

        Concurrency: a second click, and every claim of the worker, may come first. The worker is not free then.
        """
        with self.store.begin() as connection:
            requested = update(workers).where(workers.c.name == name, IS_FREE).values(pending(now(), 1, "manual"))
            is_requested = count(connection.execute(requested)) == 1
        if is_requested:
            self.store.ring()
        return is_requested

    def skip(self, name: str, tick: datetime, schedule: str, reason: str) -> bool:
        """Record that `tick` does not run because the worker is paused or still running. True for the caller that did.

        Concurrency: every instance may find the worker so. The instance that raises the mark writes the row.
        """
        with self.store.begin() as connection:
            is_first = count(connection.execute(SKIP, at_tick(name, tick, schedule))) == 1
            if is_first:
                self._record_skipped(connection, name, tick, reason)
            return is_first

    def miss(self, state: WorkerState, tick: datetime) -> None:
        """Record the ticks between the mark and `tick` as missed, if there are any.

        Concurrency: every instance that wants to run `tick` may do this. The instance that raises the mark writes the
        row.
        """
        schedule, last = state.schedule, state.schedule.previous(tick - MICROSECOND)
        if max(state.mark or state.scheduled_at, state.scheduled_at) >= last:
            return
        with self.store.begin() as connection:
            raised = connection.execute(MISS, at_tick(state.name, last, state.schedule_text)).one_or_none()
            if raised is not None:
                first = schedule.next(max(raised.previous_mark or raised.scheduled_at, raised.scheduled_at))
                why = "no instance came to run it in time"
                for begin, end in self._gaps(connection, state, first, last):
                    self._record_not_run(connection, "missed", state.name, begin, end, why)

    def _gaps(
        self, connection: Connection, state: WorkerState, first: datetime, last: datetime
    ) -> Iterator[tuple[datetime, datetime]]:
        """Yield the first and the last tick of each gap from `first` to `last`: ticks in a row that did not run.

        The ticks between the gaps ran while the database's clock was ahead.
        """
        if state.mark_ahead is None or state.mark_ahead < first:
            yield first, last
            return
        ran = select(executions.c.tick).where(attempted(state.name), executions.c.tick.between(first, last)).distinct()
        for tick in connection.scalars(ran.order_by(executions.c.tick)).all():
            if first <= (end := state.schedule.previous(tick - MICROSECOND)):
                yield first, end
            first = state.schedule.next(tick)
        if first <= last:
            yield first, last

    # -- ending --------------------------------------------------------------------------------

    def check(self, claim: Claim, session: Executes, notes: Notes = NOTHING) -> None:
        """Lock the worker's row in the session's transaction and write `notes` into the execution's row.

        Raises ClaimLost if `claim` is not in force.

        Concurrency: another instance may take the claim over. It waits for this commit, or this call raises.
        """
        held = in_force(claim)
        if not self._claims.lock(session, held):
            raise _lost(claim)
        if notes:
            session.execute(update(executions).where(own(claim)).values(notes))

    def finish(self, claim: Claim, session: Executes, notes: Notes = NOTHING) -> None:
        """Write "succeeded" in the run's own transaction, which commits it together with the run's effects.

        Raises ClaimLost if `claim` is not in force.
        """
        if not self._end(session, claim, {"state": "succeeded", "reason": None, **notes}):
            raise _lost(claim)

    def end(
        self,
        claim: Claim,
        state: str,
        reason: str | None = None,
        next_attempt: int | None = None,
        notes: Notes = NOTHING,
    ) -> bool:
        """End a claim that did not succeed. With `next_attempt` its tick becomes pending. True for the caller that did.

        Concurrency: the run itself, its time-out, and each instance that believes the run lost. The first ends it.
        """
        with self.store.begin() as connection:
            ended = self._end(connection, claim, {"state": state, "reason": reason, **notes}, next_attempt)
        # Not for "lost": during an outage, the attempts would be used up within a second.
        if ended and state == "handed back":
            self.store.ring()
        return ended

    def outcome(self, claim: Claim) -> str:
        """Read the state of the claim's execution: "lost" if its row is gone."""
        rows = self.store.read(select(executions.c.state).where(own(claim)))
        return str(rows[0].state) if rows else "lost"

    # -- helpers -------------------------------------------------------------------------------

    def _end(self, connection: Executes, claim: Claim, outcome: Values, next_attempt: int | None = None) -> bool:
        again = {} if next_attempt is None else pending(claim.tick, next_attempt, claim.trigger)
        released = connection.execute(
            update(workers)
            .where(in_force(claim))
            .values(running=null(), claim=null(), **again)
            .returning(workers.c.token, *self.store.idle)
        )
        if released.first() is None:
            return False
        outcome = {"finished_at": now(), **outcome}
        ended = connection.execute(update(executions).where(own(claim)).values(outcome).returning(*MOMENTS))
        row = ended.one_or_none() or self.write_anew(
            connection, claim, outcome, [claim.token, None] if claim.id else [None]
        )
        if row is not None:
            counters.add_execution(connection, claim, outcome["state"], *row)
        return True

    def write_anew(
        self, connection: Executes, claim: Claim, outcome: Values, tokens: Sequence[int | None]
    ) -> Row[Any] | None:
        """Write the row of a missing execution, with the first of `tokens` that no other row of the worker has.

        The row was deleted by hand, or the database lost the commit that wrote it. Return when the execution began and
        ended, or None if no row was written. For a claim without an id, any row of the same tick is enough.
        """
        if claim.id is None:
            same = executions.c.worker == claim.worker, executions.c.tick == claim.tick
            if connection.execute(select(executions.c.id).where(*same).limit(1)).first() is not None:
                return None
        copied = ("worker", "tick", "trigger", "attempt", "instance", "instance_name", "started_at")
        row = {name: getattr(claim, name) for name in copied} | {"claim": claim.id, **outcome}
        for token in tokens:
            new = self.store.insert(executions).values(row | {"token": token}).on_conflict_do_nothing()
            written: Row[Any] | None = connection.execute(new.returning(*MOMENTS)).one_or_none()
            if written is not None:
                tick, state = claim.tick.isoformat(), outcome["state"]
                log.warning(
                    "%s: the row of the tick %s was missing. It is written again: %s", claim.worker, tick, state
                )
                return written
        return None

    def _record_skipped(self, connection: Connection, name: str, tick: datetime, reason: str) -> None:
        """Extend the worker's newest row if it has the same reason, else write a row: a pause of a month is one row."""
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
            counters.add_not_run(connection, name, "skipped", extended_at)

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
        counters.add_not_run(connection, name, state, at)


def pending(tick: Any, attempt: int | None, trigger: str | None) -> dict[str, Any]:
    """Return the columns of a worker's row that name the tick to claim next, before any other."""
    return {"pending_tick": tick, "pending_attempt": attempt, "pending_trigger": trigger}


def marked(tick: datetime, trigger: str) -> dict[str, Any]:
    """Return the mark, raised to a scheduled tick if it is below. A tick that runs again must not count as open."""
    if trigger != "schedule":
        return {}
    is_below = or_(workers.c.mark.is_(None), workers.c.mark < tick)
    return {"mark": case((is_below, tick), else_=workers.c.mark)}


def in_force(claim: Claim) -> ColumnElement[bool]:
    """Return the condition that `claim` is the one in the worker's row."""
    is_same = true() if claim.id is None else workers.c.claim == claim.id
    return and_(workers.c.name == claim.worker, workers.c.running == claim.token, is_same)


def own(claim: Claim) -> ColumnElement[bool]:
    """Return the condition that an execution belongs to `claim`. After a restore, another claim may have its token."""
    same = executions.c.worker == claim.worker, executions.c.token == claim.token
    return and_(*same, executions.c.claim.is_(None) if claim.id is None else executions.c.claim == claim.id)


def attempted(worker: str) -> ColumnElement[bool]:
    """Return the condition that an execution is an attempt at a scheduled tick, not a row of skipped or missed ones."""
    of_ticks = executions.c.worker == worker, executions.c.trigger == "schedule"
    return and_(*of_ticks, executions.c.attempt.is_not(None))


# The execution of the claim in force. A claim of an older release has no id.
is_of_claim = and_(
    executions.c.worker == workers.c.name,
    executions.c.token == workers.c.running,
    or_(executions.c.claim == workers.c.claim, executions.c.claim.is_(None)),
)
# An execution that says "running" while its claim is not in force: a stray.
strays = executions.alias("strays")
is_stray = and_(
    strays.c.state == literal_column("'running'"),
    strays.c.worker == workers.c.name,
    or_(
        strays.c.token.is_(None),
        strays.c.token.is_distinct_from(workers.c.running),
        and_(strays.c.claim.is_not(None), strays.c.claim.is_distinct_from(workers.c.claim)),
    ),
)

_CLAIM_MANUAL = (
    update(workers)
    .where(workers.c.name == bindparam("of", type_=String()), IS_FREE)
    .values(claimed(literal(1), literal("manual")))
    .returning(workers.c.token)
)

_states = select(
    workers,
    now().label("clock"),
    select(strays.c.id).where(is_stray).correlate(workers).exists().label("has_strays"),
    executions.c.claim.label("execution_claim"),
    executions.c.id.label("execution"),
    executions.c.tick,
    executions.c.attempt,
    executions.c.trigger,
    executions.c.started_at,
    executions.c.progress_done,
    executions.c.progress_total,
    executions.c.instance,
    executions.c.instance_name,
).outerjoin(executions, is_of_claim)
_one_state = _states.where(workers.c.name == bindparam("name"))  # built once, as building takes as long as reading


def _state(row: Row[Any]) -> WorkerState:
    running = _running(row) if row.running is not None else None
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
        started_at=running.started_at if running else None,
        progress_done=row.progress_done,
        progress_total=row.progress_total,
        instance=running.instance if running else None,
        instance_name=running.instance_name if running else None,
        has_strays=bool(row.has_strays),
        mark_ahead=row.mark_ahead,
    )


def _running(row: Row[Any]) -> Claim:
    """Return the claim in force, from its execution, else from the copy in the worker's row.

    The copy serves if the execution was deleted by hand. If there is no copy, the claim was made by hand, and the
    newest decided tick counts as its tick.
    """
    name, token = row.name, row.running
    if row.execution is not None:
        began = row.started_at, row.execution_claim, row.instance, row.instance_name
        return Claim(name, row.tick, row.attempt or 1, token, row.trigger, row.execution, *began)
    if row.claim is not None and row.claim_tick is not None:
        began = row.claim_at, row.claim, row.claim_instance, row.claim_instance_name
        return Claim(name, row.claim_tick, row.claim_attempt or 1, token, row.claim_trigger, None, *began)
    tick = row.mark or row.scheduled_at
    return Claim(name, tick, 1, token, "schedule", None, instance_name="an unknown instance")


def _values(name: str, tick: datetime, instance: tuple[str, str]) -> dict[str, Any]:
    return {"of": name, "at": tick, "on": instance[0], "on_name": instance[1], "claim_id": uuid4().hex}


def _lost(claim: Claim) -> ClaimLost:
    return ClaimLost(
        f"Worker {claim.worker!r} no longer holds its claim of the tick {claim.tick.isoformat()} "
        f"(token {claim.token}): it was taken over, timed out or handed back. "
        "What this run had not committed is not kept; let the exception pass."
    )

"""The ledger: claims a tick, ends the claim, and records each tick that did not run. `statements.py` has the SQL."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from types import MappingProxyType, SimpleNamespace
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    ColumnElement,
    Connection,
    Executable,
    Row,
    and_,
    bindparam,
    case,
    func,
    insert,
    null,
    select,
    update,
)

from ..database.clock import UtcDateTime, now
from ..database.sessions import Executes
from ..database.store import Store, count
from ..database.tables import executions, workers
from ..errors import ClaimLost, InvalidSchedule, RunStopped
from ..host.logs import logger_of
from ..schedule.parsing import parse_schedule
from ..schedule.periods import MICROSECOND
from . import counters
from .claim import BUSY_STATES, ONE_STATE, SOME_STATES, STATES, Claim, NotClaimed, WorkerState, state_of
from .on_postgresql import ClaimsOnPostgreSQL
from .on_sqlite import ClaimsOnSQLite
from .statements import CLAIM_MANUAL, HASTEN, IS_FREE, MISS, SKIP, Values, at_tick, attempted, pending, start

log = logger_of(__name__)

OUTCOME = executions.c.state, executions.c.started_at, executions.c.finished_at
CANCELLED = "cancelled_at", "cancelled_by"

Notes = Mapping[str, Any]
"""Columns of an execution besides its outcome: progress, log and cursor."""
NOTHING: Notes = MappingProxyType({})


class Ledger:
    """The worker and execution rows of one database, written on the engine's own connections."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._claims = ClaimsOnSQLite(store) if store.on_sqlite else ClaimsOnPostgreSQL(store)
        released = update(workers).where(in_force(_ANY)).values(running=null(), claim=null())
        self._release = released.returning(workers.c.token, *store.idle)

    # -- reading -------------------------------------------------------------------------------

    def look(self, name: str) -> WorkerState | None:
        """Read the worker's state, without a lock. None if no instance has registered the worker yet."""
        rows = self.store.read(ONE_STATE, {"name": name})
        return state_of(rows[0]) if rows else None

    def states(self, names: Collection[str] | None = None) -> dict[str, WorkerState]:
        """Read the state of every worker in the database, or of the workers in `names`."""
        read = self.store.read
        rows = read(STATES) if names is None else read(SOME_STATES, {"names": [*names]})
        return {row.name: state_of(row) for row in rows}

    def busy_states(self) -> dict[str, WorkerState]:
        """Read the state of every worker that runs, has a pending tick, or has an execution that says "running"."""
        return {row.name: state_of(row) for row in self.store.read(BUSY_STATES)}

    def decided(self, tick: datetime) -> set[str]:
        """Read the names of the workers whose tick at the moment `tick` is decided, if they have one."""
        return {row.name for row in self.store.read(_DECIDED, {"at": tick})}

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
            token = connection.execute(CLAIM_MANUAL, values).scalar_one_or_none()
            return None if token is None else start(connection, values, token, 1, "manual")

    def request(self, name: str) -> bool:
        """Let any instance claim a manual run. False if the worker runs already, or has a pending tick.

        If a failed tick waits for another attempt, let any instance claim this attempt instead.

        Concurrency: a second click, and every claim of the worker, may come first. The worker is not free then.
        """
        with self.store.begin() as connection:
            requested = update(workers).where(workers.c.name == name, IS_FREE).values(pending(now(), 1, "manual"))
            hastened = connection.execute(HASTEN, {"of": name})
            is_requested = count(hastened) == 1 or count(connection.execute(requested)) == 1
        if is_requested:
            self.store.ring()
        return is_requested

    def hasten(self, name: str) -> bool:
        """Let a failed tick that waits for another attempt be claimed now. False if none waits, or it is paused.

        Concurrency: another instance may claim the attempt, or the next tick, at the same moment. Then none waits.
        """
        return self.store.change(HASTEN, {"of": name}) == 1

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
        if notes and not count(session.execute(update(executions).where(own(claim)).values(notes))):
            self.write_anew(session, claim, {"state": "running", **notes}, [claim.token])

    def finish(self, claim: Claim, session: Executes, notes: Notes = NOTHING) -> None:
        """Write "succeeded" in the run's own transaction, which commits it together with the run's effects.

        Raises ClaimLost if `claim` is not in force, and RunStopped if a user cancelled it.
        """
        state = self._end(session, claim, {"state": "succeeded", "reason": None, **notes})
        if state is None:
            raise _lost(claim)
        if state == "cancelled":
            raise RunStopped(
                f"Worker {claim.worker!r} was cancelled at the tick {claim.tick.isoformat()}. The work since its last "
                "commit is discarded."
            )

    def end(
        self,
        claim: Claim,
        state: str,
        reason: str | None = None,
        next_attempt: int | None = None,
        notes: Notes = NOTHING,
        pause: timedelta | None = None,
    ) -> str | None:
        """End a claim that did not succeed. With `next_attempt` its tick becomes pending.

        With a `pause`, it may be claimed after the pause, until the worker's next tick is due.

        Return the state that this call wrote: `state`, or "cancelled" if a user cancelled the claim. A cancelled tick
        does not become pending. None for a claim that is not in force.

        Concurrency: the run itself, its time-out, and each instance that believes the run lost. The first ends it.
        """
        with self.store.begin() as connection:
            ended = self._end(connection, claim, {"state": state, "reason": reason, **notes}, next_attempt, pause)
        # Not for "lost": during an outage, the attempts would be used up within a second.
        if ended == "handed back":
            self.store.ring()
        return ended

    def explain(self, claim: Claim, reason: str) -> None:
        """Replace the reason of an execution that has ended."""
        self.store.change(update(executions).where(own(claim)).values(reason=reason))

    def outcome(self, claim: Claim) -> str:
        """Read the state of the claim's execution: "lost" if its row is missing."""
        rows = self.store.read(select(executions.c.state).where(own(claim)))
        return str(rows[0].state) if rows else "lost"

    def cursor(self, claim: Claim) -> str | None:
        """Read the cursor, as JSON, that the attempts at the claim's tick committed last. None if there is none."""
        same = (
            executions.c.worker == claim.worker,
            executions.c.tick == claim.tick,
            executions.c.trigger == claim.trigger,
        )
        attempts = select(executions.c.cursor).where(*same, executions.c.cursor.is_not(None))
        rows = self.store.read(attempts.order_by(executions.c.id.desc()).limit(1))
        return str(rows[0].cursor) if rows else None

    # -- helpers -------------------------------------------------------------------------------

    def _end(
        self,
        connection: Executes,
        claim: Claim,
        outcome: Values,
        next_attempt: int | None = None,
        pause: timedelta | None = None,
    ) -> str | None:
        held = {"of": claim.worker, "of_token": claim.token, "of_id": claim.id}
        if connection.execute(self._release, held).first() is None:
            return None
        ended = connection.execute(_ending(tuple(outcome)), held | {f"new_{name}": outcome[name] for name in outcome})
        row = ended.one_or_none()
        if row is None:
            row = self.write_anew(connection, claim, {"finished_at": now(), **outcome}, [claim.token, None])
        state = str(row.state if row is not None else outcome["state"])
        if next_attempt is not None and state != "cancelled":
            moments = (None, None) if pause is None else _retried(connection, claim, pause)
            if moments is not None:
                again = pending(claim.tick, next_attempt, claim.trigger, *moments)
                connection.execute(update(workers).where(workers.c.name == claim.worker).values(again))
        if row is not None:
            counters.add_execution(connection, claim, *row)
        return state

    def write_anew(
        self, connection: Executes, claim: Claim, outcome: Values, tokens: Sequence[int | None]
    ) -> Row[Any] | None:
        """Write the row of a missing execution, with the first of `tokens` that no other row of the worker has.

        The row was deleted by hand, or the database lost the commit that wrote it. Return its `OUTCOME`, or None if no
        row was written. For a claim without an id, any row of the same tick is enough.
        """
        if claim.id is None:
            same = executions.c.worker == claim.worker, executions.c.tick == claim.tick
            if connection.execute(select(executions.c.id).where(*same).limit(1)).first() is not None:
                return None
        copied = ("worker", "tick", "trigger", "attempt", "instance", "instance_name", "started_at")
        row = {name: getattr(claim, name) for name in copied} | {"claim": claim.id, **outcome}
        for token in tokens:
            new = self.store.insert(executions).values(row | {"token": token}).on_conflict_do_nothing()
            written: Row[Any] | None = connection.execute(new.returning(*OUTCOME)).one_or_none()
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
            .where(executions.c.id == newest, executions.c.state == "skipped", executions.c.reason == reason)
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
                worker=name, tick=first, through=last, trigger="schedule", state=state, reason=reason, finished_at=now()
            )
            .returning(executions.c.finished_at)
        ).scalar_one()
        counters.add_not_run(connection, name, state, at)


def _retried(connection: Executes, claim: Claim, pause: timedelta) -> tuple[datetime, datetime] | None:
    """Return from when a failed tick may be claimed again, and until when. None if the next tick comes first."""
    columns = workers.c.schedule, workers.c.scheduled_at, now(pause)
    schedule, scheduled_at, after = connection.execute(select(*columns).where(workers.c.name == claim.worker)).one()
    try:
        until = parse_schedule(schedule).next(max(claim.tick, scheduled_at))
    except InvalidSchedule:  # the schedule of a newer release
        return None
    return (after, until) if after < until else None


def in_force(claim: Claim) -> ColumnElement[bool]:
    """Return the condition that `claim` is the claim in the worker's row."""
    same = workers.c.name == claim.worker, workers.c.running == claim.token
    return and_(*same, workers.c.claim.is_not_distinct_from(claim.id))


def own(claim: Claim) -> ColumnElement[bool]:
    """Return the condition that an execution belongs to `claim`. After a restore, another claim may have its token."""
    same = executions.c.worker == claim.worker, executions.c.token == claim.token
    return and_(*same, executions.c.claim.is_not_distinct_from(claim.id))


def respecting_cancel(outcome: Values) -> dict[str, Any]:
    """Return the columns of an outcome, for an execution that a user may have cancelled. It then ends as cancelled.

    Of several requests, the first stays in the row.
    """
    is_cancelled = executions.c.cancelled_at.is_not(None)
    first = {name: func.coalesce(executions.c[name], outcome[name]) for name in CANCELLED if name in outcome}
    return {**outcome, **first, "state": case((is_cancelled, "cancelled"), else_=outcome["state"])}


_DECIDED = select(workers.c.name).where(workers.c.mark >= bindparam("at", type_=UtcDateTime()))
_ANY: Any = SimpleNamespace(worker=bindparam("of"), token=bindparam("of_token"), id=bindparam("of_id"))
"""Any claim, as parameters: building a statement takes longer than sending it."""


@lru_cache
def _ending(names: tuple[str, ...]) -> Executable:
    """Build the statement that writes an outcome, with the columns `names`, into the execution's row."""
    outcome = {name: bindparam(f"new_{name}", type_=executions.c[name].type) for name in names}
    new = respecting_cancel({"finished_at": now(), **outcome})
    return update(executions).where(own(_ANY)).values(new).returning(*OUTCOME)


def _values(name: str, tick: datetime, instance: tuple[str, str]) -> dict[str, Any]:
    return {"of": name, "at": tick, "on": instance[0], "on_name": instance[1], "claim_id": uuid4().hex}


def _lost(claim: Claim) -> ClaimLost:
    return ClaimLost(
        f"Worker {claim.worker!r} no longer holds its claim of the tick {claim.tick.isoformat()} "
        f"(token {claim.token}): it was taken over, timed out or handed back. "
        "The run's uncommitted work is discarded; let the exception pass."
    )

"""SQL that decides one tick of one worker: claim it, claim it again, skip it, or record earlier ticks as missed.

Each statement changes the worker's row only if the row still allows it, so one statement decides each race.
SQLAlchemy builds the statements once, at import: building one takes longer than running it.
Their parameters come from `at_tick`. A claim adds its id and its instance.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Select,
    String,
    and_,
    bindparam,
    case,
    false,
    func,
    insert,
    literal,
    not_,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.sql.dml import ReturningInsert

from ..database.clock import UtcDateTime, elapsed, now
from ..database.tables import executions, is_retry, may_be_run_again, workers
from ..schedule.parsing import parse_schedule
from ..schedule.periods import MICROSECOND
from .claim import BLOCKED, DECIDED, Claim, NotClaimed

Values = Mapping[str, Any]

_MOST_EARLY_SECONDS = 0.1

# No pending tick comes first. A failed tick is not retried once the next tick is due.
NOTHING_PENDING = or_(workers.c.pending_tick.is_(None), and_(is_retry, workers.c.pending_until <= now()))
# Nor is a claim of the worker in force.
IS_FREE = and_(NOTHING_PENDING, workers.c.running.is_(None))

# Every claim takes the next token. A change by hand, or a restore without the executions, may have lowered the token.
# Then the next one continues above the greatest token in the history.
_newer = and_(executions.c.worker == workers.c.name, executions.c.token > workers.c.token)
_greatest = select(func.max(executions.c.token)).where(_newer).correlate(workers).scalar_subquery()
_next_token = func.coalesce(_greatest, workers.c.token) + 1


def at_tick(name: str, tick: datetime, schedule: str) -> dict[str, Any]:
    """Return the parameters of the statements: the worker, its `tick`, and the schedule that has this tick."""
    return {"of": name, "at": tick, "by": schedule, "previous": parse_schedule(schedule).previous(tick - MICROSECOND)}


def attempted(worker: str | ColumnElement[str]) -> ColumnElement[bool]:
    """Return the condition that an execution is an attempt at a scheduled tick, not a row of skipped or missed ones."""
    of_ticks = executions.c.worker == worker, executions.c.trigger == "schedule"
    return and_(*of_ticks, executions.c.attempt.is_not(None))


_tick, _previous = (bindparam(name, type_=UtcDateTime()) for name in ("at", "previous"))
_id, _instance, _instance_name = (bindparam(name, type_=String()) for name in ("claim_id", "on", "on_name"))
_worker = bindparam("of", type_=String())
_of_worker = workers.c.name == _worker

# Above the mark: no instance has decided the tick yet.
_is_open = or_(workers.c.mark.is_(None), workers.c.mark < _tick)
# The caller found the tick by the schedule in force, not by one that `reschedule` or another release replaced.
_is_in_force = workers.c.schedule == bindparam("by", type_=String())
# No other tick lies between the mark and this tick. `MISS` must record such ticks first.
_is_next = or_(workers.c.mark >= _previous, workers.c.scheduled_at >= _previous)
# The first condition: the tick is due by the database's clock.
_may_be_decided = and_(_tick <= now(), _is_in_force, _is_next)

# While the database's clock was ahead, the tick may have run. The mark was lowered since, so the history decides.
_execution = select(executions.c.id).where(attempted(_worker), executions.c.tick == _tick).exists()
_has_run = case((workers.c.mark_ahead >= _tick, _execution), else_=false())

# Every condition of a claim except `_is_open`.
_is_claimable = and_(_may_be_decided, workers.c.paused_at.is_(None), IS_FREE, not_(_has_run))


def _claimed(attempt: ColumnElement[int], trigger: ColumnElement[str]) -> dict[str, Any]:
    """Return the columns of the worker's row that a claim sets."""
    return {
        "token": _next_token,
        "running": _next_token,
        "claim": _id,
        "claim_tick": _tick,
        "claim_attempt": attempt,
        "claim_trigger": trigger,
        "claim_instance": _instance,
        "claim_instance_name": _instance_name,
        "claim_at": now(),
        **dict.fromkeys(("pending_tick", "pending_after", "pending_until"), null()),
    }


def pending(
    tick: Any, attempt: int | None, trigger: str | None, after: Any = None, until: datetime | None = None
) -> dict[str, Any]:
    """Return the columns of a worker's row that name the tick to claim next, before any other.

    A tick that failed may be claimed from `after` until the worker's next tick is due, at `until`.
    """
    waits = {"pending_after": after, "pending_until": until}
    return {"pending_tick": tick, "pending_attempt": attempt, "pending_trigger": trigger, **waits}


def marked(tick: datetime, trigger: str) -> dict[str, Any]:
    """Return the mark, raised to a scheduled tick if it is below. A tick that runs again must not count as open."""
    if trigger != "schedule":
        return {}
    is_below = or_(workers.c.mark.is_(None), workers.c.mark < tick)
    return {"mark": case((is_below, tick), else_=workers.c.mark)}


_SCHEDULED = _claimed(literal(1), literal("schedule"))

# The statements. The first instance raises the mark to the tick, and `_is_open` is false for every later instance.

CLAIM = (
    update(workers)
    .where(_of_worker, _is_open, _is_claimable)
    .values(mark=_tick, **_SCHEDULED)
    .returning(workers.c.token)
)
# Claim the tick that is pending: it was lost, handed back or requested. The mark does not move. A user who typed the
# pending tick may have left its attempt and trigger empty.
_pending_attempt = func.coalesce(workers.c.pending_attempt, 1).label("pending_attempt")
_pending_trigger = func.coalesce(workers.c.pending_trigger, "schedule").label("pending_trigger")
CLAIM_PENDING = (
    update(workers)
    .where(_of_worker, workers.c.pending_tick == _tick, may_be_run_again, workers.c.running.is_(None))
    .values(_claimed(_pending_attempt, _pending_trigger))
    .returning(workers.c.token, _pending_attempt, _pending_trigger)
)
# Let a failed tick that waits for another attempt be claimed now.
HASTEN = (
    update(workers)
    .where(_of_worker, is_retry, workers.c.pending_until > now(), workers.c.running.is_(None))
    .where(workers.c.paused_at.is_(None))
    .values(pending_after=now())
)
# Claim a run that a user requested. The mark does not move.
CLAIM_MANUAL = (
    update(workers)
    .where(_of_worker, IS_FREE)
    .values(_claimed(literal(1), literal("manual")))
    .returning(workers.c.token)
)
# Decide a tick that cannot run, because the worker is paused or still running.
SKIP = (
    update(workers)
    .where(_of_worker, _is_open, _may_be_decided, or_(workers.c.paused_at.is_not(None), workers.c.running.is_not(None)))
    .values(mark=_tick)
)
# Decide all ticks from the mark to this tick. `previous_mark` keeps the old mark, as an UPDATE returns no old values.
MISS = (
    update(workers)
    .where(_of_worker, _is_open, _is_in_force, workers.c.scheduled_at < _tick)
    .values(previous_mark=workers.c.mark, mark=_tick)
    .returning(workers.c.previous_mark, workers.c.scheduled_at)
)
# See, without changing the row, whether the tick may be claimed.
LOOK = select(_is_open.label("is_open"), and_(_is_open, _is_claimable).label("is_claimable")).where(_of_worker)


def _look_and_claim() -> Select[Any]:
    """Build PostgreSQL's claim: `LOOK`, `CLAIM` and the execution's row in one statement.

    The statement returns whether the tick is open, then the columns of `_start`, all NULL if it claimed nothing.
    It returns no row for a worker that no instance has registered.

    Concurrency: every instance that knows the worker may run this at the same moment. While the tick is open, the
    statement locks the worker's row before it evaluates the row. An instance that waited sees the current values.
    """
    open_row = select(workers.c.name, _is_claimable.label("is_claimable"))
    seen = open_row.where(_of_worker, _is_open).with_for_update(of=workers, key_share=True).cte("seen")
    claim = update(workers).where(workers.c.name == seen.c.name, seen.c.is_claimable).values(mark=_tick, **_SCHEDULED)
    won = claim.returning(workers.c.token).cte("claimed")
    started = _start(won.c.token, literal(1), literal("schedule")).cte("started")
    known = select(workers.c.name).where(_of_worker).cte("known")
    is_open = seen.c.name.is_not(None).label("is_open")
    return select(is_open, *started.c).select_from(known.outerjoin(seen, true()).outerjoin(started, true()))


def _claim_pending_and_start() -> Select[Any]:
    """Build PostgreSQL's claim of a pending tick: `CLAIM_PENDING` and the execution's row in one statement."""
    won = CLAIM_PENDING.cte("claimed")
    return select(_start(won.c.token, won.c.pending_attempt, won.c.pending_trigger).cte("started"))


def _start(token: ColumnElement[int], attempt: ColumnElement[int], trigger: ColumnElement[str]) -> ReturningInsert[Any]:
    """Insert the execution's row of a claim that was won. Returns the columns that `claim_of` reads."""
    row: dict[str, ColumnElement[Any]] = {
        "worker": _worker,
        "tick": _tick,
        "trigger": trigger,
        "state": literal("running"),
        "attempt": attempt,
        "token": token,
        "claim": _id,
        "instance": _instance,
        "instance_name": _instance_name,
        "started_at": now(),
    }
    new = insert(executions).from_select(list(row), select(*row.values()))
    return new.returning(*(executions.c[name] for name in ("attempt", "token", "trigger", "id", "started_at")))


LOOK_AND_CLAIM, CLAIM_PENDING_AND_START = _look_and_claim(), _claim_pending_and_start()
START = _start(
    bindparam("token", type_=Integer()), bindparam("attempt", type_=Integer()), bindparam("trigger", type_=String())
)

# If this process woke up to 100 ms early, it sleeps inside the database: cheaper than a second round trip.
_left = elapsed(now(), _tick)
WAIT = func.pg_sleep(case((_left.between(0.0, _MOST_EARLY_SECONDS), _left), else_=0.0))


def start(connection: Connection, values: Values, token: int, attempt: int, trigger: str) -> Claim:
    """Write the execution's row of a claim that was won in this transaction. Return the claim."""
    more = {"token": token, "attempt": attempt, "trigger": trigger}
    return claim_of(values, connection.execute(START, {**values, **more}).one())


def claim_of(values: Values, row: Sequence[Any]) -> Claim:
    """Return the claim that was won with the parameters `values`, by the `row` of its new execution."""
    attempt, token, trigger, execution, started_at = row
    begun = execution, started_at, values["claim_id"], values["on"], values["on_name"]
    return Claim(values["of"], values["at"], attempt, token, trigger, *begun)


def why_not(seen: Sequence[Any] | None) -> NotClaimed:
    """Return why a claim was refused, by the row that the look found. None if no instance has registered the worker."""
    return BLOCKED if seen is None or seen[0] else DECIDED

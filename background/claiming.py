"""The statements that decide about one tick of one worker: claim it, skip it, or pass over missed ones before it.

Their values are those of `at_tick`; built once, as building takes longer than asking.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Float,
    Integer,
    Select,
    String,
    and_,
    bindparam,
    case,
    cast,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.sql.dml import ReturningInsert

from .clock import UtcDateTime, now
from .models import executions, may_be_run_again, workers
from .schedule import MICROSECOND, parse_schedule

MOST_EARLY_SECONDS = 0.1
NEW_TOKEN: dict[str, Any] = {"token": workers.c.token + 1, "running": workers.c.token + 1}


def at_tick(name: str, tick: datetime, schedule: str) -> dict[str, Any]:
    """What the statements are given: the worker, its `tick`, the text of the schedule which that is one of."""
    return {"of": name, "at": tick, "by": schedule, "previous": parse_schedule(schedule).previous(tick - MICROSECOND)}


_tick, _previous = (bindparam(name, type_=UtcDateTime()) for name in ("at", "previous"))
_of_worker = workers.c.name == bindparam("of", type_=String())
_is_open = or_(workers.c.mark.is_(None), workers.c.mark < _tick)
_is_in_force = workers.c.schedule == bindparam("by", type_=String())
# Between the mark and this tick there is none; else those are written down as missed first.
_is_next = or_(workers.c.mark >= _previous, workers.c.scheduled_at >= _previous)
_may_be_decided = and_(_tick <= now(), _is_in_force, _is_next)
_is_claimable = and_(
    _may_be_decided, workers.c.paused_at.is_(None), workers.c.pending_tick.is_(None), workers.c.running.is_(None)
)

CLAIM = (
    update(workers)
    .where(_of_worker, _is_open, _is_claimable)
    .values(mark=_tick, **NEW_TOKEN)
    .returning(workers.c.token)
)
CLAIM_PENDING = (
    update(workers)
    .where(_of_worker, workers.c.pending_tick == _tick, may_be_run_again, workers.c.running.is_(None))
    .values(pending_tick=null(), **NEW_TOKEN)
    .returning(workers.c.token, workers.c.pending_attempt, workers.c.pending_trigger)
)
SKIP = (
    update(workers)
    .where(_of_worker, _is_open, _may_be_decided, or_(workers.c.paused_at.is_not(None), workers.c.running.is_not(None)))
    .values(mark=_tick)
)
MISS = (
    update(workers)
    .where(_of_worker, _is_open, _is_in_force, workers.c.scheduled_at < _tick)
    .values(previous_mark=workers.c.mark, mark=_tick)
    .returning(workers.c.previous_mark, workers.c.scheduled_at)
)

LOOK = select(
    _is_open.label("is_open"),
    and_(_is_open, _is_claimable).label("is_claimable"),
    null().label("token"),
    null().label("id"),
).where(_of_worker)


def _look_and_claim() -> Select[Any]:
    """The same look with the claim and its execution's row, in one statement of PostgreSQL's: an `id` says that it won.

    While the tick is open, the worker's row is locked before it is judged: whoever waited sees it as it is then.
    """
    open_row = select(workers.c.name, _is_claimable.label("is_claimable"))
    seen = open_row.where(_of_worker, _is_open).with_for_update(of=workers, key_share=True).cte("seen")
    claim = update(workers).where(workers.c.name == seen.c.name, seen.c.is_claimable).values(mark=_tick, **NEW_TOKEN)
    claimed = claim.returning(workers.c.token).cte("claimed")
    started = _start(claimed.c.token, literal(1), literal("schedule")).cte("started")
    known = select(workers.c.name).where(_of_worker).cte("known")
    is_open = seen.c.name.is_not(None).label("is_open")
    return select(is_open, seen.c.is_claimable, started.c.token, started.c.id).select_from(
        known.outerjoin(seen, true()).outerjoin(started, true())
    )


def _start(token: ColumnElement[int], attempt: ColumnElement[int], trigger: ColumnElement[str]) -> ReturningInsert[Any]:
    """The execution's row of a claim that was won."""
    row: dict[str, ColumnElement[Any]] = {
        "worker": bindparam("of", type_=String()),
        "tick": _tick,
        "trigger": trigger,
        "state": literal("running"),
        "attempt": attempt,
        "token": token,
        "instance": bindparam("on", type_=String()),
        "instance_name": bindparam("on_name", type_=String()),
        "started_at": now(),
    }
    new = insert(executions).from_select(list(row), select(*row.values()))
    return new.returning(*(executions.c[name] for name in ("id", "token", "attempt", "trigger")))


def _claim_pending_and_start() -> Select[Any]:
    claimed = CLAIM_PENDING.cte("claimed")
    return select(_start(claimed.c.token, claimed.c.pending_attempt, claimed.c.pending_trigger).cte("started"))


LOOK_AND_CLAIM, CLAIM_PENDING_AND_START = _look_and_claim(), _claim_pending_and_start()
START = _start(
    bindparam("token", type_=Integer()), bindparam("attempt", type_=Integer()), bindparam("trigger", type_=String())
)


# Whoever woke up a little early, by a wrong idea of the database's clock, waits there: asking again would cost more.
_left = cast(func.extract("epoch", _tick - now()), Float)
WAIT = func.pg_sleep(case((_left.between(0.0, MOST_EARLY_SECONDS), _left), else_=0.0))

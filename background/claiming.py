"""What decides about one tick of one worker: claim it, skip it, or record as missed those before it.

The statements are built once, as building takes longer than asking. Their values are those of `at_tick`, with the
instance's where an execution begins.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
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
from sqlalchemy.engine.interfaces import Compiled
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import ReturningInsert

from .clock import UtcDateTime, elapsed, now, single_statements
from .models import executions, may_be_run_again, workers
from .schedule import MICROSECOND, parse_schedule
from .sqlite import lock_soon

Values = Mapping[str, Any]

_MOST_EARLY_SECONDS = 0.1
IS_FREE = and_(workers.c.pending_tick.is_(None), workers.c.running.is_(None))

# A lowered token (by hand, or by a restore without the executions) continues above the greatest one in the history.
_newer = and_(executions.c.worker == workers.c.name, executions.c.token > workers.c.token)
_greatest = select(func.max(executions.c.token)).where(_newer).correlate(workers).scalar_subquery()
_next_token = func.coalesce(_greatest, workers.c.token) + 1


def at_tick(name: str, tick: datetime, schedule: str) -> dict[str, Any]:
    """The parameters of the statements: the worker, its `tick`, the text of the schedule which that is one of."""
    return {"of": name, "at": tick, "by": schedule, "previous": parse_schedule(schedule).previous(tick - MICROSECOND)}


_tick, _previous = (bindparam(name, type_=UtcDateTime()) for name in ("at", "previous"))
_id, _instance, _instance_name = (bindparam(name, type_=String()) for name in ("claim_id", "on", "on_name"))
_of_worker = workers.c.name == bindparam("of", type_=String())
_is_open = or_(workers.c.mark.is_(None), workers.c.mark < _tick)
_is_in_force = workers.c.schedule == bindparam("by", type_=String())
# Between the mark and this tick there is none; else those are written down as missed first.
_is_next = or_(workers.c.mark >= _previous, workers.c.scheduled_at >= _previous)
_may_be_decided = and_(_tick <= now(), _is_in_force, _is_next)
# The tick may have run while the clock was ahead. The mark was lowered since.
_execution = (
    select(executions.c.id)
    .where(
        executions.c.worker == bindparam("of", type_=String()),
        executions.c.tick == _tick,
        executions.c.trigger == "schedule",
        executions.c.attempt.is_not(None),
    )
    .exists()
)
_has_run = case((workers.c.mark_ahead >= _tick, _execution), else_=false())
_is_claimable = and_(_may_be_decided, workers.c.paused_at.is_(None), IS_FREE, not_(_has_run))


def claimed(attempt: ColumnElement[int], trigger: ColumnElement[str]) -> dict[str, Any]:
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
    }


_SCHEDULED = claimed(literal(1), literal("schedule"))
CLAIM = (
    update(workers)
    .where(_of_worker, _is_open, _is_claimable)
    .values(mark=_tick, **_SCHEDULED)
    .returning(workers.c.token)
)
CLAIM_PENDING = (
    update(workers)
    .where(_of_worker, workers.c.pending_tick == _tick, may_be_run_again, workers.c.running.is_(None))
    .values(pending_tick=null(), **claimed(workers.c.pending_attempt, workers.c.pending_trigger))
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
).where(_of_worker)


def _look_and_claim() -> Select[Any]:
    """The same look with the claim and its execution's row, in one statement of PostgreSQL's.

    Its row is whether the tick is open, and a `Started`, of which all is null where it was not claimed.

    While the tick is open, the worker's row is locked before it is judged: whoever waited sees it as it is then.
    """
    open_row = select(workers.c.name, _is_claimable.label("is_claimable"))
    seen = open_row.where(_of_worker, _is_open).with_for_update(of=workers, key_share=True).cte("seen")
    claim = update(workers).where(workers.c.name == seen.c.name, seen.c.is_claimable).values(mark=_tick, **_SCHEDULED)
    won = claim.returning(workers.c.token).cte("claimed")
    started = _start(won.c.token, literal(1), literal("schedule")).cte("started")
    known = select(workers.c.name).where(_of_worker).cte("known")
    is_open = seen.c.name.is_not(None).label("is_open")
    return select(is_open, *started.c).select_from(known.outerjoin(seen, true()).outerjoin(started, true()))


def _start(token: ColumnElement[int], attempt: ColumnElement[int], trigger: ColumnElement[str]) -> ReturningInsert[Any]:
    """The execution's row of a claim that was won."""
    row: dict[str, ColumnElement[Any]] = {
        "worker": bindparam("of", type_=String()),
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


def _claim_pending_and_start() -> Select[Any]:
    won = CLAIM_PENDING.cte("claimed")
    return select(_start(won.c.token, won.c.pending_attempt, won.c.pending_trigger).cte("started"))


LOOK_AND_CLAIM, CLAIM_PENDING_AND_START = _look_and_claim(), _claim_pending_and_start()
START = _start(
    bindparam("token", type_=Integer()), bindparam("attempt", type_=Integer()), bindparam("trigger", type_=String())
)


# If this process woke up to 100 ms early, it sleeps inside the database: cheaper than a second round trip.
_left = elapsed(now(), _tick)
WAIT = func.pg_sleep(case((_left.between(0.0, _MOST_EARLY_SECONDS), _left), else_=0.0))


class NotClaimed(Enum):
    """Why a claim was refused. Falsy, so `if claim:` works."""

    DECIDED = "somebody was here before"
    HINDERED = "something is in the way"

    def __bool__(self) -> Literal[False]:
        return False


DECIDED, HINDERED = NotClaimed.DECIDED, NotClaimed.HINDERED


class Started(NamedTuple):
    """The execution of a claim that was won."""

    attempt: int
    token: int
    trigger: str
    execution: int
    started_at: datetime


def start(connection: Connection, values: Values, token: int, attempt: int, trigger: str) -> Started:
    """Write the execution's row of a claim that was won in this transaction."""
    more = {"token": token, "attempt": attempt, "trigger": trigger}
    return Started(*connection.execute(START, {**values, **more}).one())


def _why_not(seen: Sequence[Any] | None) -> NotClaimed:
    return HINDERED if seen is None or seen[0] else DECIDED  # None: no instance has registered the worker yet


class ClaimsOnSQLite:
    """Takes SQLite's single write lock first. After the wait, one read shows whether the tick is still open."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def tick(self, values: Values) -> Started | NotClaimed:
        """Claim a tick that may be claimed."""
        with self._engine.begin() as connection:
            lock_soon(connection)
            seen = connection.execute(LOOK, values).one_or_none()
            if seen is None or not seen.is_claimable:
                return _why_not(seen)
            token = connection.execute(CLAIM, values).scalar_one_or_none()
            # None: another instance claimed while this call waited longer for the lock.
            return HINDERED if token is None else start(connection, values, token, 1, "schedule")

    def pending(self, values: Values) -> Started | None:
        """Claim a tick that must run again."""
        with self._engine.begin() as connection:
            row = connection.execute(CLAIM_PENDING, values).one_or_none()
            return start(connection, values, *row) if row else None


class Together:
    """Two statements of PostgreSQL's in one request, which is one transaction: the first sets limits to the second.

    A request with parameters has one statement only, so what they stand for is written into its text, by the driver.
    """

    def __init__(self, engine: Engine, first: Select[*tuple[Any, ...]], second: Any) -> None:
        self.second = second
        tables = engine.get_execution_options().get("schema_translate_map")
        options: dict[str, Any] = {"schema_translate_map": tables, "render_schema_translate": True} if tables else {}
        self._first, self._second = first.compile(engine, **options), second.compile(engine, **options)

    def row(self, connection: Connection, values: Values) -> Any:
        """The second's only row as a tuple, or None."""
        from psycopg import ClientCursor

        driver: Any = connection.connection.driver_connection
        cursor = ClientCursor(driver)
        texts = (cursor.mogrify(*_written(each, values)) for each in (self._first, self._second))
        sent = connection.exec_driver_sql("; ".join(texts), execution_options={"no_parameters": True})
        sent.cursor.nextset()
        row = sent.cursor.fetchone()
        sent.close()
        return row


def _written(statement: Compiled, values: Values) -> tuple[str, Mapping[str, Any] | None]:
    """Return the text of a statement and its parameters."""
    if not isinstance(statement, SQLCompiler) or not statement.literal_execute_params:
        return str(statement), statement.construct_params(values)
    whole = statement.construct_expanded_state(values)  # with the values that SQLAlchemy itself writes into the text
    made: Any = statement._bind_processors
    return whole.statement, {
        name: made[name](value) if name in made else value for name, value in (whole.parameters or {}).items()
    }


class ClaimsOnPostgreSQL:
    """One request looks, locks, claims and writes the execution's row. `limits` go with it, for its transaction."""

    def __init__(self, engine: Engine, limits: Sequence[ColumnElement[str]]) -> None:
        self._single = single_statements(engine)
        self._tick = Together(engine, select(WAIT, *limits), LOOK_AND_CLAIM)
        self._pending = Together(engine, select(*limits), CLAIM_PENDING_AND_START)

    def tick(self, values: Values) -> Started | NotClaimed:
        """Claim a tick that may be claimed."""
        row = self._sent(self._tick, values)
        return _why_not(row) if row is None or row[-1] is None else Started(*row[1:])

    def pending(self, values: Values) -> Started | None:
        """Claim a tick that must run again."""
        row = self._sent(self._pending, values)
        return Started(*row) if row else None

    def _sent(self, together: Together, values: Values) -> Any:
        with self._single.begin() as connection:
            return together.row(connection, values)

"""A claim, the state of a worker as one read finds it, and why a claim was refused."""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Literal, NamedTuple

from sqlalchemy import Row, and_, bindparam, literal_column, or_, select

from ..database.clock import now
from ..database.tables import executions, workers
from ..schedule.parsing import parse_schedule
from ..schedule.periods import Schedule


@dataclass(frozen=True)
class Claim:
    """The right to run one tick of one worker, while the worker's row has this `id` and `token`.

    The token repeats if the database loses commits that it acknowledged. The id never repeats.
    """

    worker: str
    tick: datetime
    attempt: int
    token: int
    trigger: str
    execution: int | None
    """The id of the execution's row. None if that row was deleted by hand."""
    started_at: datetime | None = None
    id: str | None = None
    """Random. None if a user wrote the claim into the worker's row."""
    instance: str | None = None
    instance_name: str | None = None

    @property
    def idempotency_key(self) -> str:
        """A text that all attempts at this tick share, and no other tick has."""
        kind = "" if self.trigger == "schedule" else f"{self.trigger}:"
        return f"{self.worker}:{kind}{self.tick.isoformat()}"


@dataclass(frozen=True)
class WorkerState:
    """One worker's row, the claim in force (if any) and the database's clock, from one read."""

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
    has_strays: bool = False
    """True if an execution says "running" while its claim is not in force: the claim was ended by hand."""
    mark_ahead: datetime | None = None
    """The mark from a time when the clock was ahead. Ticks up to it may have run."""
    retry_at: datetime | None = None
    """The moment from which the pending tick may be retried, if it failed."""
    cancelled_at: datetime | None = None
    """The moment when a user cancelled the run in progress."""
    cancelled_by: str | None = None

    @property
    def cancels(self) -> dict[str, str | None]:
        """The id of the claim in force, with the user who cancelled it. Empty if no user did."""
        id = self.running.id if self.running and self.cancelled_at else None
        return {id: self.cancelled_by} if id else {}

    @property
    def is_bare(self) -> bool:
        """True if the execution of the claim in force has no row: that row was deleted by hand."""
        return self.running is not None and self.running.execution is None

    @property
    def is_damaged(self) -> bool:
        """True while the rows contradict each other, which only a change by hand can cause."""
        return self.is_bare or self.has_strays

    @property
    def overridden(self) -> bool:
        """True if `reschedule` replaced the declared schedule."""
        return self.schedule_text != self.declared

    @property
    def owed(self) -> datetime | None:
        """The tick that must run before any other.

        A pause delays the tick, unless a user requested it. If the clock was set back, the tick waits until it is due.
        A tick that failed waits for its backoff.
        """
        tick = self.pending_tick
        is_held_up = self.paused_at or (tick and max(tick, self.retry_at or tick) > self.clock)
        return None if is_held_up and self.pending_trigger != "manual" else tick

    @property
    def schedule(self) -> Schedule:
        """The schedule in force. Raises InvalidSchedule if this release cannot read its text."""
        return parse_schedule(self.schedule_text)


class NotClaimed(Enum):
    """Why a claim was refused. Falsy, so `if claim:` works."""

    DECIDED = "it is already decided"
    BLOCKED = "the worker is paused or running, or the tick is not due"

    def __bool__(self) -> Literal[False]:
        return False


DECIDED, BLOCKED = NotClaimed.DECIDED, NotClaimed.BLOCKED


# The execution of the claim in force.
is_of_claim = and_(
    executions.c.worker == workers.c.name,
    executions.c.token == workers.c.running,
    executions.c.claim.is_not_distinct_from(workers.c.claim),
)
# An execution that says "running" while its claim is not in force: a stray.
strays = executions.alias("strays")
is_stray = and_(
    strays.c.state == literal_column("'running'"),
    strays.c.worker == workers.c.name,
    or_(
        strays.c.token.is_(None),
        strays.c.token.is_distinct_from(workers.c.running),
        strays.c.claim.is_distinct_from(workers.c.claim),
    ),
)

STATES = select(
    workers,
    now().label("clock"),
    select(strays.c.id).where(is_stray).correlate(workers).exists().label("has_strays"),
    executions.c.id.label("execution"),
    executions.c.tick,
    executions.c.attempt,
    executions.c.trigger,
    executions.c.started_at,
    executions.c.progress_done,
    executions.c.progress_total,
    executions.c.instance,
    executions.c.instance_name,
    executions.c.cancelled_at,
    executions.c.cancelled_by,
).outerjoin(executions, is_of_claim)
# Built once, as building takes as long as reading.
ONE_STATE = STATES.where(workers.c.name == bindparam("name"))
BUSY_STATES = STATES.where(
    or_(
        workers.c.running.is_not(None),
        workers.c.pending_tick.is_not(None),
        workers.c.name.in_(select(strays.c.worker).where(strays.c.state == literal_column("'running'"))),
    )
)
SOME_STATES = STATES.where(workers.c.name.in_(bindparam("names", expanding=True)))


def state_of(row: Row[Any]) -> WorkerState:
    """Return the state in a row of `STATES`."""
    running, pending = _running(row) if row.running is not None else None, pending_of(row)
    return WorkerState(
        name=row.name,
        clock=row.clock,
        mark=row.mark,
        schedule_text=row.schedule,
        scheduled_at=row.scheduled_at,
        declared=row.declared,
        declared_by=row.declared_by,
        paused_at=row.paused_at,
        pending_tick=pending.tick,
        pending_trigger=row.pending_trigger,
        retry_at=pending.retry_at,
        running=running,
        started_at=running.started_at if running else None,
        progress_done=row.progress_done,
        progress_total=row.progress_total,
        instance=running.instance if running else None,
        instance_name=running.instance_name if running else None,
        has_strays=bool(row.has_strays),
        mark_ahead=row.mark_ahead,
        cancelled_at=row.cancelled_at,
        cancelled_by=row.cancelled_by,
    )


class Pending(NamedTuple):
    """The pending tick of a worker, and, if it failed, the moment from which it may be retried."""

    tick: datetime | None
    retry_at: datetime | None = None


def pending_of(row: Any) -> Pending:
    """Return what is pending by the columns of a worker's row. A failed tick is not, once the next tick is due."""
    tick, until = row.pending_tick, row.pending_until
    if tick is None or until is None or until <= tick or row.pending_trigger == "manual":
        return Pending(tick)
    return Pending(tick, row.pending_after) if until > row.clock else Pending(None)


def _running(row: Row[Any]) -> Claim:
    """Return the claim in force, from its execution, else from the copy in the worker's row.

    The copy serves if the execution was deleted by hand. If there is no copy, the claim was made by hand, and the
    newest decided tick counts as its tick.
    """
    name, token = row.name, row.running
    if row.execution is not None:
        began = row.started_at, row.claim, row.instance, row.instance_name
        return Claim(name, row.tick, row.attempt or 1, token, row.trigger, row.execution, *began)
    if row.claim is not None and row.claim_tick is not None:
        began = row.claim_at, row.claim, row.claim_instance, row.claim_instance_name
        return Claim(name, row.claim_tick, row.claim_attempt or 1, token, row.claim_trigger, None, *began)
    tick = row.mark or row.scheduled_at
    return Claim(name, tick, 1, token, "schedule", None, id=row.claim, instance_name="an unknown instance")

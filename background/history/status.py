"""The status of every worker in one read: running, paused, overdue or stuck."""

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, bindparam, case, func, select, true

from ..database.clock import AHEAD, elapsed, now
from ..database.tables import executions, instances, totals, workers
from ..errors import InvalidSchedule
from ..ledger.claim import is_of_claim, pending_of
from ..ledger.leases import is_alive
from ..schedule.parsing import parse_schedule
from ..stores import Stores
from ..worker import PeriodicWorker
from .text import span

LATE = timedelta(seconds=5)  # longer than an instance with a free thread needs to begin a tick
_LONG_SECONDS = 60.0
_MANY_PERIODS, _MANY_RUNS = 3, 10
_NO_TIME = timedelta()
_Ticks = tuple[datetime, datetime, timedelta] | tuple[None, None, None]
_NO_TICKS = None, None, None


class WorkerStatus(NamedTuple):
    """One worker that the database knows."""

    name: str
    is_running: bool
    is_paused: bool
    overdue_since: datetime | None
    """The first tick that waits, if the worker is overdue."""
    interval: timedelta | None
    """From tick to tick. None if this release should not run it."""
    waits_since: datetime | None
    """The first tick that is due and waits, if this release should run the worker."""
    waits_for: timedelta
    """The time that this tick has waited. Zero if no tick waits."""
    is_late: bool
    """True if this tick waits for longer than an instance needs to begin it, or no instance is alive."""
    stuck: str | None
    """The reason why its run counts as stuck. None if the run is in order, or nothing runs."""

    @property
    def is_overdue(self) -> bool:
        """True if this release should run it, and a tick of it waits although two later ticks came."""
        return self.overdue_since is not None


def statuses(
    stores: Stores, workers_here: Mapping[str, type[PeriodicWorker]], names: Collection[str] | None = None
) -> list[WorkerStatus]:
    """Return the status of every worker (of `names`) by the database's clock, sorted by name.

    `workers_here` are the workers of this release. Takes one query, and another while marks lie in the clock's future.
    """
    ours = {name: worker for name, worker in workers_here.items() if worker.enabled}
    # Read where the instances' rows are. On SQLite that is a file of its own, which can read the other rows too.
    rows = stores.leases.read(_every) if names is None else stores.leases.read(_some, {"names": [*names]})
    if not rows:
        return []
    seen = [*map(_Seen._make, rows)]
    future = seen[0].clock + AHEAD
    fleet = _Fleet(seen[0].clock, future, seen[0].alive_since, stores.lease.total_seconds())
    ahead = [each.name for each in seen if each.mark and each.mark > future]
    decided = dict(stores.leases.read(_decided_by_now, {"names": ahead})) if ahead else {}
    return [_status(fleet, each, decided.get(each.name, each.mark), ours.get(each.name)) for each in seen]


class _Fleet(NamedTuple):
    """The facts that hold for each worker."""

    clock: datetime
    future: datetime
    """A later moment was written while the clock was ahead."""
    alive_since: datetime | None
    """The start of the oldest living instance."""
    lease: float


class _Seen(NamedTuple):
    """The columns of one worker. Reading a field of SQLAlchemy's own rows takes ten times as long."""

    name: str
    mark: datetime | None
    schedule: str
    scheduled_at: datetime
    paused_at: datetime | None
    running: int | None
    clock: Any
    alive_since: Any
    """This and the clock are facts of the fleet. Only the first worker's row must have them."""
    pending_tick: datetime | None
    pending_trigger: str | None
    pending_after: datetime | None
    pending_until: datetime | None
    running_tick: datetime | None
    instance_name: str | None
    age: float | None
    usual: float | None
    is_alive: bool
    gone_for: float


_age = elapsed(executions.c.started_at, now())
_average = (
    select(func.sum(totals.c.seconds) / func.nullif(func.sum(totals.c.count), 0))
    .where(totals.c.worker == workers.c.name, totals.c.kind == "duration")
    .scalar_subquery()
)


def _seen(has_fleet: ColumnElement[bool]) -> Select[Any]:
    """Select each worker by name, with the facts of the fleet in the rows that `has_fleet` is true of."""
    return (
        select(
            workers.c.name,
            workers.c.mark,
            workers.c.schedule,
            workers.c.scheduled_at,
            workers.c.paused_at,
            workers.c.running,
            case((has_fleet, now())),
            case((has_fleet, select(func.min(instances.c.started_at)).where(is_alive).scalar_subquery())),
            workers.c.pending_tick,
            workers.c.pending_trigger,
            workers.c.pending_after,
            workers.c.pending_until,
            executions.c.tick,
            executions.c.instance_name,
            _age,
            case((_age > _LONG_SECONDS, _average)),
            is_alive,
            elapsed(func.coalesce(instances.c.expires_at, executions.c.started_at), now()),
        )
        .outerjoin(executions, is_of_claim)
        .outerjoin(instances, instances.c.id == executions.c.instance)
        .order_by(workers.c.name)
    )


_first = select(func.min(workers.alias().c.name)).scalar_subquery()
_every = _seen(workers.c.name == _first)
_some = _seen(true()).where(workers.c.name.in_(bindparam("names", expanding=True)))
# A mark in the clock's future says nothing about today. The history has the tick that was decided last.
_end = func.coalesce(executions.c.through, executions.c.tick)
_last_end = (
    select(_end)
    .where(executions.c.worker == workers.c.name, executions.c.trigger == "schedule", _end <= now())
    .order_by(executions.c.tick.desc(), executions.c.id.desc())
    .limit(1)
    .scalar_subquery()
)
_decided_by_now = select(workers.c.name, _last_end).where(workers.c.name.in_(bindparam("names", expanding=True)))


def _status(fleet: _Fleet, seen: _Seen, mark: datetime | None, worker: type[PeriodicWorker] | None) -> WorkerStatus:
    is_paused, is_running, clock = seen.paused_at is not None, seen.running is not None, fleet.clock
    # The claim of a gone instance is taken over only if another instance is alive.
    is_fleet_alive = fleet.alive_since is not None
    runs = is_running and is_fleet_alive
    first, third, interval = _ticks(fleet, seen, mark, worker) if worker and not is_paused else _NO_TICKS
    if first and first > clock and not is_running and not seen.pending_tick:  # as most workers, most of the time
        return WorkerStatus(seen.name, False, False, None, interval, None, _NO_TIME, False, None)
    waiting = _waiting(clock, seen, first) if worker and not runs else None
    waits_for = clock - waiting if waiting else _NO_TIME
    return WorkerStatus(
        seen.name,
        is_running,
        is_paused,
        first if third and third <= clock and not runs else None,
        interval,
        waiting,
        waits_for,
        waiting is not None and (waits_for > LATE or not is_fleet_alive),
        _stuck(seen, worker, interval, fleet.lease) if worker and is_running else None,
    )


def _waiting(clock: datetime, seen: _Seen, first: datetime | None) -> datetime | None:
    """Return the first tick that is due and does not run. A tick to run again comes before any other."""
    if seen.pending_tick and (first or seen.pending_trigger == "manual"):
        pending, retry_at = pending_of(seen._replace(clock=clock))
        if pending:
            since = retry_at or pending
            return since if since <= clock else None
    if first and seen.running_tick:
        first = min(seen.running_tick, first)
    return first if first and first <= clock else None


def _stuck(seen: _Seen, worker: type[PeriodicWorker], interval: timedelta | None, lease: float) -> str | None:
    """Return why the run in force will not end by itself, as far as the rows tell. None if it may."""
    if seen.age is None:
        return "its claim has no execution"
    if not seen.is_alive:
        is_taken_over = seen.gone_for <= lease + LATE.total_seconds()
        return None if is_taken_over else f"{seen.instance_name}, which runs it, is gone, and no instance takes it over"
    lasts = span(timedelta(seconds=seen.age))
    if worker.timeout is not None:
        is_over = seen.age > worker.timeout.total_seconds() + lease
        return f"it runs for {lasts}, past its timeout of {span(worker.timeout)}" if is_over else None
    longest = max(
        _LONG_SECONDS, _MANY_PERIODS * interval.total_seconds() if interval else inf, _MANY_RUNS * (seen.usual or 0)
    )
    if seen.age <= longest:
        return None
    return f"it runs for {lasts}, longer than three periods and ten times its average, and has no timeout"


def _ticks(fleet: _Fleet, seen: _Seen, mark: datetime | None, worker: type[PeriodicWorker]) -> _Ticks:
    """Return the first and the third undecided tick, and the interval. All None for a schedule of a newer release.

    Only moments up to now count: a later moment was written while the clock was ahead.
    """
    since = None
    # Without `catch_up`, ticks that fell due while no instance was up do not run.
    for at in (mark, seen.scheduled_at, None if worker.catch_up else fleet.alive_since):
        if at and at <= fleet.future and (since is None or at > since):
            since = at
    try:
        return _first_and_third(seen.schedule, since or fleet.clock)
    except InvalidSchedule:
        return _NO_TICKS


@lru_cache(maxsize=10_000)  # a cron's ticks are slow to compute, and stay the same until the next tick has run
def _first_and_third(schedule: str, since: datetime) -> tuple[datetime, datetime, timedelta]:
    ticks = parse_schedule(schedule)
    first = ticks.next(since)
    third = ticks.next(ticks.next(first))
    return first, third, (third - first) / 2

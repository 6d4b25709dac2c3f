"""The status of every worker in one read: running, paused, overdue or stuck."""

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

from sqlalchemy import Row, bindparam, case, func, select

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
_Ticks = tuple[datetime, datetime, timedelta]


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
    rows = stores.leases.read(_query if names is None else _query.where(workers.c.name.in_(names)))
    future = rows[0].clock + AHEAD if rows else None
    ahead = [row.name for row in rows if row.mark and row.mark > future]
    decided = dict(stores.leases.read(_decided_by_now, {"names": ahead})) if ahead else {}
    lease = stores.lease.total_seconds()
    return [_status(row, decided.get(row.name, row.mark), ours.get(row.name), lease) for row in rows]


_age = elapsed(executions.c.started_at, now())
_average = (
    select(func.sum(totals.c.seconds) / func.nullif(func.sum(totals.c.count), 0))
    .where(totals.c.worker == workers.c.name, totals.c.kind == "duration")
    .scalar_subquery()
)
_query = select(
    workers.c.name,
    workers.c.mark,
    workers.c.schedule,
    workers.c.scheduled_at,
    workers.c.paused_at,
    workers.c.running,
    now().label("clock"),
    select(func.min(instances.c.started_at)).where(is_alive).scalar_subquery().label("alive_since"),
    workers.c.pending_tick,
    workers.c.pending_trigger,
    workers.c.pending_after,
    workers.c.pending_until,
    executions.c.tick.label("running_tick"),
    executions.c.instance_name,
    _age.label("age"),
    case((_age > _LONG_SECONDS, _average)).label("usual"),
    is_alive.label("is_alive"),
    elapsed(func.coalesce(instances.c.expires_at, executions.c.started_at), now()).label("gone_for"),
)
_query = (
    _query.outerjoin(executions, is_of_claim)
    .outerjoin(instances, instances.c.id == executions.c.instance)
    .order_by(workers.c.name)
)
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


def _status(row: Row[Any], mark: datetime | None, worker: type[PeriodicWorker] | None, lease: float) -> WorkerStatus:
    is_paused, is_running, clock = row.paused_at is not None, row.running is not None, row.clock
    ticks = _ticks(row, mark, worker) if worker and not is_paused else None
    # The claim of a gone instance is taken over only if another instance is alive.
    is_fleet_alive = row.alive_since is not None
    runs = is_running and is_fleet_alive
    waiting = None if runs or not worker else _waiting(row, ticks)
    waits_for = clock - waiting if waiting else _NO_TIME
    interval = ticks[2] if ticks else None
    return WorkerStatus(
        row.name,
        is_running,
        is_paused,
        ticks[0] if ticks and ticks[1] <= clock and not runs else None,
        interval,
        waiting,
        waits_for,
        waiting is not None and (waits_for > LATE or not is_fleet_alive),
        _stuck(row, worker, interval, lease) if worker and is_running else None,
    )


def _waiting(row: Row[Any], ticks: _Ticks | None) -> datetime | None:
    """Return the first tick that is due and does not run. A tick to run again comes before any other."""
    pending, retry_at = pending_of(row)
    if pending and (row.pending_trigger == "manual" or ticks):
        since: datetime = retry_at or pending
        return since if since <= row.clock else None
    if not ticks:
        return None
    first = min(row.running_tick, ticks[0]) if row.running_tick else ticks[0]
    return first if first <= row.clock else None


def _stuck(row: Row[Any], worker: type[PeriodicWorker], interval: timedelta | None, lease: float) -> str | None:
    """Return why the run in force will not end by itself, as far as the rows tell. None if it may."""
    if row.age is None:
        return "its claim has no execution"
    if not row.is_alive:
        is_taken_over = row.gone_for <= lease + LATE.total_seconds()
        return None if is_taken_over else f"{row.instance_name}, which runs it, is gone, and no instance takes it over"
    lasts = span(timedelta(seconds=row.age))
    if worker.timeout is not None:
        is_over = row.age > worker.timeout.total_seconds() + lease
        return f"it runs for {lasts}, past its timeout of {span(worker.timeout)}" if is_over else None
    longest = max(
        _LONG_SECONDS, _MANY_PERIODS * interval.total_seconds() if interval else inf, _MANY_RUNS * (row.usual or 0)
    )
    if row.age <= longest:
        return None
    return f"it runs for {lasts}, longer than three periods and ten times its average, and has no timeout"


def _ticks(row: Row[Any], mark: datetime | None, worker: type[PeriodicWorker]) -> _Ticks | None:
    """Return the first and the third undecided tick, and the interval. None for a schedule of a newer release.

    Only moments up to now count: a later moment was written while the clock was ahead.
    """
    future, since = row.clock + AHEAD, None
    # Without `catch_up`, ticks that fell due while no instance was up do not run.
    for at in (mark, row.scheduled_at, None if worker.catch_up else row.alive_since):
        if at and at <= future and (since is None or at > since):
            since = at
    try:
        return _first_and_third(row.schedule, since or row.clock)
    except InvalidSchedule:
        return None


@lru_cache(maxsize=10_000)  # a cron's ticks are slow to compute, and stay the same until the next tick has run
def _first_and_third(schedule: str, since: datetime) -> _Ticks:
    ticks = parse_schedule(schedule)
    first = ticks.next(since)
    third = ticks.next(ticks.next(first))
    return first, third, (third - first) / 2

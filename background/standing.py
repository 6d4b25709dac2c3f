"""How every worker stands: whether it runs, is paused, or is overdue; for those who watch, in one read."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import Row, bindparam, func, select

from .clock import now, single_statements
from .errors import InvalidSchedule
from .instances import OFFSET_WARNED, is_alive
from .manager import BackgroundWorkerManager
from .models import executions, instances, workers
from .schedule import parse_schedule
from .worker import PeriodicWorker


@dataclass(frozen=True)
class Standing:
    """One worker that the database knows."""

    name: str
    is_running: bool
    is_paused: bool
    is_overdue: bool
    """Whether this release should run it, and a tick of it waits although two further ones have come."""
    overdue_since: datetime | None
    """The first tick that waits, of a worker that is overdue; else None."""
    interval: timedelta | None
    """From tick to tick; None where this release is not to run it."""


def standings(manager: BackgroundWorkerManager) -> list[Standing]:
    """Of every worker of the database by the database's clock, sorted by name.

    A constant number of queries: one, and another while marks lie in the clock's future.
    """
    ours = {name: worker for name, worker in manager.workers.items() if worker.enabled}
    # Where the instances are: on SQLite they have a file of their own, from which the workers' rows can be read too.
    with single_statements(manager.ticks.instances.engine).connect() as connection:
        rows = connection.execute(_query).all()
        ahead = [row.name for row in rows if row.mark and row.mark > row.clock + OFFSET_WARNED]
        decided = connection.execute(_decided_by_now, {"names": ahead}).all() if ahead else ()
    marks = {row.name: row.mark for row in rows} | {each[0]: each[1] for each in decided}
    return [_standing(row, marks[row.name], ours.get(row.name)) for row in rows]


_query = select(
    workers.c.name,
    workers.c.mark,
    workers.c.schedule,
    workers.c.scheduled_at,
    workers.c.paused_at,
    workers.c.running,
    now().label("clock"),
    select(func.min(instances.c.started_at)).where(is_alive).scalar_subquery().label("alive_since"),
).order_by(workers.c.name)

# A mark that a clock left in its future says nothing of today. The history says which tick was decided last.
_end = func.coalesce(executions.c.through, executions.c.tick)
_last_end = (
    select(_end)
    .where(executions.c.worker == workers.c.name, executions.c.trigger == "schedule", _end <= now())
    .order_by(executions.c.tick.desc(), executions.c.id.desc())
    .limit(1)
    .scalar_subquery()
)
_decided_by_now = select(workers.c.name, _last_end).where(workers.c.name.in_(bindparam("names", expanding=True)))


def _standing(row: Row[Any], mark: datetime | None, worker: type[PeriodicWorker] | None) -> Standing:
    is_paused, is_running = row.paused_at is not None, row.running is not None
    ticks = _ticks(row, mark, worker) if worker and not is_paused else None
    if ticks is None:
        return Standing(row.name, is_running, is_paused, False, None, None)
    first, third = ticks
    # The claim of an instance that is gone is taken over only where another instance is alive.
    runs = is_running and row.alive_since is not None
    is_overdue = third <= row.clock and not runs
    return Standing(row.name, is_running, is_paused, is_overdue, first if is_overdue else None, (third - first) / 2)


def _ticks(row: Row[Any], mark: datetime | None, worker: type[PeriodicWorker]) -> tuple[datetime, datetime] | None:
    """The first and the third tick that are not decided yet; None for a schedule that a newer release brought.

    Only moments up to now count: a later one was written while the clock was ahead.
    """
    known = [mark, row.scheduled_at]
    if not worker.catch_up:  # ticks that fell while no instance was up are not run
        known.append(row.alive_since)
    since = max((at for at in known if at and at <= row.clock + OFFSET_WARNED), default=row.clock)
    try:
        return _first_and_third(row.schedule, since)
    except InvalidSchedule:
        return None


@lru_cache(maxsize=10_000)  # a cron's arithmetic takes its time, and is the same until the next tick has run
def _first_and_third(schedule: str, since: datetime) -> tuple[datetime, datetime]:
    ticks = parse_schedule(schedule)
    first = ticks.next(since)
    return first, ticks.next(ticks.next(first))

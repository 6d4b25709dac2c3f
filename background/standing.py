"""How every worker stands: whether it runs, is paused, or is overdue; for those who watch, in one read."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import Row, func, select

from .clock import now, single_statements
from .errors import InvalidSchedule
from .instances import is_alive
from .manager import BackgroundWorkerManager
from .models import instances, workers
from .schedule import parse_schedule
from .worker import PeriodicWorker


@dataclass(frozen=True)
class Standing:
    """One worker that the database knows."""

    name: str
    is_running: bool
    is_paused: bool
    is_overdue: bool
    """Whether this release is to run it, and a tick of it waits although two further ones have come."""
    interval: timedelta | None
    """From tick to tick; None where this release is not to run it."""


def standings(manager: BackgroundWorkerManager) -> list[Standing]:
    """Of every worker of the database by the database's clock, sorted by name; a constant number of queries: one."""
    ours = {name: worker for name, worker in manager.workers.items() if worker.enabled}
    # Where the instances are: on SQLite they have a file of their own, from which the workers' rows can be read too.
    with single_statements(manager.ticks.instances.engine).connect() as connection:
        return [_standing(row, ours.get(row.name)) for row in connection.execute(_query)]


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


def _standing(row: Row[Any], worker: type[PeriodicWorker] | None) -> Standing:
    is_paused, is_running = row.paused_at is not None, row.running is not None
    ticks = _ticks(row, worker) if worker and not is_paused else None
    if ticks is None:
        return Standing(row.name, is_running, is_paused, False, None)
    first, third = ticks
    # A claim of somebody who is gone is taken over, where anybody is left to do so.
    runs = is_running and row.alive_since is not None
    return Standing(row.name, is_running, is_paused, third <= row.clock and not runs, (third - first) / 2)


def _ticks(row: Row[Any], worker: type[PeriodicWorker]) -> tuple[datetime, datetime] | None:
    """The first and the third tick that nobody has decided yet; None for a schedule that a newer release brought."""
    since = max(row.mark or row.scheduled_at, row.scheduled_at)
    if not worker.catch_up and row.alive_since is not None:  # what fell while nobody was up is not run any more
        since = max(since, row.alive_since)
    try:
        return _first_and_third(row.schedule, since)
    except InvalidSchedule:
        return None


@lru_cache(maxsize=10_000)  # a cron's arithmetic takes its time, and is the same until the next tick has run
def _first_and_third(schedule: str, since: datetime) -> tuple[datetime, datetime]:
    ticks = parse_schedule(schedule)
    first = ticks.next(since)
    return first, ticks.next(ticks.next(first))

"""Reads the fleet's figures from the database, which any instance can do.

The number of queries does not depend on the number of workers. No query reads executions or done messages, because
`background_totals` has their sums.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import String, and_, case, cast, func, select
from sqlalchemy.exc import SQLAlchemyError

from ..database.clock import elapsed, now
from ..database.tables import instances, totals
from ..errors import first_line
from ..history.browsing.topics import Topic
from ..history.status import WorkerStatus, statuses
from ..host.logs import Outage, logger_of
from ..ledger.leases import is_alive
from ..manager import BackgroundWorkerManager, the_manager
from .timebox import Timebox

log = logger_of(__name__)

_ANSWER_SECONDS = 5.0  # Prometheus waits for ten


class Total(NamedTuple):
    """The sums of one kind and worker."""

    numbers: dict[str, int]
    """The count of each label."""
    seconds: float
    age: float | None
    """The seconds since the latest success. None if there was no success, or the kind is not "state"."""


NOTHING = Total({}, 0.0, None)
Totals = Mapping[str, Mapping[str, Total]]
"""The totals by kind and worker."""


@dataclass(frozen=True)
class Figures:
    """The figures that one scrape reads."""

    totals: Totals
    statuses: list[WorkerStatus]
    offsets: dict[str, float]
    """The seconds by which a host's clock is ahead of the database's, by "host:pid" of each live instance."""
    alive: int
    topics: list[Topic]


class Fleet:
    """Reads the figures of the fleet. Notices if the database is away or hangs."""

    def __init__(self) -> None:
        self._timebox = Timebox(_figures, _ANSWER_SECONDS)
        self._outage = Outage()

    def figures(self) -> Figures | None:
        """Read the figures. None if the database does not answer in time."""
        try:
            found = self._timebox.answer(the_manager())
        except (SQLAlchemyError, OSError) as error:  # TimeoutError is an OSError
            log.log(self._outage.level(), "No figures of the fleet: %s", first_line(error))
            return None
        self._outage.ended()
        return found


def _figures(manager: BackgroundWorkerManager) -> Figures:
    manager.stores.connections.refuse_missing()
    sums, alive = _sums(manager.stores.main.read(_totals)), manager.stores.leases.read(_alive)
    # If containers share a host name and a process id, the largest offset is reported.
    known = sorted((row for row in alive if row.clock_offset is not None), key=lambda row: abs(row.clock_offset))
    offsets = {f"{row.host}:{row.pid}": -row.clock_offset for row in known}
    return Figures(sums, statuses(manager.stores, manager.workers), offsets, len(alive), manager.messages.depths())


def _sums(rows: Iterable[Any]) -> Totals:
    found: dict[str, dict[str, Total]] = defaultdict(dict)
    for kind, worker, numbers, seconds, age in rows:
        pairs = (pair.rpartition("=") for pair in numbers.split(","))
        counts = {label: int(number) for label, _, number in pairs if number.isdecimal()}  # a user may have typed text
        found[kind][worker] = Total(counts, seconds, age)
    return found


_is_success = and_(totals.c.kind == "state", totals.c.label == "succeeded")
# The database joins the labels of a worker into one row. 1,000 workers would be 25,000 rows otherwise.
_totals = select(
    totals.c.kind,
    totals.c.worker,
    func.aggregate_strings(totals.c.label + "=" + cast(totals.c.count, String), ","),
    func.sum(totals.c.seconds),
    func.max(case((_is_success, elapsed(totals.c.latest_at, now())))),
).group_by(totals.c.worker, totals.c.kind)
_alive = select(instances.c.host, instances.c.pid, instances.c.clock_offset).where(is_alive)

"""The fleet's figures, which any instance reads from the database.

Each time it is a constant number of queries, whatever the number of workers, and none reads the executions or the
messages that are done: `background_totals` has their sums.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection, String, and_, case, cast, func, select
from sqlalchemy.exc import SQLAlchemyError

from ..database.clock import elapsed, now, single_statements
from ..database.connections import again_if_stale
from ..database.tables import instances, totals
from ..errors import first_line
from ..history.messages import Topic
from ..history.status import WorkerStatus, statuses
from ..host.logs import Outage, logger_of
from ..ledger.leases import is_alive
from ..manager import BackgroundWorkerManager, the_manager
from .timebox import Timebox

log = logger_of(__name__)

_ANSWER_SECONDS = 5.0  # Prometheus waits for ten


class Total(NamedTuple):
    """What is counted of one kind and worker."""

    numbers: dict[str, int]
    """By label."""
    seconds: float
    age: float | None
    """Since the latest success, of states that have any."""


NOTHING = Total({}, 0.0, None)
Totals = Mapping[str, Mapping[str, Total]]
"""By kind and worker."""


@dataclass(frozen=True)
class Figures:
    """What one scrape reads."""

    totals: Totals
    statuses: list[WorkerStatus]
    offsets: dict[str, float]
    """How many seconds the clock of each host is ahead of the database's, by "host:pid" of those alive."""
    alive: int
    topics: list[Topic]


class Fleet:
    """Reads the figures of the fleet; that the database is away, or hangs, is an answer too."""

    def __init__(self) -> None:
        self._prompt = Timebox(_figures, _ANSWER_SECONDS)
        self._outage = Outage()

    def figures(self) -> Figures | None:
        """None where the database does not answer in time."""
        try:
            found = self._prompt.answer(the_manager())
        except (SQLAlchemyError, OSError) as error:  # TimeoutError is one
            log.log(self._outage.level(), "No figures of the fleet: %s", first_line(error))
            return None
        self._outage.ended()
        return found


def _figures(manager: BackgroundWorkerManager) -> Figures:
    return again_if_stale(lambda: _read(manager))


def _read(manager: BackgroundWorkerManager) -> Figures:
    manager.stores.connections.refuse_missing()
    with single_statements(manager.stores.main.engine).connect() as connection:
        sums = _read_totals(connection)
    with single_statements(manager.stores.leases.engine).connect() as connection:
        alive = connection.execute(_alive).all()
    # Where containers share a host name and a process id, the one that is furthest off has the last word.
    known = sorted((row for row in alive if row.clock_offset is not None), key=lambda row: abs(row.clock_offset))
    offsets = {f"{row.host}:{row.pid}": -row.clock_offset for row in known}
    return Figures(sums, statuses(manager.stores, manager.workers), offsets, len(alive), manager.messages.depths())


def _read_totals(connection: Connection) -> Totals:
    found: dict[str, dict[str, Total]] = defaultdict(dict)
    for kind, worker, numbers, seconds, age in connection.execute(_totals):
        pairs = (pair.split("=") for pair in numbers.split(","))
        found[kind][worker] = Total({label: int(number) for label, number in pairs}, seconds, age)
    return found


_is_success = and_(totals.c.kind == "state", totals.c.label == "succeeded")
# Put together by the database: 1,000 workers would be 25,000 rows to fetch otherwise.
_totals = select(
    totals.c.kind,
    totals.c.worker,
    func.aggregate_strings(totals.c.label + "=" + cast(totals.c.count, String), ","),
    func.sum(totals.c.seconds),
    func.max(case((_is_success, elapsed(totals.c.latest_at, now())))),
).group_by(totals.c.worker, totals.c.kind)
_alive = select(instances.c.host, instances.c.pid, instances.c.clock_offset).where(is_alive)

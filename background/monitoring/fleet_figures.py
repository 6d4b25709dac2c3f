"""Reads the fleet's figures from the database, which any instance can do.

The number of queries does not depend on the number of workers. No query reads executions or done messages, because
`background_totals` has their sums. For many workers, the database adds up the buckets of their histograms.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from sqlalchemy import and_, case, func, null, select, union_all
from sqlalchemy.exc import SQLAlchemyError

from ..database.clock import elapsed, now
from ..database.store import Store
from ..database.tables import instances, totals, workers
from ..errors import first_line
from ..history.browsing.topics import Topic
from ..history.status import WorkerStatus, statuses
from ..host.logs import Outage, logger_of
from ..ledger.leases import is_alive
from ..manager import BackgroundWorkerManager, the_manager
from .timebox import Timebox, begun

log = logger_of(__name__)

_ANSWER_SECONDS = 5.0  # Prometheus waits for ten
_MANY_WORKERS = 250  # with their full detail, a scrape has about 1 MB


@dataclass(slots=True)
class Total:
    """The sums of one kind and worker."""

    numbers: dict[str, int] = field(default_factory=dict)
    """The count of each label. Empty for a histogram if there are many workers."""
    executions: int = 0
    seconds: float = 0.0
    age: float | None = None
    """The seconds since the latest success. None if there was no success, or the kind is not "state"."""

    def add(self, label: str | None, number: int, seconds: float, age: float | None) -> None:
        """Add the count of a label, or of all labels."""
        if label is not None:
            self.numbers[label] = number
        self.executions += number
        self.seconds += seconds
        self.age = self.age if age is None else age


Totals = Mapping[str, Mapping[str, Total]]
"""The totals by kind and worker."""


@dataclass(frozen=True)
class Figures:
    """The figures that one scrape reads."""

    totals: Totals
    are_many: bool
    """True if there are many workers. Their totals have less detail then."""
    buckets: Mapping[str, Mapping[str, int]]
    """The counts of the histograms of many workers together, by kind and label. Empty for few workers."""
    statuses: list[WorkerStatus]
    offsets: dict[str, float]
    """The seconds by which a host's clock is ahead of the database's, by "host:pid" of each live instance."""
    alive: int
    topics: list[Topic]


class Fleet:
    """Reads the figures of the fleet. Notices if the database is away or hangs."""

    def __init__(self) -> None:
        self._timeboxes = {
            is_full: Timebox(partial(_figures, is_full=is_full), _ANSWER_SECONDS) for is_full in (False, True)
        }
        self._outage = Outage()

    def figures(self, is_full: bool = False) -> Figures | None:
        """Read the figures, with full detail or with the detail for their number of workers.

        None if the database does not answer in time.
        """
        try:
            found = self._timeboxes[is_full].answer(the_manager())
        except (SQLAlchemyError, OSError) as error:  # TimeoutError is an OSError
            log.log(self._outage.level(), "No figures of the fleet: %s", first_line(error))
            return None
        self._outage.ended()
        return found


def _figures(manager: BackgroundWorkerManager, is_full: bool) -> Figures:
    manager.stores.connections.refuse_missing()
    main = manager.stores.main
    are_many = not is_full and main.read(_number_of_workers)[0][0] > _MANY_WORKERS
    read = partial(_read_sums, main, are_many)
    # PostgreSQL answers two queries at a time. SQLite reads in this process, where two threads slow each other down.
    reading = None if main.on_sqlite else begun(read)
    found = statuses(manager.stores, manager.workers)
    sums, buckets = reading.result() if reading else read()
    alive = manager.stores.leases.read(_alive)
    # If containers share a host name and a process id, the largest offset is reported.
    known = sorted((row for row in alive if row.clock_offset is not None), key=lambda row: abs(row.clock_offset))
    offsets = {f"{row.host}:{row.pid}": -row.clock_offset for row in known}
    return Figures(sums, are_many, buckets, found, offsets, len(alive), manager.messages.depths())


def _read_sums(main: Store, are_many: bool) -> tuple[Totals, dict[str, dict[str, int]]]:
    rows = main.read(_totals_of_many if are_many else _totals)
    found: dict[str, dict[str, Total]] = defaultdict(dict)
    buckets: dict[str, dict[str, int]] = defaultdict(dict)
    for kind, worker, label, number, seconds, age in rows:
        if worker is None:
            buckets[kind][label] = number
        elif (total := found[kind].get(worker)) is not None:
            total.add(label, number, seconds, age)
        else:
            found[kind][worker] = Total({} if label is None else {label: number}, number, seconds, age)
    if are_many:
        found["duration"] = {worker: _durations(total) for worker, total in found["state"].items()}
    return found, buckets


def _durations(of_states: Total) -> Total:
    """Return the number and the sum of the durations. A tick that was skipped or missed has no duration."""
    not_run = of_states.numbers.get("skipped", 0) + of_states.numbers.get("missed", 0)
    return Total({}, of_states.executions - not_run, of_states.seconds)


_kind, _worker, _label, _number, _seconds = (totals.c[name] for name in ("kind", "worker", "label", "count", "seconds"))
_is_success = and_(_kind == "state", _label == "succeeded")
_totals = select(_kind, _worker, _label, _number, _seconds, case((_is_success, elapsed(totals.c.latest_at, now()))))
# Of many workers: each state, the sum of each worker's lateness, and each bucket of all workers together.
_lateness = select(_kind, _worker, null(), func.sum(_number), func.sum(_seconds), null()).where(_kind == "lateness")
_buckets = select(_kind, null(), _label, func.sum(_number), null(), null()).where(_kind != "state")
_totals_of_many = union_all(
    _totals.where(_kind == "state"), _lateness.group_by(_kind, _worker), _buckets.group_by(_kind, _label)
)
_number_of_workers = select(func.count()).select_from(workers)
_alive = select(instances.c.host, instances.c.pid, instances.c.clock_offset).where(is_alive)

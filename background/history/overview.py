"""Every worker at a glance: its schedule, its next tick, its last tick, and its run."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import and_, func, or_, select

from ..database.tables import totals
from ..errors import InvalidSchedule
from ..ledger.claim import Claim, WorkerState
from ..registry import checked_schedule, schedule_in_force
from ..schedule.periods import Schedule
from ..stores import Stores
from ..worker import PeriodicWorker
from .browsing.topics import Topic
from .executions import History
from .instances import InstanceHistory
from .records import FAILED, Record
from .status import WorkerStatus, statuses

PROBLEMS = ("overdue", "stuck", "failed", "dead")
STATES = (*PROBLEMS, "running", "paused", "disabled")
_NONE: frozenset[str] = frozenset()


class ListedWorker(NamedTuple):
    """One worker among all workers, with its states. A message worker has its topic."""

    name: str
    states: frozenset[str]
    """Some of STATES. A worker may have several: it runs, and its last run failed."""
    topic: Topic | None = None

    @property
    def has_problem(self) -> bool:
        return not self.states.isdisjoint(PROBLEMS)


def listed_workers(
    stores: Stores, ours: Mapping[str, type[PeriodicWorker]], found: Sequence[WorkerStatus], topics: Sequence[Topic]
) -> list[ListedWorker]:
    """Return every worker of this release and of the database, in one query. Problems come first, then names.

    `found` are the statuses of all workers.
    """
    failed = {name for (name,) in stores.ledger.store.read(_failed)}
    status = {each.name: each for each in found}
    periodic = [
        ListedWorker(name, _states(ours.get(name), status.get(name), name in failed)) for name in {*ours, *status}
    ]
    of_topics = [ListedWorker(each.worker, _states_of(each), each) for each in topics if each.worker]
    by_name = sorted((*periodic, *of_topics), key=itemgetter(0))
    return sorted(by_name, key=lambda each: not (each.states and each.has_problem))


def _states(worker: type[PeriodicWorker] | None, status: WorkerStatus | None, has_failed: bool) -> frozenset[str]:
    found = ["failed"] if has_failed else []
    if worker is not None and not worker.enabled:
        found.append("disabled")
    if status is not None:
        if status.is_late:
            found.append("overdue")
        if status.stuck is not None:
            found.append("stuck")
        if status.is_running:
            found.append("running")
        if status.is_paused:
            found.append("paused")
    return frozenset(found) if found else _NONE


def _states_of(topic: Topic) -> frozenset[str]:
    states = {"failed": topic.retrying, "dead": topic.dead, "running": topic.running, "paused": topic.paused_at}
    return frozenset(name for name, is_so in states.items() if is_so)


# The workers whose last outcome is a failure, from the few counters of each worker.
_succeeded_at = func.max(totals.c.latest_at).filter(totals.c.label == "succeeded")
_failed_at = func.max(totals.c.latest_at).filter(totals.c.label != "succeeded")
_failed = (
    select(totals.c.worker)
    .where(totals.c.kind == "state", totals.c.label.in_(("succeeded", *FAILED)))
    .group_by(totals.c.worker)
    .having(and_(_failed_at.is_not(None), or_(_succeeded_at.is_(None), _failed_at > _succeeded_at)))
)


def overview(
    stores: Stores,
    ours: Mapping[str, type[PeriodicWorker]],
    names: Collection[str] | None = None,
    found: Sequence[WorkerStatus] | None = None,
    clock: datetime | None = None,
) -> list[dict[str, Any]]:
    """Return every worker (of `names`) of this release and of the database, in a constant number of queries.

    `found` are the statuses of all workers and `clock` is the database's, if the caller has read them.
    """
    instances = InstanceHistory(stores.leases)
    history = History(stores.ledger, instances)
    clock, states, latest = clock or history.clock(), stores.ledger.states(names), history.latest(names)
    gone = instances.gone({state.instance for state in states.values() if state.instance})
    status = {each.name: each for each in (statuses(stores, ours, names) if found is None else found)}
    known = ours.keys() if names is None else ours.keys() & names
    return [
        _overview(name, ours.get(name), clock, states.get(name), latest.get(name), gone) | _trouble(status.get(name))
        for name in sorted(known | states.keys())
    ]


def _overview(
    name: str,
    worker: type[PeriodicWorker] | None,
    clock: datetime,
    state: WorkerState | None,
    last: Record | None,
    gone: set[str],
) -> dict[str, Any]:
    schedule = readable_schedule(worker, state)
    paused_at = state.paused_at if state else None
    runs = worker is not None and worker.enabled and not paused_at
    return {
        "name": name,
        "schedule": schedule.describe() if schedule else None,
        "declared": checked_schedule(worker).describe() if worker else None,
        "next_tick": schedule.next(_decided(clock, state)) if runs and schedule else None,
        "last": last.as_dict() if last else None,
        "running": _running(state, state.running, gone) if state and state.running else None,
        "pending_tick": state.pending_tick if state else None,
        "retry_at": state.retry_at if state else None,
        "paused_at": paused_at,
        "enabled": worker.enabled if worker else None,
        "in_this_release": worker is not None,
    }


def _decided(clock: datetime, state: WorkerState | None) -> datetime:
    """Return now, or the mark if it lies in the future, as after a clock that was ahead."""
    return max(clock, state.mark) if state and state.mark else clock


def _trouble(status: WorkerStatus | None) -> dict[str, Any]:
    """Return since when a tick of the worker waits, and why its run is stuck. None if all is well."""
    if status is None:
        return {"overdue_since": None, "stuck": None}
    return {"overdue_since": status.waits_since if status.is_late else None, "stuck": status.stuck}


def _running(state: WorkerState, claim: Claim, gone: set[str]) -> dict[str, Any]:
    return {
        "tick": claim.tick,
        "attempt": claim.attempt,
        "token": claim.token,
        "execution": claim.execution,
        "started_at": state.started_at,
        "progress_done": state.progress_done,
        "progress_total": state.progress_total,
        "cancelled_at": state.cancelled_at,
        "cancelled_by": state.cancelled_by,
        "instance": state.instance_name,
        "instance_id": state.instance,
        "is_gone": state.instance in gone,
    }


def readable_schedule(worker: type[PeriodicWorker] | None, state: WorkerState | None) -> Schedule | None:
    """Return the schedule in force. None if this release cannot read it."""
    try:
        return schedule_in_force(worker, state)
    except InvalidSchedule:
        return None

"""Every worker at a glance: its schedule, its next tick, its last tick, and its run."""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from ..errors import InvalidSchedule
from ..ledger.claim import Claim, WorkerState
from ..registry import declared_schedule, schedule_in_force
from ..schedule.periods import Schedule
from ..stores import Stores
from ..worker import PeriodicWorker
from .executions import History
from .instances import InstanceHistory
from .records import Record
from .status import WorkerStatus, statuses


def overview(
    stores: Stores, ours: Mapping[str, type[PeriodicWorker]], names: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Return every worker (of `names`) of this release and of the database, in a constant number of queries."""
    instances = InstanceHistory(stores.leases)
    history = History(stores.ledger, instances)
    clock, states, latest = history.clock(), stores.ledger.states(names), history.latest(names)
    gone = instances.gone({state.instance for state in states.values() if state.instance})
    status = {each.name: each for each in statuses(stores, ours)}
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
    schedule = _readable_schedule(worker, state)
    paused_at = state.paused_at if state else None
    runs = worker is not None and worker.enabled and not paused_at
    return {
        "name": name,
        "schedule": schedule.describe() if schedule else None,
        "declared": declared_schedule(worker).describe() if worker else None,
        "next_tick": schedule.next(_decided(clock, state)) if runs and schedule else None,
        "last": last.as_dict() if last else None,
        "running": _running(state, state.running, gone) if state and state.running else None,
        "pending_tick": state.pending_tick if state else None,
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


def _readable_schedule(worker: type[PeriodicWorker] | None, state: WorkerState | None) -> Schedule | None:
    """Return the schedule in force. None if this release cannot read it."""
    try:
        return schedule_in_force(worker, state)
    except InvalidSchedule:
        return None

"""Answers why a tick did not run, in one sentence made from the rows. Time is an argument."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from ..errors import spelled_out
from ..ledger.claim import WorkerState
from ..registry import schedule_in_force
from ..worker import PeriodicWorker
from .records import Record, Surroundings
from .text import cancelled, moment, progress, second, span

FINE = ("succeeded", "running", "not due")
_JUST = timedelta(seconds=5)


@dataclass(frozen=True)
class Answer:
    """The answer about one tick."""

    worker: str
    at: datetime
    tick: datetime
    state: str
    """The state of the execution.

    Without an execution: "not due", "waiting", "overdue", "paused", "disabled", "missed", "before" (the schedule),
    "pruned", "unrecorded" or "unknown".
    """
    sentence: str
    records: tuple[Record, ...] = ()

    @property
    def is_fine(self) -> bool:
        """True if nothing is wrong: it succeeded, it runs, or it is not due."""
        return self.state in FINE


@dataclass(frozen=True)
class Known:
    """The worker and the settings of this release. `worker` is None if this release does not have it."""

    worker: type[PeriodicWorker] | None
    history_days: float


def why(around: Surroundings, worker: type[PeriodicWorker] | None, history_days: float) -> Answer:
    """Say what happened to the tick that `around.at` belongs to: the latest tick up to then.

    `worker` is None if this release does not have it. Then `around.state` is not None.
    """
    known = Known(worker, history_days)
    tick = schedule_in_force(worker, around.state).previous(around.at)
    last = around.records[-1] if around.records else None
    if last and not last.covers(tick):
        tick = last.tick
    state, clause = (last.state, _recorded(around, known)) if last else _unrecorded(around, known, tick)
    subject = f"The tick {moment(tick)} of {around.name}"
    if last and last.trigger == "manual":
        subject = _manual(last)
    elif around.manual:
        run = replace(around, records=(around.manual,))
        clause = f"{clause}. {_manual(around.manual)} {_recorded(run, known)}"
    return Answer(around.name, around.at, tick, state, spelled_out(f"{subject} {clause}."), around.records)


def if_it_fails(worker: type[PeriodicWorker], state: WorkerState | None) -> str:
    """Return a sentence if a failed tick is tried again, but not the run that a user requested. Otherwise ""."""
    if state is None or worker.on_failed == "skip":
        return ""
    trigger = state.running.trigger if state.running else state.pending_trigger
    return " If this manual run fails, it is not tried again." if trigger == "manual" else ""


def _manual(record: Record) -> str:
    return f"The manual run of {record.worker} asked for at {moment(record.tick)}"


# -- a tick with a row ---------------------------------------------------------------------------


def _recorded(around: Surroundings, known: Known) -> str:
    record = around.records[-1]
    began = f"at {second(record.started_at)} on {record.instance_name}" if record.started_at else ""
    took = span(record.duration) if record.duration is not None else ""
    match record.state:
        case "succeeded":
            return f"ran {began} and succeeded in {took}{_tries(around.records)}"
        case "failed":
            failed = f"ran {began} and failed after {took}{_tries(around.records)}: {_clause(record.last_line)}"
            return failed + _retried(around, known, record)
        case "timed out":
            return f"ran {began} and timed out after {took}{_tries(around.records)}: it {_clause(record.last_line)}"
        case "cancelled":
            reason = f": {_clause(record.last_line)}" if record.last_line else ""
            return f"ran {began} for {took} and was {_cancelled(record)}{_tries(around.records)}{reason}"
        case "running":
            return _running(around, record, began, took)
        case "lost":
            return _given_up(around, known, record)
        case "handed back":
            return _handed_back(around, record)
        case "skipped":
            return f"was skipped, as the worker was {_clause(record.last_line)}{_range(record)}"
        case _:
            return _missed(record)


def _cancelled(record: Record) -> str:
    return cancelled(record.cancelled_at, record.cancelled_by)


def _running(around: Surroundings, record: Record, began: str, took: str) -> str:
    if record.cancelled_at:
        ending = "its instance is gone" if record.is_gone else "it has been asked to stop"
        return f"began {began} and was {_cancelled(record)}: {ending}"
    if record.is_gone:
        return f"began {began}, which is gone: will be taken over{_by_instance(around)}"
    return f"has been running for {took}, since {began.removeprefix('at ')}{progress(record)}{_tries(around.records)}"


def _given_up(around: Surroundings, known: Known, record: Record) -> str:
    lost = f"was lost at {second(record.finished_at)} ({_clause(record.last_line)})"
    if _is_pending(around, record):
        return f"{lost}; attempt {(record.attempt or 0) + 1} follows{_by_instance(around)}"
    if known.worker and known.worker.on_lost == "skip":
        return f"{lost} and is given up, as {known.worker.__name__} has on_lost = 'skip'"
    most = f" of {known.worker.max_attempts}" if known.worker else ""
    return f"{lost} and is given up after attempt {record.attempt}{most}"


def _retried(around: Surroundings, known: Known, record: Record) -> str:
    """Say which attempt follows a failed attempt. Empty if a failed run of the worker is not retried."""
    attempt = record.attempt or 1
    if _is_pending(around, record) and around.state and around.state.retry_at:
        return f"; attempt {attempt + 1} follows at {second(around.state.retry_at)}{_by_instance(around)}"
    if known.worker is None or known.worker.on_failed == "skip":
        return ""
    if record.trigger == "manual":
        return "; a manual run is not tried again"
    if attempt < known.worker.max_attempts:
        return f"; attempt {attempt + 1} did not follow, as the next tick came first"
    return f"; it is given up after attempt {attempt} of {known.worker.max_attempts}"


def _handed_back(around: Surroundings, record: Record) -> str:
    back = f"was handed back by {record.instance_name} at {second(record.finished_at)}"
    if _is_pending(around, record):
        return f"{back}; it will be run again{_by_instance(around)}"
    return f"{back} and was not run again"


def _missed(record: Record) -> str:
    found = f"one did at {second(record.finished_at)}, and of several that are due only the latest tick runs"
    if record.through is None or record.through == record.tick:
        return f"was missed, as no instance came to run it in time: {found}"
    until = f"between {moment(record.tick)} and {moment(record.through)}"
    return f"was missed, as no instance came to run it in time, nor any other tick {until}: {found}"


def _tries(records: tuple[Record, ...]) -> str:
    """Tell of the attempts before the last attempt."""
    *earlier, last = records
    if not earlier:
        return ""
    before = earlier[-1]
    reason = f" ({_clause(before.last_line)})" if before.last_line else ""
    times = f"{len(earlier)} times it ended before, the last was" if len(earlier) > 1 else "the one before was"
    return f" (attempt {last.attempt}; {times} {before.state} on {before.instance_name}{reason})"


def _range(record: Record) -> str:
    if record.through is None or record.through == record.tick:
        return ""
    return f", like every tick from {moment(record.tick)} to {moment(record.through)}"


def _is_pending(around: Surroundings, record: Record) -> bool:
    return around.state is not None and around.state.pending_tick == record.tick


def _by_instance(around: Surroundings) -> str:
    """Name the instance that will run it, or the obstacle."""
    if around.state and around.state.paused_at and not around.state.owed:
        return f", once the worker is resumed (it is paused since {second(around.state.paused_at)})"
    if around.alive:
        return f" by {_alive(around)}"
    return f" by the next instance that starts: {_no_instance(around)}"


# -- a tick without a row ------------------------------------------------------------------------


def _unrecorded(around: Surroundings, known: Known, tick: datetime) -> tuple[str, str]:
    state = around.state
    if state and state.running and state.is_bare and state.running.tick == tick:
        where = f"is claimed by {_where(state, around)}"
        return "running", f"{where}, but its row was deleted by hand, and the fleet writes it again within a lease"
    if state and state.mark and tick <= state.mark and around.clock < state.mark:
        became = "unrecorded" if tick > around.clock else "overdue"
        is_proven = state.mark <= around.clock + timedelta(days=known.history_days)  # as ClockRepair decides
        go_on = (
            "go on once the clock has been right for the length of a lease, or by `flask workers repair`"
            if is_proven
            else "go on by `flask workers repair` only, because the history is shorter than that"
        )
        return became, (
            f"waits: the database's clock was ahead, so the worker's ticks are decided up to {moment(state.mark)}, "
            f"and {go_on}"
        )
    if tick > around.clock:
        return "not due", f"is not due yet: it comes in {span(tick - around.clock)}{_unless(around, known)}"
    if state is None:
        return (
            "unknown",
            f"did not run: no instance has ever started the worker on this database{_unless(around, known)}",
        )
    if tick < state.scheduled_at:
        has_followed = around.before is not None and state.mark is not None and tick <= state.mark
        if has_followed or tick != state.schedule.previous(around.clock):
            return "before", _before(around, state)
        if not (state.mark is None and around.alive):
            first = state.schedule.next(state.scheduled_at)
            return "before", f"is older than its schedule ({_since(state)}), whose first tick is {moment(first)}"
    if state.mark is not None and tick <= state.mark:
        return _without_row(around, known, tick)
    return _untaken(around, known, tick, state)


def _before(around: Surroundings, state: WorkerState) -> str:
    if around.before is not None:
        last = around.before
        before = f"the last tick of the schedule before it, {moment(last.through or last.tick)}, is {last.state}"
        return f"is not a tick of the current schedule, which is newer ({_since(state)}); {before}"
    if around.oldest is not None and around.oldest < state.schedule.previous(state.scheduled_at):
        return f"is older than the history of this worker, which begins with {moment(around.oldest)}"
    return f"was before this database knew the worker or its schedule ({_since(state)})"


def _without_row(around: Surroundings, known: Known, tick: datetime) -> tuple[str, str]:
    if around.clock - tick > timedelta(days=known.history_days) and around.before is None:
        kept = f"goes back to {moment(around.oldest)}" if around.oldest else "is empty"
        return "pruned", (
            f"is decided, but the history no longer has it: the history of the worker {kept} "
            f"(WORKERS_HISTORY_DAYS is {known.history_days:g})"
        )
    between = "no row tells of it"
    if around.before and around.after:
        last, first = moment(around.before.through or around.before.tick), moment(around.after.tick)
        between = f"the history goes from {last} ({around.before.state}) straight to {first} ({around.after.state})"
    return "unrecorded", f"did not run: no instance claimed it when it was due, and it is too late now; {between}"


def _untaken(around: Surroundings, known: Known, tick: datetime, state: WorkerState) -> tuple[str, str]:
    late = span(around.clock - tick)
    if known.worker and not known.worker.enabled:
        return "disabled", f"did not run: {known.worker.__name__} is disabled in this release (enabled = False)"
    if state.paused_at:
        return "paused", f"did not run: the worker is paused since {second(state.paused_at)}"
    if state.pending_tick:
        cause = "requested by a user" if state.pending_trigger == "manual" else "lost or handed back"
        first = f"the tick {moment(state.pending_tick)}, which was {cause}, runs first"
        return "waiting", f"has waited for {late}: {first}{_by_instance(around)}"
    if state.running:
        return (
            "waiting",
            f"has waited for {late}: the tick {moment(state.running.tick)} is still running on {_where(state, around)}",
        )
    if not around.alive:
        return "overdue", f"is overdue by {late}: {_no_instance(around)}"
    return _late_though_alive(around, known, tick, late)


def _late_though_alive(around: Surroundings, known: Known, tick: datetime, late: str) -> tuple[str, str]:
    if known.worker is None:
        return (
            "overdue",
            f"is overdue by {late}: this release does not have the worker, and no other release runs it",
        )
    if around.clock - tick <= _JUST:
        return "waiting", f"fell due {late} ago; {_alive(around)} will run it"
    if not known.worker.catch_up and all(each.started_at > tick for each in around.alive):
        began = second(around.alive[0].started_at)
        return "missed", (
            f"did not run: no instance was up when it was due (the oldest started at {began}), and "
            f"{known.worker.__name__} has catch_up = False"
        )
    return "overdue", (
        f"is overdue by {late} although {_alive(around)} is alive: its log says why "
        "(another release, all its WORKERS_THREADS busy, or it cannot query the database)"
    )


def _unless(around: Surroundings, known: Known) -> str:
    """Name the obstacle that will keep a tick from running."""
    if known.worker and not known.worker.enabled:
        return f", and {known.worker.__name__} is disabled (enabled = False)"
    if around.state and around.state.paused_at:
        return f", and the worker is paused since {second(around.state.paused_at)}"
    if not around.alive:
        return f", and {_no_instance(around)}"
    return ""


def _alive(around: Surroundings) -> str:
    first, *others = around.alive
    return f"{first.name} or {len(others)} more" if others else first.name


def _no_instance(around: Surroundings) -> str:
    """Say that no instance is alive, since when, and how to change that."""
    seen = around.last_seen
    since = ""
    if seen:
        left = "signed off" if seen.signed_off_at else "was last seen"
        since = f" ({seen.name} {left} at {second(seen.signed_off_at or seen.heartbeat_at)})"
    return f"no instance is alive now{since}; `flask workers run` starts one"


def _where(state: WorkerState, around: Surroundings) -> str:
    is_alive = any(each.id == state.instance for each in around.alive)
    return f"{state.instance_name}" + ("" if is_alive else ", which is gone: will be taken over")


def _since(state: WorkerState) -> str:
    return f"{state.schedule.describe()}, since {second(state.scheduled_at)}"


def _clause(text: str | None) -> str:
    return (text or "no reason is recorded").rstrip(".")

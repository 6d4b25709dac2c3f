"""Pages of the fleet: the timeline and the instances."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TypeVar

from flask import Blueprint, abort, render_template, request
from flask.typing import ResponseReturnValue

from ...errors import InvalidSchedule
from ...history.records import InstanceRecord, Record, Window
from ...history.status import LATE, WorkerStatus, statuses
from ...history.text import moment, moment_in
from ...ledger.leases import OFFSET_WARNED
from ...ledger.locks import Holding
from ...manager import BackgroundWorkerManager, the_manager
from ...schedule.parsing import parse_schedule
from ...schedule.periods import MICROSECOND
from ..ticks import Expected, marks, possible_gaps
from ..timeline import CLASSES, SIGNS, draw

LENGTHS = {
    "1m": ("1 minute", timedelta(minutes=1)),
    "5m": ("5 minutes", timedelta(minutes=5)),
    "1h": ("1 hour", timedelta(hours=1)),
    "6h": ("6 hours", timedelta(hours=6)),
}
_USUAL = "5m"
_MOST_BARS, _MOST_LATE = 300, 10
_MOST_GAPS, _ROWS_PER_GAP = 20, 20
FEW_GONE = 3  # of the instances that left, the page shows this many at once

Held = TypeVar("Held", Record, Holding)


def add_to(blueprint: Blueprint) -> None:
    blueprint.add_url_rule("/timeline", "timeline", timeline_page)
    blueprint.add_url_rule("/instances", "instances", instances_page)


# -- the timeline --------------------------------------------------------------------------------


def timeline_page() -> ResponseReturnValue:
    manager = the_manager()
    history = manager.history
    schedules = history.schedules()
    names = sorted({*manager.workers, *schedules})
    worker = request.args.get("worker") or None
    if worker is not None and worker not in names:
        abort(404, f"There is no worker {worker!r}.")
    key = request.args.get("window", _USUAL)
    key = key if key in LENGTHS else _USUAL
    window = history.window(LENGTHS[key][1], _until(), worker, _MOST_BARS)
    window, has_more_gaps = _with_gaps(manager, window, list(_expected(manager, window, schedules, worker)))
    late = _late(manager, worker) if window.until == window.clock else []
    # If an instance is alive, the page needs no query for the alarm.
    known = {"silence": lambda: None} if any(each.is_alive for each in window.seen) else {}
    return render_template(
        "background/timeline.html",
        picture=draw(window),
        window=window,
        is_live=window.until == window.clock,
        with_table="table" in request.args,
        lengths=LENGTHS,
        here={"window": key, "worker": worker} if worker else {"window": key},
        names=names,
        earlier=moment(window.since),
        later=_later(window),
        rest=moment(window.complete_since),
        most=_MOST_BARS,
        most_gaps=_MOST_GAPS if has_more_gaps else None,
        late=late[:_MOST_LATE],
        more_late=len(late[_MOST_LATE:]),
        classes=CLASSES,
        signs=SIGNS,
        **known,
    )


def _with_gaps(manager: BackgroundWorkerManager, window: Window, workers: Sequence[Expected]) -> tuple[Window, bool]:
    """Add marks for ticks without a row to the window. Also return whether there are more than _MOST_GAPS gaps.

    A window without gaps needs no query.
    """
    gaps = sorted(possible_gaps(window, workers), key=lambda gap: gap[1].last)
    shown = gaps[-_MOST_GAPS:]
    if not shown:
        return window, False
    rows = manager.history.up_to([(worker.name, gap.last) for worker, gap in shown], _ROWS_PER_GAP)
    since = manager.history.scheduled_at({worker.name for worker, _ in shown})
    found = [
        mark
        for (worker, gap), newest in zip(shown, rows, strict=True)
        for mark in marks(worker, gap, newest, since.get(worker.name, window.until))
    ]
    records = sorted((*window.records, *found), key=lambda record: record.began_at)
    return replace(window, records=tuple(records)), len(gaps) > len(shown)


def _expected(
    manager: BackgroundWorkerManager, window: Window, schedules: Mapping[str, str], only: str | None
) -> Iterator[Expected]:
    """Yield the workers of this release that have a tick in the window: all, or only the worker `only`."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, text in schedules.items():
        if only in (None, name):
            names[text].append(name)
    ours, due = manager.workers, window.clock - LATE
    for text, same in names.items():
        with suppress(InvalidSchedule):
            schedule = parse_schedule(text)
            if schedule.next(window.complete_since - MICROSECOND) < window.until:
                known = [ours[name] for name in same if name in ours]
                yield from (Expected(each.name, schedule, due - each.jitter) for each in known if each.enabled)


def _late(manager: BackgroundWorkerManager, worker: str | None) -> list[WorkerStatus]:
    """Return the workers (or this one) with a tick that waits. The picture has no bar for such a tick."""
    found = statuses(manager.stores, manager.workers, None if worker is None else [worker])
    return [each for each in found if each.is_late]


def _until() -> datetime | None:
    """Return the end of the picture, from the address. None means now, also if the address cannot be read."""
    with suppress(ValueError):
        return moment_in(request.args.get("until", ""))
    return None


def _later(window: Window) -> str | None:
    """Return the end of the next picture. None means now."""
    until = window.until + (window.until - window.since)
    return moment(until) if until < window.clock else None


# -- the instances -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    """An instance, with its runs, locks and messages."""

    seen: InstanceRecord
    age: timedelta
    """The time since its last heartbeat."""
    runs: list[Record]
    locks: list[Holding]
    messages: int

    @property
    def holds_anything(self) -> bool:
        return bool(self.runs or self.locks or self.messages)

    @property
    def is_skewed(self) -> bool:
        return abs(self.seen.clock_ahead or 0.0) > OFFSET_WARNED.total_seconds()


def instances_page() -> ResponseReturnValue:
    clock = the_manager().history.clock()
    holders = _holders(the_manager(), clock)
    alive = sum(each.seen.is_alive for each in holders)
    holders.sort(key=lambda each: (not each.seen.is_alive, not each.holds_anything))
    few = max(alive + FEW_GONE, sum(each.seen.is_alive or each.holds_anything for each in holders))
    shown = few if len(holders) > few + 1 else len(holders)
    # If an instance is alive, the page needs no query for the alarm.
    known = {"silence": lambda: None} if alive else {}
    return render_template(
        "background/instances.html", shown=holders[:shown], earlier=holders[shown:], alive=alive, clock=clock, **known
    )


def _holders(manager: BackgroundWorkerManager, clock: datetime) -> list[Holder]:
    """Return all known instances, the living ones first."""
    messages = manager.messages.held()
    runs, locks = _by_instance(manager.history.running()), _by_instance(manager.locks.held())
    return [
        Holder(each, clock - each.heartbeat_at, runs[each.id], locks[each.id], messages.get(each.id, 0))
        for each in manager.instance_history.seen()
    ]


def _by_instance(held: Iterable[Held]) -> dict[str | None, list[Held]]:
    found: dict[str | None, list[Held]] = defaultdict(list)
    for each in held:
        found[each.instance].append(each)
    return found

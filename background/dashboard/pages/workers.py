"""Pages of one worker with its executions, and of one execution."""

from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from flask import Blueprint, abort, render_template, request
from flask.typing import ResponseReturnValue

from ...database.tables import LARGEST_ID
from ...errors import InvalidSchedule
from ...history.executions import ERRORS_IN, MOST_ERRORS, MOST_SEARCHED
from ...history.overview import ListedWorker, readable_schedule
from ...history.records import STATES, Place
from ...history.status import LATE
from ...history.text import moment_in
from ...ledger.claim import WorkerState
from ...manager import BackgroundWorkerManager, the_manager
from ...schedule.periods import MICROSECOND, Schedule
from ..ticks import by_tick
from .addresses import here, place_in, place_text
from .charts import run_charts, span_links
from .drafts import DRAFT, LONGEST_NAME, NEXT_TICKS, draft
from .message_workers import message_worker_page
from .overview import rows

PER_PAGE = 20


def add_to(blueprint: Blueprint) -> None:
    blueprint.add_url_rule("/worker/<name>", "worker", worker_page)
    blueprint.add_url_rule(f"/worker/<name>/<int(max={LARGEST_ID}):id>", "execution", execution_page)


def worker_page(name: str) -> ResponseReturnValue:
    manager = the_manager()
    if topic := manager.topic_of(name):
        return message_worker_page(name, topic)
    [row] = rows(manager, [ListedWorker(known(manager, name), frozenset())])
    worker, state, clock = manager.workers.get(name), manager.stores.ledger.look(name), manager.history.clock()
    schedule, charts = readable_schedule(worker, state), run_charts(name)
    return render_template(
        "background/worker.html",
        row=row,
        worker=worker,
        state=state,
        schedule=schedule,
        next_ticks=_next_ticks(schedule, row["next_tick"]),
        clock=clock,
        chart=charts.chart,
        charts=charts,
        spans=span_links(),
        errors=manager.history.errors(name),
        errors_in=ERRORS_IN,
        most_errors=MOST_ERRORS,
        draft=draft(),
        here=here(*DRAFT),
        **_executions(manager, name, schedule, state, clock - LATE - (worker.jitter if worker else timedelta())),
        **_why(manager, name),
    )


def _next_ticks(schedule: Schedule | None, first: datetime | None) -> list[datetime]:
    """Return the next NEXT_TICKS ticks, beginning with `first`. Empty for a worker that does not run."""
    return schedule.following(first - MICROSECOND, NEXT_TICKS) if schedule and first else []


def _executions(
    manager: BackgroundWorkerManager, name: str, schedule: Schedule | None, state: WorkerState | None, due: datetime
) -> dict[str, Any]:
    """Return a page of the executions. Ticks up to `due` should have one."""
    only, before = request.args.get("state"), _before()
    only = only if only in STATES else None
    records, following = manager.history.page(name, PER_PAGE, only, before)
    until = min(due, before[0]) if before else due
    has_gaps = schedule and state and not only
    return {
        "ticks": list(by_tick(records, schedule if has_gaps else None, state.scheduled_at if state else due, until)),
        "following": place_text(following),
        "searched": MOST_SEARCHED,
        "states": STATES,
        "only": only,
        "until": request.args.get("until", "")[:100],
    }


def known(manager: BackgroundWorkerManager, name: str) -> str:
    """Return `name` if this release or the database has a worker of that name. Otherwise respond with 404."""
    is_name = name.isprintable() and len(name) <= LONGEST_NAME
    if name not in manager.workers and not (is_name and manager.stores.ledger.look(name)):
        abort(404)
    return name


def execution_page(name: str, id: int) -> ResponseReturnValue:
    manager = the_manager()
    record = manager.history.execution(id)
    if record is None or record.worker != name:
        abort(404)
    previous, following = manager.history.neighbours(record)
    log, cursor = manager.history.log_and_cursor(id)
    return render_template(
        "background/execution.html",
        record=record,
        previous=previous,
        following=following,
        attempts=manager.history.attempts(record),
        log=log,
        cursor=cursor,
        is_ours=name in manager.workers,
    )


def _before() -> Place | None:
    """Read the place or the moment from the address. None, the first page, if neither can be read."""
    if place := place_in(request.args.get("before", "")):
        return place
    with suppress(ValueError, InvalidSchedule):
        return moment_in(request.args.get("until", "")[:100], request.args.get("zone", "UTC")[:100]), LARGEST_ID
    return None


def _why(manager: BackgroundWorkerManager, name: str) -> dict[str, Any]:
    """Return the answer to "why did it not run?", or the error of the question."""
    at, zone = request.args.get("at", "").strip()[:100], request.args.get("zone", "UTC")[:100]
    shown: dict[str, Any] = {"at": at, "zone": zone}
    if at:
        try:
            shown["answer"] = manager.why(name, moment_in(at, zone))
        except InvalidSchedule as error:
            shown["wrong"] = error.message
        except ValueError as error:
            shown["wrong"] = str(error)
    return shown

"""Pages of the workers: the overview, one worker with its executions, and one execution."""

from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

from flask import Blueprint, abort, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

from ..database.tables import LARGEST_ID
from ..errors import InvalidSchedule
from ..history.executions import MOST_SEARCHED
from ..history.overview import overview
from ..history.records import STATES, Place
from ..history.text import moment_in
from ..manager import BackgroundWorkerManager, the_manager
from ..schedule.parsing import typed_schedule
from .sparkline import COUNT, picture

PER_PAGE = 20
_LONGEST_NAME = 200
_DRAFT = ("edit", "schedule", "timezone")  # parameters of an address that shows a refused form again


def add_to(blueprint: Blueprint) -> None:
    blueprint.add_url_rule("/", "overview", overview_page)
    blueprint.add_url_rule("/worker/<name>", "worker", worker_page)
    blueprint.add_url_rule(f"/worker/<name>/<int(max={LARGEST_ID}):id>", "execution", execution_page)


# -- the overview --------------------------------------------------------------------------------


def overview_page() -> ResponseReturnValue:
    manager, search = the_manager(), request.args.get("q", "").strip()[:_LONGEST_NAME]
    names = sorted(name for name in manager.names.union(manager.history.names()) if search.lower() in name.lower())
    pages = max(1, -(-len(names) // PER_PAGE))
    page = min(max(request.args.get("page", 1, type=int), 1), pages)
    shown = names[(page - 1) * PER_PAGE : page * PER_PAGE]
    return render_template(
        "background/overview.html",
        rows=rows(manager, shown),
        clock=manager.history.clock(),
        search=search,
        page=page,
        pages=pages,
        count=len(names),
        draft=draft(),
        here=here(),
    )


def rows(manager: BackgroundWorkerManager, names: list[str]) -> list[dict[str, Any]]:
    """Return the overview's row of each worker in `names`, in this order. A message worker's row has only its topic."""
    found = {row["name"]: row for row in overview(manager.stores, manager.workers, names)}
    glances = manager.history.recent(found, COUNT)
    ours, topics = manager.workers, {worker.name: worker for worker in manager.topics.values()}
    for name, row in found.items():
        row |= {"about": about(ours.get(name)), "picture": picture(tuple(glances[name])), "topic": None}
    for name in topics.keys() & names:
        found[name] = {"name": name, "about": about(topics[name]), "topic": topics[name].topic}
    return [found[name] for name in names if name in found]


def about(worker: type | None) -> str:
    """Return the first line of the class's docstring."""
    return (worker.__doc__ or "").strip().partition("\n")[0] if worker else ""


# -- one worker ----------------------------------------------------------------------------------


def worker_page(name: str) -> ResponseReturnValue:
    manager = the_manager()
    if topic := manager.topic_of(name):
        return redirect(url_for("background.messages", topic=topic))
    found = rows(manager, [known(manager, name)])
    state = request.args.get("state")
    state = state if state in STATES else None
    executions, following = manager.history.page(name, PER_PAGE, state, _before())
    return render_template(
        "background/worker.html",
        row=found[0],
        worker=manager.workers.get(name),
        state=manager.stores.ledger.look(name),
        clock=manager.history.clock(),
        executions=executions,
        following=_place(following) if following else None,
        searched=MOST_SEARCHED,
        states=STATES,
        only=state,
        until=request.args.get("until", "")[:100],
        draft=draft(),
        here=here(),
        **_why(manager, name),
    )


def known(manager: BackgroundWorkerManager, name: str) -> str:
    """Return `name` if this release or the database has a worker of that name. Otherwise respond with 404."""
    is_name = name.isprintable() and len(name) <= _LONGEST_NAME
    if name not in manager.workers and not (is_name and manager.stores.ledger.look(name)):
        abort(404)
    return name


def execution_page(name: str, id: int) -> ResponseReturnValue:
    manager = the_manager()
    record = manager.history.execution(id)
    if record is None or record.worker != name:
        abort(404)
    return render_template("background/execution.html", record=record, log=manager.history.log(id))


def _place(place: Place) -> str:
    """Write the place where the next page begins, for an address."""
    return f"{place[0].isoformat()}~{place[1]}"


def _before() -> Place | None:
    """Read the place or the moment from the address. None, the first page, if neither can be read."""
    tick, _, id = request.args.get("before", "").partition("~")
    with suppress(ValueError):
        return moment_in(tick), min(max(int(id), 0), LARGEST_ID)
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


# -- the form for another schedule ---------------------------------------------------------------


def draft() -> dict[str, str] | None:
    """Return the refused input of a schedule's form, with the worker's name and the error. None without such input."""
    name, schedule, timezone = (request.args.get(key, "")[:_LONGEST_NAME] for key in _DRAFT)
    try:
        if name:
            typed_schedule(schedule, timezone)
    except InvalidSchedule as error:
        return {"name": name, "schedule": schedule, "timezone": timezone, "error": error.message}
    return None


def here() -> str:
    """Return this page's own address, without the draft."""
    kept = [(key, value) for key, value in request.args.items() if key not in _DRAFT and value]
    path = url_for(str(request.endpoint), **(request.view_args or {}))
    return f"{path}?{urlencode(kept)}" if kept else path

"""The overview: the fleet in numbers, and all workers. Workers with problems come first."""

from collections import Counter
from datetime import datetime
from typing import Any

from flask import Blueprint, render_template, request, url_for
from flask.typing import ResponseReturnValue

from ...alarms.alert import page_about, title
from ...alarms.incidents import Incident, Incidents
from ...history.browsing.topics import Topic
from ...history.overview import STATES, ListedWorker, listed_workers, overview
from ...history.records import FAILED, Glance
from ...history.status import WorkerStatus, statuses
from ...manager import BackgroundWorkerManager, the_manager
from ..sparkline import COUNT, picture
from .addresses import here
from .drafts import DRAFT, LONGEST_NAME, draft

PER_PAGE = 20


def add_to(blueprint: Blueprint) -> None:
    blueprint.add_url_rule("/", "overview", overview_page)


def overview_page() -> ResponseReturnValue:
    manager, search = the_manager(), request.args.get("q", "").strip()[:LONGEST_NAME]
    state = request.args.get("state")
    state = state if state in STATES else None
    alive, clock = manager.instance_history.alive()
    found, topics = statuses(manager.stores, manager.workers), manager.messages.rates()
    known = listed_workers(manager.stores, manager.workers, found, topics)
    wanted = search.lower()
    matching = [each for each in known if wanted in each.name.lower() and (not state or state in each.states)]
    pages = max(1, -(-len(matching) // PER_PAGE))
    page = min(max(request.args.get("page", 1, type=int), 1), pages)
    shown = matching[(page - 1) * PER_PAGE : page * PER_PAGE]
    # If an instance is alive, the page needs no query for the alarm.
    more = {"silence": lambda: None} if alive else {}
    return render_template(
        "background/overview.html",
        headline=headline(manager, known, topics) | {"alive": alive},
        rows=rows(manager, shown, found, clock),
        clock=clock,
        states=STATES,
        state=state,
        search=search,
        page=page,
        pages=pages,
        count=len(matching),
        draft=draft(),
        here=here(*DRAFT),
        **more,
    )


def headline(manager: BackgroundWorkerManager, known: list[ListedWorker], topics: list[Topic]) -> dict[str, int]:
    """Return the number of workers in each state, of dead letters, and of ticks and messages in the last minute."""
    number = Counter(state for each in known for state in each.states)
    return {state: number[state] for state in STATES} | {
        "dead": sum(each.dead for each in topics),
        "ticks": manager.history.per_minute(),
        "messages": sum(each.per_minute for each in topics),
    }


def rows(
    manager: BackgroundWorkerManager,
    shown: list[ListedWorker],
    found: list[WorkerStatus] | None = None,
    clock: datetime | None = None,
) -> list[dict[str, Any]]:
    """Return the overview's row of each worker, in this order. For `found` and `clock`, see `overview`."""
    periodic = overview(manager.stores, manager.workers, {each.name for each in shown if not each.topic}, found, clock)
    glances = manager.history.recent([row["name"] for row in periodic], COUNT)
    every = {row["name"]: row | _history(glances[row["name"]]) for row in periodic}
    every |= {each.name: {"name": each.name, "topic": each.topic} for each in shown if each.topic}
    classes: dict[str, type] = {**manager.workers, **{each.name: each for each in manager.topics.values()}}
    return [every[each.name] | {"about": about(classes.get(each.name))} for each in shown if each.name in every]


def _history(glances: list[Glance]) -> dict[str, Any]:
    failed = sum(each.state in FAILED for each in glances)
    return {"picture": picture(tuple(glances)), "failed": failed, "seen": len(glances), "topic": None}


def about(worker: type | None) -> str:
    """Return the first line of the class's docstring."""
    return (worker.__doc__ or "").strip().partition("\n")[0] if worker else ""


def open_incidents() -> list[tuple[Incident, str, str]]:
    """Return each open incident with its title and its page's address. No query without alarms."""
    manager = the_manager()
    found = Incidents(manager.stores).current() if manager.watch else []
    pages = ((each, page_about(each)) for each in found)
    return [(each, title(each), url_for(endpoint, **arguments)) for each, (endpoint, arguments) in pages]

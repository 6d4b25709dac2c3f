"""The overview of all workers."""

from typing import Any

from flask import Blueprint, render_template, request, url_for
from flask.typing import ResponseReturnValue

from ...alarms.alert import page_about, title
from ...alarms.incidents import Incident, Incidents
from ...history.overview import overview
from ...manager import BackgroundWorkerManager, the_manager
from ..sparkline import COUNT, picture
from .drafts import LONGEST_NAME, draft, here

PER_PAGE = 20


def add_to(blueprint: Blueprint) -> None:
    blueprint.add_url_rule("/", "overview", overview_page)


def overview_page() -> ResponseReturnValue:
    manager, search = the_manager(), request.args.get("q", "").strip()[:LONGEST_NAME]
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


def open_incidents() -> list[tuple[Incident, str, str]]:
    """Return each open incident with its title and its page's address. No query without alarms."""
    manager = the_manager()
    found = Incidents(manager.stores).current() if manager.watch else []
    pages = ((each, page_about(each)) for each in found)
    return [(each, title(each), url_for(endpoint, **arguments)) for each, (endpoint, arguments) in pages]

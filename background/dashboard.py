"""The dashboard: one blueprint, made for an app that says who may see it."""

from collections.abc import Callable

from flask import Blueprint
from flask.typing import ResponseReturnValue

from . import fleet_pages, message_pages, worker_actions, worker_pages
from .pages import add_filters


def dashboard(allow: Callable[[], ResponseReturnValue | None]) -> Blueprint:
    """A blueprint at /workers; `allow` is asked before each of its requests, and answers those that it refuses.

    An app that has a template `background/layout.html` shows the pages in its own look.
    """
    blueprint = Blueprint(
        "background", __name__, url_prefix="/workers", template_folder="templates", static_folder="static"
    )
    blueprint.before_request(allow)
    add_filters(blueprint)
    for part in (worker_pages, worker_actions, fleet_pages, message_pages):
        part.add_to(blueprint)
    return blueprint

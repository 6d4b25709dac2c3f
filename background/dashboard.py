"""The dashboard: one blueprint, made for an app that says who may see it."""

from collections.abc import Callable

from flask import Blueprint, flash, request
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import OperationalError

from . import fleet_pages, message_pages, worker_actions, worker_pages
from .errors import first_line
from .pages import add_filters, back


def dashboard(allow: Callable[[], ResponseReturnValue | None]) -> Blueprint:
    """A blueprint at /workers; `allow` is asked before each of its requests, and answers those that it refuses.

    An app that has a template `background/layout.html` shows the pages in its own look.
    """
    blueprint = Blueprint(
        "background", __name__, url_prefix="/workers", template_folder="templates", static_folder="static"
    )
    blueprint.before_request(allow)
    blueprint.register_error_handler(OperationalError, not_taken)
    add_filters(blueprint)
    for part in (worker_pages, worker_actions, fleet_pages, message_pages):
        part.add_to(blueprint)
    return blueprint


def not_taken(error: OperationalError) -> ResponseReturnValue:
    """A button's change that the database did not take: a run may hold what it needs, for longer than one waits."""
    if request.method != "POST":
        raise error
    flash(f"The database did not take that ({first_line(error)}); try again.", "error")
    return back()

"""Builds the dashboard's blueprint, for an application that decides who may see it."""

from collections.abc import Callable

from flask import Blueprint, request
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from werkzeug.wrappers import Response

from ..errors import CommitFirst, first_line
from ..manager import the_manager
from ..monitoring.unavailable import is_away, unavailable
from .access import Access, guard
from .filters import add_filters, back, say
from .origin import refuse_foreign
from .pages import charts, fleet, messages, overview, worker_actions, workers
from .pages.addresses import worker_url
from .pages.overview import open_incidents


def dashboard(
    allow: Callable[[], ResponseReturnValue | None],
    may_change: Callable[[], bool] = lambda: True,
    user: Callable[[], str | None] = lambda: None,
) -> Blueprint:
    """Return a blueprint at /workers. `allow` runs before each request. It returns None, or the response of a refusal.

    If `may_change` returns False, the visitor sees all pages without their buttons, and the server refuses each change.
    `user` returns the name of the visitor who changes something, for example an e-mail. The history shows this name.

    The blueprint refuses changes that another site's page requests, with or without Flask-WTF. Another site cannot
    show it in a frame. Without a SECRET_KEY the pages and buttons work, but show no messages. An application's own
    template `background/layout.html` gives the pages the application's look.
    """
    blueprint = Blueprint(
        "background", __name__, url_prefix="/workers", template_folder="templates", static_folder="static"
    )
    blueprint.before_request(refuse_foreign)
    blueprint.before_request(allow)
    guard(blueprint, Access(may_change, user))
    blueprint.after_request(refuse_frames)
    blueprint.register_error_handler(SQLAlchemyError, not_taken)
    blueprint.register_error_handler(CommitFirst, held_up)
    # Functions, which only the dashboard's own pages call: the host's error page must not query the database.
    blueprint.context_processor(
        lambda: {"silence": lambda: the_manager().instance_history.silence(), "incidents": open_incidents}
    )
    blueprint.add_app_template_global(worker_url)
    add_filters(blueprint)
    for part in (overview, workers, worker_actions, fleet, charts, messages):
        part.add_to(blueprint)
    return blueprint


def refuse_frames(response: Response) -> Response:
    """Keep another site from framing a page: a click there would count as a click on the dashboard itself."""
    response.headers.setdefault("X-Frame-Options", "SAMEORIGIN")
    return response


def not_taken(error: SQLAlchemyError) -> ResponseReturnValue:
    """Respond to a request whose database is away, or did not make a button's change.

    A run may hold the rows of the change for longer than a page waits.
    """
    if request.method != "POST" or not isinstance(error, OperationalError) or is_away(error):
        return unavailable(error)
    say(f"The database did not make this change ({first_line(error)}). Try again.", "error")
    return back()


def held_up(_error: CommitFirst) -> ResponseReturnValue:
    """Respond to a button whose change waits for a transaction that the host application left open in this request."""
    say("The database did not make this change: this request has an open transaction of its own. Try again.", "error")
    return back()

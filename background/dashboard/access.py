"""The visitor of a page: the right to change something, and the name in the history."""

from collections.abc import Callable
from typing import NamedTuple

from flask import Blueprint, abort, current_app, request

from .origin import HARMLESS

_CACHED = "background.may_change"


class Access(NamedTuple):
    """The application's answers about the visitor of a page."""

    may_change: Callable[[], bool]
    user: Callable[[], str | None]


def guard(blueprint: Blueprint, access: Access) -> None:
    """Refuse changes by a visitor without the right to make them. Templates call `may_change()`."""
    blueprint.record(lambda state: state.app.extensions.update(background_dashboard=access))
    blueprint.before_request(refuse_change)
    blueprint.add_app_template_global(may_change)


def refuse_change() -> None:
    if request.method not in HARMLESS and not may_change():
        abort(403, "You may look at the workers, but you may not change them.")


def may_change() -> bool:
    """Return whether the visitor may change something. Ask the application once per request."""
    if _CACHED not in request.environ:
        request.environ[_CACHED] = bool(_access().may_change())
    return bool(request.environ[_CACHED])


def user_name() -> str | None:
    """Return the visitor's name, for example an e-mail. None if the application gives no name."""
    return _access().user()


def _access() -> Access:
    access: Access = current_app.extensions["background_dashboard"]
    return access

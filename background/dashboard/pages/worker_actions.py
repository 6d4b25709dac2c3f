"""Buttons of the workers. Each button changes the whole fleet, and leads back to its own page."""

from urllib.parse import urlencode

from flask import Blueprint, abort, request
from flask.typing import ResponseReturnValue
from werkzeug.wrappers import Response

from ...errors import InvalidSchedule
from ...history.text import whole_number
from ...history.why import if_it_fails
from ...manager import BackgroundWorkerManager, the_manager
from ...schedule.parsing import as_arguments, typed_schedule
from ..access import user_name
from ..filters import back, say
from .workers import known


def add_to(blueprint: Blueprint) -> None:
    for action in (run, pause, resume, cancel, reschedule):
        blueprint.add_url_rule(f"/worker/<name>/{action.__name__}", action.__name__, action, methods=["POST"])


def run(name: str) -> ResponseReturnValue:
    manager = _manager_of(name)
    requested = manager.request(name)
    once = if_it_fails(manager.workers[name], manager.stores.ledger.look(name))
    if not requested:
        say(f"{name} is running already, or will run next.", "info")
    elif any(seen.is_alive for seen in manager.instance_history.seen()):
        say(f"{name} will run within {manager.app.config['WORKERS_HEARTBEAT_SECONDS']:g} s.{once}", "success")
    else:
        say(f"{name} will run as soon as an instance is alive. No instance is alive now.{once}", "warning")
    return back()


def pause(name: str) -> ResponseReturnValue:
    changed = _manager_of(name).pause(name)
    done = f"{name} is paused: no instance runs its ticks until it is resumed."
    return _answer(changed, done, f"{name} was paused already.")


def resume(name: str) -> ResponseReturnValue:
    changed = _manager_of(name).resume(name)
    return _answer(changed, f"{name} is resumed: it runs again from its next tick.", f"{name} was not paused.")


def cancel(name: str) -> ResponseReturnValue:
    """Cancel the run that the page showed. A later run goes on."""
    token = whole_number(request.form.get("run", "")) or abort(400, "The form names no run.")
    manager = _manager_of(name)
    changed = manager.cancel(name, by=user_name(), token=token)
    seconds = manager.app.config["WORKERS_SHUTDOWN_SECONDS"]
    done = f"The run of {name} is cancelled: it is asked to stop, and can commit for at most {seconds:g} s."
    return _answer(changed, done, f"That run of {name} has ended already.")


def reschedule(name: str) -> ResponseReturnValue:
    """Change to the schedule that the form gives, or back to the declared schedule."""
    manager = _manager_of(name)
    if "declared" in request.form:
        changed = manager.reschedule(name)
    else:
        text, timezone = request.form.get("schedule", ""), request.form.get("timezone", "")
        if "preview" in request.form:
            return _shown_again(name, text, timezone)
        try:
            schedule = typed_schedule(text, timezone)
        except InvalidSchedule:
            return _shown_again(name, text, timezone)
        changed = manager.reschedule(name, **as_arguments(schedule))
    state = manager.stores.ledger.look(name)
    runs = f"{name} runs {state.schedule.describe()}" if state else name
    return _answer(changed, f"{runs} from now on.", f"{runs} already.")


def _answer(changed: bool, done: str, already: str) -> Response:
    """Say whether the button changed anything, on the page that it is on."""
    say(done if changed else already, "success" if changed else "info")
    return back()


def _shown_again(name: str, text: str, timezone: str) -> Response:
    """Redirect to the form, which shows the typed schedule again, with its error or its next ticks."""
    response = back()
    more = urlencode({"edit": name, "schedule": text[:200], "timezone": timezone[:200]})
    response.location += ("&" if "?" in response.location else "?") + more
    return response


def _manager_of(name: str) -> BackgroundWorkerManager:
    """Return the manager if this release has a periodic worker of that name. Otherwise respond with 404 or 409."""
    manager = the_manager()
    if name not in manager.workers:
        known(manager, name)
        abort(409, f"The worker {name!r} is not in this release; use an instance of a release that has this worker.")
    return manager

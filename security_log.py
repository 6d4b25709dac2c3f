"""Security events: one line of the logger `security`, and one count in /metrics, for each."""

import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from logging import INFO, WARNING
from threading import Lock
from typing import TYPE_CHECKING, Any

from blinker import NamedSignal
from flask import Flask, Response, current_app, g, has_request_context, request
from flask_limiter import RateLimitExceeded
from flask_login import current_user, user_logged_out
from flask_security import signals
from flask_wtf.csrf import CSRFError
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import Forbidden, HTTPException

from background.host.logs import logger_of
from throttle import network

if TYPE_CHECKING:
    from prometheus_client import Metric

log = logger_of("security")  # a plain dictConfig does not silence it

EVENTS = {
    "login": INFO,
    "refused": WARNING,
    "throttled": WARNING,
    "logged out": INFO,
    "password changed": INFO,
    "link asked": INFO,
    "link used": INFO,
    "right given": INFO,
    "right taken": INFO,
    "forbidden": WARNING,
    "CSRF": WARNING,
}
"""The events, each with the level of its lines."""

LOGIN = "security.login"
HOUR = 3_600.0  # seconds
MOST_LOGGED = 10_000  # refusals that a process remembers
_lock = Lock()
_SANE = re.compile(r"[\w.:-]{1,64}", re.ASCII)


def register(app: Flask) -> None:
    app.extensions["logged_refusals"] = {}
    logging.getLogger("flask_wtf.csrf").setLevel(WARNING)  # it has a line for each form without a token
    app.after_request(answered)
    for signal, receiver in RECEIVERS:
        signal.connect(receiver, app)


def record(event: str, user_id: int | None = None, is_logged: bool = True, **more: Any) -> None:
    """Count the event, and write its line.

    A line names the account by its id. It never has the e-mail of a failed login: some people type a password there.
    """
    count(event)
    if is_logged:
        fields = {"user": user_id, **more}
        if has_request_context():
            fields |= {"network": network(), "endpoint": request.endpoint, "request": request_id()}
        given = {name: value for name, value in fields.items() if value is not None}
        text = " ".join([event, *(f"{name}={value}" for name, value in given.items())])
        log.log(EVENTS[event], "%s", text, extra={"event": event, **given})


def request_id() -> str:
    """Return the X-Request-ID of the proxy in front if it is one word, or else a new id."""
    if "request_id" not in g:
        given = request.headers.get("X-Request-ID", "")
        is_proxys = current_app.config["PROXIES"] and _SANE.fullmatch(given)
        g.request_id = given if is_proxys else secrets.token_hex(8)
    return str(g.request_id)


# ---- The events of a request


def refused(error: HTTPException) -> None:
    """Record an error that refuses a request."""
    if isinstance(error, RateLimitExceeded):  # only the first refusal of a window has a line
        record("throttled", own_id(), is_logged=g.get("is_first_refusal", True))
    elif isinstance(error, Forbidden | CSRFError):
        event, user_id = "forbidden" if isinstance(error, Forbidden) else "CSRF", own_id()
        record(event, user_id, is_logged=is_new((event, network(), user_id)))


def is_new(refusal: tuple[str, str, int | None]) -> bool:
    """Return whether this process logged no such refusal within the hour, so a visitor cannot fill the log.

    This needs no database, because the page of an error works without one.
    """
    at = time.monotonic()
    with _lock:
        logged = current_app.extensions["logged_refusals"]
        if at - logged.get(refusal, -HOUR) < HOUR:
            return False
        if len(logged) >= MOST_LOGGED:
            logged.clear()
        logged[refusal] = at
        return True


def own_id() -> int | None:
    with suppress(SQLAlchemyError):  # the page of an error works without the database
        return current_user.id if current_user.is_authenticated else None
    return None


def answered(response: Response) -> Response:
    """Record a refused login, with or without an account of this e-mail."""
    if request.method == "POST" and request.endpoint == LOGIN and response.status_code == 200:
        record("refused", g.get("refused_user"))
    if "request_id" in g:
        response.headers["X-Request-ID"] = request_id()
    return response


# ---- Signals


def logged_in(_app: Flask, user: Any, authn_via: list[str] | None = None, **_: Any) -> None:
    if authn_via != ["change"]:  # a new password is not a login
        record("login", user.id)


def failed(_app: Flask, user: Any, **_: Any) -> None:
    if request.endpoint == LOGIN:
        g.refused_user = user.id  # `answered` also records the login of an account that does not exist
    else:
        record("refused", user.id)


def logged_out(_app: Flask, user: Any, **_: Any) -> None:
    if user is not None and user.is_authenticated:
        record("logged out", user.id)


def recording(*events: str) -> Callable[..., None]:
    def receive(_app: Flask, user: Any, **_: Any) -> None:
        for event in events:
            record(event, user.id)  # None for an e-mail without an account

    return receive


RECEIVERS: list[tuple[NamedSignal, Callable[..., None]]] = [
    (signals.user_authenticated, logged_in),
    (signals.user_failed_authn, failed),
    (user_logged_out, logged_out),
    (signals.password_changed, recording("password changed")),
    (signals.password_reset, recording("link used", "password changed")),
    (signals.user_confirmed, recording("link used")),
    (signals.user_registered, recording("link asked")),
    (signals.confirm_instructions_sent, recording("link asked")),
    (signals.reset_password_instructions_sent, recording("link asked")),
]
"""The signals keep no receiver alive, so this list does."""


# ---- Metrics

_counts = dict.fromkeys(EVENTS, 0)


def count(event: str) -> None:
    with _lock:
        _counts[event] += 1


def figures() -> Iterator["Metric"]:
    """Yield this process's counts, including zeros: Prometheus sees no increase in a series that begins with 1."""
    from prometheus_client.core import CounterMetricFamily

    labels = ("event", "process")  # without it, several processes behind one port would share a series
    family = CounterMetricFamily("security_events", "Security events of this process.", labels=labels)
    for event, number in _counts.items():
        family.add_metric((event, f"{socket.gethostname()}:{os.getpid()}"), number)
    yield family

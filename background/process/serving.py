"""The start in a process that serves, and in a forked child. Registering a worker starts nothing."""

import os
import signal
import sys
from types import FrameType
from typing import Protocol
from weakref import WeakSet

import click
from flask import Flask
from flask.cli import run_command
from flask.helpers import get_debug_flag
from werkzeug.serving import is_running_from_reloader

from ..host import stop_signals
from ..host.logs import logger_of
from ..runs.fence import current_run

log = logger_of(__name__)

_TEST_CLIENTS = ("werkzeug.test", "webtest.app", "httpx._transports.wsgi")  # Flask uses Werkzeug's


class Servable(stop_signals.Stoppable, Protocol):
    """The manager of one application, for the process that serves."""

    @property
    def has_served(self) -> bool:
        """True once this process has begun to serve."""

    def prepare(self) -> None:
        """Make the database ready. Raises BackgroundError if that fails."""

    def serve(self) -> bool:
        """Begin to serve. False if this process has begun before."""

    def begin_anew(self, is_in_a_run: bool) -> None:
        """Begin as another process, in a forked child. `is_in_a_run` is true if a run of a worker forked the child."""


_managers: WeakSet[Servable] = WeakSet()


def attach(manager: Servable, app: Flask) -> None:
    """Give `app` its signal handlers and, under an unknown WSGI server, the start with a request."""
    _managers.add(manager)
    stop_signals.listen()

    @app.before_request
    def start_with_the_first_request() -> None:
        if manager.has_served or app.testing or is_test_client():
            return
        if manager.serve() and manager.is_started:
            log.warning(
                "Background workers start with the first request, as this WSGI server has no hook for them. Better: "
                "gunicorn with gunicorn.conf.py, or `flask workers run` beside the server with WORKERS_ENABLED=false."
            )


def start_under_flask_run(manager: Servable) -> None:
    """Start in the process that `flask run` serves with. Do nothing in any other process."""
    context = click.get_current_context(silent=True)
    if context is None or context.command is not run_command:
        return
    reloads = get_debug_flag() if context.params["reload"] is None else context.params["reload"]
    if reloads and not is_running_from_reloader():
        _let_the_child_end()
        return
    manager.prepare()  # otherwise `serve` would log its error and wait
    manager.serve()


def is_test_client() -> bool:
    """Look for a test client among the callers: a test must not start the workers without an explicit call."""
    frame: FrameType | None = sys._getframe()
    is_served = False
    while frame is not None:
        if frame.f_globals.get("__name__") in _TEST_CLIENTS:
            return True
        is_served = is_served or frame.f_code.co_name == "wsgi_app"
        frame = frame.f_back
    return not is_served  # a test may call `preprocess_request` in a test request's context


def _let_the_child_end() -> None:
    """Have the reloader's parent wait for its child after a Ctrl-C for both. It would kill the child after 0.25 s."""
    if sys.stdin is None or not sys.stdin.isatty() or not hasattr(os, "tcgetpgrp"):  # not on Windows
        return
    if os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():
        return

    def once(_signum: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, once)


def _forked() -> None:
    is_in_a_run = current_run.get() is not None
    try:
        for manager in _managers:
            manager.begin_anew(is_in_a_run)
    finally:
        stop_signals.let_through_in_a_child(is_in_a_run)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=stop_signals.hold_back, after_in_parent=stop_signals.let_through, after_in_child=_forked)

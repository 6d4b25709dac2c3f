"""Which process serves, and so runs the workers: registering is not starting."""

import os
import signal
import sys
from types import FrameType
from typing import Protocol

import click
from flask import Flask
from flask.cli import run_command
from flask.helpers import get_debug_flag
from werkzeug.serving import is_running_from_reloader

from ..errors import BackgroundError
from ..host import stop_signals as hearing
from ..host.logs import logger_of

log = logger_of(__name__)

_TEST_CLIENTS = ("werkzeug.test", "webtest.app", "httpx._transports.wsgi")  # Flask uses Werkzeug's


class Servable(Protocol):
    """The manager of one application, as a serving process starts it."""

    @property
    def is_started(self) -> bool:
        """True while its workers run in this process."""

    @property
    def has_served(self) -> bool:
        """True once this process has begun to serve."""

    def prepare(self) -> None:
        """Make the database ready. Raises BackgroundError if that fails."""

    def serve(self) -> bool:
        """Begin to serve. False if this process did before."""


def attach(manager: Servable, app: Flask) -> None:
    """Give `app` its signal handlers and, under an unknown WSGI server, the start with a request."""
    hearing.listen()

    @app.before_request
    def start_with_the_first_request() -> None:
        if manager.has_served or app.testing or _is_test_client():
            return
        if manager.serve() and manager.is_started:
            log.warning(
                "Background workers start with the first request, as this WSGI server has no hook for them. Better: "
                "gunicorn with gunicorn.conf.py, or `flask workers run` beside the server with WORKERS_ENABLED=false."
            )


def start_under_flask_run(manager: Servable) -> None:
    """The last line of the factory: start where `flask run` serves; do nothing anywhere else."""
    context = click.get_current_context(silent=True)
    if context is None or context.command is not run_command:
        return
    reloads = get_debug_flag() if context.params["reload"] is None else context.params["reload"]
    if reloads and not is_running_from_reloader():
        _let_the_child_end()
        return
    try:
        manager.prepare()
    except BackgroundError as error:
        raise click.ClickException(str(error)) from None
    manager.serve()


def _is_test_client() -> bool:
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
    """On Ctrl-C the reloader's parent kills its child after 0.25 s; let it wait, as the child got the Ctrl-C too."""
    if sys.stdin is None or not sys.stdin.isatty() or os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():
        return

    def once(_signum: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, once)

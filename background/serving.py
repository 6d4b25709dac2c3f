"""Which process serves, and so runs the workers: registering is not starting."""

import atexit
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

import click
from flask import Flask, request
from flask.cli import run_command
from flask.helpers import get_debug_flag
from werkzeug.serving import is_running_from_reloader

from .errors import BackgroundError

if TYPE_CHECKING:
    from .manager import BackgroundWorkerManager

log = logging.getLogger(__name__)


def attach(manager: "BackgroundWorkerManager", app: Flask) -> None:
    """Give `app` its `flask workers` commands and, under an unknown WSGI server, the start with the first request."""
    from .cli import workers_cli

    app.cli.add_command(workers_cli)

    @app.before_request
    def start_with_the_first_request() -> None:
        if not manager.has_served and not app.testing and not _is_test_client():
            log.warning(
                "Background workers start with the first request, as this WSGI server has no hook for them. Better: "
                "gunicorn with gunicorn.conf.py, or `flask workers run` beside the server with WORKERS_ENABLED=false."
            )
            manager.serve()


def start_under_flask_run(manager: "BackgroundWorkerManager") -> None:
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


def stop_when_told(manager: "BackgroundWorkerManager") -> None:
    """Stop before the process exits; on SIGTERM tell the runs first, whatever else the server does then."""
    atexit.register(manager.stop)
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.getsignal(signal.SIGTERM)

    def told(signum: int, frame: FrameType | None) -> None:
        manager.tell()
        if callable(before):
            before(signum, frame)
        elif before == signal.SIG_DFL:
            sys.exit(0)

    signal.signal(signal.SIGTERM, told)
    signal.siginterrupt(signal.SIGTERM, False)


def _is_test_client() -> bool:
    """Flask's test client names itself like this; a test never starts the workers behind its own back."""
    return request.headers.get("User-Agent", "").startswith("Werkzeug/")


def _let_the_child_end() -> None:
    """On Ctrl-C the reloader's parent kills its child after 0.25 s; let it wait, as the child got the Ctrl-C too."""
    if sys.stdin is None or not sys.stdin.isatty() or os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():
        return

    def once(_signum: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, once)

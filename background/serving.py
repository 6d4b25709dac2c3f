"""Which process serves, and so runs the workers: registering is not starting."""

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
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
    """Give `app` its commands and, under an unknown WSGI server, the start with the first request."""
    from .cli import workers_cli
    from .messages_cli import messages_cli

    app.cli.add_command(workers_cli)
    app.cli.add_command(messages_cli)

    @app.before_request
    def start_with_the_first_request() -> None:
        if manager.has_served or app.testing or _is_test_client():
            return
        if manager.serve() and manager.is_started:
            log.warning(
                "Background workers start with the first request, as this WSGI server has no hook for them. Better: "
                "gunicorn with gunicorn.conf.py, or `flask workers run` beside the server with WORKERS_ENABLED=false."
            )


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
    """Stop before the process exits; on a signal tell the runs first, whatever else the server does then."""
    told = _Told(manager)
    atexit.register(told.stop)
    if threading.current_thread() is threading.main_thread():
        told.take(signal.SIGTERM)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            told.take(signal.SIGINT)


class _Told:
    """Carries signals to the runs.

    A handler interrupts its thread anywhere, with any lock in its hands, so it takes none: another thread tells.
    """

    def __init__(self, manager: "BackgroundWorkerManager") -> None:
        self._manager = manager
        self._heard = 0
        self._stopping = False
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._call, name="workers-signals", daemon=True).start()

    def take(self, number: signal.Signals) -> None:
        """Hear of signal `number` before its present handler; without one, a second signal ends the wait."""
        before = signal.getsignal(number)
        is_ours = before in (signal.SIG_DFL, signal.default_int_handler)
        if not (is_ours or callable(before)):  # somebody wants it ignored
            return

        def handle(signum: int, frame: FrameType | None) -> None:
            # Which signal is the second is decided here: `stop` may have told the runs before the first call is made.
            self._heard += 1
            insists = is_ours and (self._heard > 1 or self._stopping)
            self._calls.put(self._manager.hurry if insists else self._manager.tell)
            if is_ours and (self._stopping or self._heard == 2):  # the exit that the first began would trip over it
                return
            if callable(before):
                before(signum, frame)
            else:
                sys.exit(0)

        signal.signal(number, handle)
        signal.siginterrupt(number, is_ours)  # a server that has a handler expects its system calls to go on

    def stop(self) -> None:
        self._stopping = True
        self._manager.stop()

    def _call(self) -> None:
        while True:
            self._calls.get()()


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

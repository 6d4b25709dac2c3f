"""The shop with workers that leave traces: started by the tests as an operator starts the shop (FLASK_APP)."""

import atexit
import os
import threading
import time
from datetime import timedelta
from typing import Any

from effects import leave
from flask import Flask
from sqlalchemy import event, update
from sqlalchemy.pool import Pool

import app as shop
from background import ClaimLost, PeriodicWorker, WorkerContext
from background.clock import now
from models import User, UserRepository

_SECONDS = float(os.environ.get("PROBE_SECONDS", "60"))
_connections: list[int] = []


def create_app() -> Flask:
    app = shop.create_app({"WTF_CSRF_ENABLED": False, "RATELIMIT_ENABLED": False})
    workers = app.extensions["background_workers"]
    workers.remove("passive_user_checker_worker")
    for name in filter(None, os.environ.get("PROBE_WORKERS", "ticker").split(",")):
        workers.add({"ticker": Ticker, "listener": Listener, "deaf": Deaf, "holder": Holder, "sweeper": Sweeper}[name])
    return app


def wrapped() -> Any:
    """As behind a middleware: a server's hooks cannot see the application."""
    app = create_app()
    return lambda environ, start_response: app(environ, start_response)


class Ticker(PeriodicWorker):
    name = "ticker"
    period = timedelta(seconds=float(os.environ.get("PROBE_PERIOD", "0.5")))

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid())


class Listener(PeriodicWorker):
    """Runs until it is told to stop."""

    name = "listener"
    period = timedelta(days=1)

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid(), "began")
        context.commit()
        context.logger.info("The listener began")
        if context.stopping.wait(_SECONDS):
            context.logger.info("The listener was told")
            context.raise_if_stopping()
        leave(context, os.getpid())


class Deaf(PeriodicWorker):
    """Runs for PROBE_SECONDS, or until the file PROBE_UNTIL is there, whatever it is told."""

    name = "deaf"
    period = timedelta(days=1)

    def do_work(self, context: WorkerContext) -> None:
        context.logger.info("The deaf one began")
        until = time.monotonic() + _SECONDS
        while time.monotonic() < until and not os.path.exists(os.environ.get("PROBE_UNTIL", "")):
            time.sleep(0.02)
        leave(context, os.getpid())
        try:
            context.commit()
        except ClaimLost:
            context.logger.info("The deaf one was refused")
            raise
        finally:
            _deaf_is_done.set()


class Holder(PeriodicWorker):
    """Writes, and holds what its write has locked for PROBE_SECONDS, whatever it is told."""

    name = "holder"
    period = timedelta(days=1)

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid())
        context.logger.info("The holder holds")
        time.sleep(_SECONDS)


class Sweeper(PeriodicWorker):
    """Makes users stale and sweeps them, in small slices."""

    name = "sweeper"
    period = timedelta(seconds=0.3)

    def do_work(self, context: WorkerContext) -> None:
        leave(context, os.getpid())
        context.session.execute(update(User).where(User.id % 2 == 0).values(last_login_at=now(timedelta(days=-40))))
        context.commit()
        users = context.services.get(UserRepository)
        users.slice_size = 20
        users.update_inactive_user_statuses(context.tick - timedelta(days=30), lambda done, total: context.commit())


def _connected(_connection: Any, _record: Any) -> None:
    _connections.append(os.getpid())


def _report() -> None:
    """Runs after the workers were stopped, as it was registered before."""
    if "PROBE_LINGERS" in os.environ:
        _deaf_is_done.wait(30)
    threads = sorted(thread.name for thread in threading.enumerate())
    own = _connections.count(os.getpid())
    print(f"Process {os.getpid()} ends with threads {threads} and {own} connections made", flush=True)


_deaf_is_done = threading.Event()
event.listen(Pool, "connect", _connected)
atexit.register(_report)

"""A shop with a worker that succeeds and a worker that fails, for tests of commands in a process of their own."""

import os
import textwrap
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from flask import Flask
from support.databases import close
from support.fleet import make_app
from support.processes import ROOT, environment

from background import BackgroundWorkerManager, PeriodicWorker, WorkerContext

SHOP = """
    from datetime import timedelta

    from background import MessageWorker, PeriodicWorker
    from support.fleet import from_environment


    class PassiveUserCheckerWorker(PeriodicWorker):
        period = timedelta(days=7)

        def do_work(self, context):
            pass


    class MorningReportWorker(PassiveUserCheckerWorker):
        pass


    class OrderWorker(MessageWorker):
        topic = "orders"

        def handle(self, message, context):
            pass


    def create_app():
        return from_environment(PassiveUserCheckerWorker, MorningReportWorker, OrderWorker)
"""


class PassiveUserCheckerWorker(PeriodicWorker):
    period = timedelta(days=7)

    def do_work(self, context: WorkerContext) -> None:
        pass


class MorningReportWorker(PassiveUserCheckerWorker):
    def do_work(self, context: WorkerContext) -> None:
        raise ValueError("a report that is longer than a line of the terminal, because it has many words " * 2)


@pytest.fixture
def shop(database_url: str) -> Iterator[Flask]:
    app = make_app(database_url, PassiveUserCheckerWorker, MorningReportWorker)
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    for name in manager.workers:
        assert manager.tick(name, manager.history.clock())
    yield app
    close(app)


@pytest.fixture
def env(shop: Flask, database_url: str, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Return the environment of a process with the shop of this test."""
    (tmp_path / "shop.py").write_text(textwrap.dedent(SHOP))
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), str(tmp_path)))

    def env(**more: str) -> dict[str, str]:
        usual = {"FLASK_APP": "shop", "PYTHONPATH": path, "TERM": "xterm", "TZ": "Europe/Berlin"}
        return {
            name: value
            for name, value in environment(database_url, **(usual | more)).items()
            if name not in ("COLUMNS", "LINES") and (name != "NO_COLOR" or name in more)
        }

    return env

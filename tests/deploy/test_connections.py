"""The number of connections of one process to PostgreSQL, as docs/deploying.md says."""

import re
import threading
from collections.abc import Callable, Iterator

import pytest
from flask import Flask
from sqlalchemy import create_engine
from sqlalchemy import text as sql
from sqlalchemy.pool import NullPool
from support.databases import on_postgresql
from support.fleet import Fleet, db, effect, wait_until
from support.processes import ROOT

from background import Message, MessageWorker, WorkerContext, current_workers

PAGE = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
KEPT = int(re.search(r"keeps at most (\d+) idle\s+connections", PAGE)[1])
FORMULA = re.search(r"\n    (.*\bWORKERS_THREADS\b.*)\n", PAGE)[1]

THREADS, REQUESTS, MESSAGES = 10, 3, 200


class Busy(MessageWorker):
    """Has as many runs at once as the process has threads. The first runs wait for each other."""

    topic = "busy"
    concurrency = THREADS
    batch_size = 1
    together = threading.Barrier(THREADS)

    def handle(self, message: Message, context: WorkerContext) -> None:
        effect(context)
        if message.payload < THREADS:
            self.together.wait()


@pytest.fixture
def app(fleet: Fleet) -> Flask:
    options = {"connect_args": {"application_name": "measured"}}
    return fleet.app(Busy, SQLALCHEMY_ENGINE_OPTIONS=options, WORKERS_THREADS=THREADS)


@pytest.fixture
def count(database_url: str) -> Iterator[Callable[[], int]]:
    """Give a function that counts the connections of the app."""
    engine = create_engine(database_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'measured' AND datname = current_database()"
    with engine.connect() as connection:
        yield lambda: int(connection.scalar(sql(query)) or 0)


@on_postgresql
def test_a_process_has_no_more_connections_than_the_page_says(
    fleet: Fleet, app: Flask, count: Callable[[], int]
) -> None:
    app.extensions["background_workers"].start()
    most = busiest(fleet, app, count)
    assert THREADS < most <= eval(FORMULA, {"WORKERS_THREADS": THREADS, "requests": REQUESTS})
    wait_until(lambda: count() <= KEPT, "the close of the connections that are not kept")


def busiest(fleet: Fleet, app: Flask, count: Callable[[], int]) -> int:
    """Return the greatest number of connections while all threads of the process work and visitors come."""
    done, seen = threading.Event(), []

    def visit() -> None:
        while not done.is_set():
            for path in ("/health/ready", "/health/workers", "/metrics", "/workers/"):
                app.test_client().get(path)
            enqueue(app, THREADS)

    visitors = [threading.Thread(target=visit) for _ in range(REQUESTS)]
    enqueue(app, *range(MESSAGES))
    for each in visitors:
        each.start()
    try:
        wait_until(lambda: seen.append(count()) or len(fleet.effects()) >= MESSAGES, "the messages")
    finally:
        done.set()
        for each in visitors:
            each.join()
    return max(seen)


def enqueue(app: Flask, *payloads: int) -> None:
    with app.app_context():
        current_workers.enqueue_many("busy", payloads)
        db.session.commit()

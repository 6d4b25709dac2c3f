"""The pages of the dashboard, on a big database beside a small one, with the same number of queries."""

import gc
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, event

from app import create_app
from migrations.schema import upgrade
from models import db

from ..harness.clock import clock
from ..harness.databases import database
from ..harness.figures import Figure, Setup, check, percentile, progress
from ..harness.history import EMAIL, PASSWORD, Size, fill
from ..harness.processes import idle_workers

LIMIT = 50  # ms
WARM_UP = 3
STARTED = datetime.now(UTC)
SMALL, BIG = Size(10, 1_000, 3, 1_000), Size(1_000, 1_000_000, 100, 1_000_000)
BIGGER = Size(30, 3_000, 10, 3_000)  # of the small scale


def run(setup: Setup) -> Iterator[Figure]:
    rounds = setup.size(1, 30)
    small, large = (measured(setup.engine, size, rounds) for size in (SMALL, BIGGER if setup.is_small else BIG))
    # The most queries of each route on the small database. A timeline sends more for a window with gaps.
    most: Counter[str] = Counter()
    for page, on_small in small.items():
        most[route(page)] = max(most[route(page)], on_small.queries)
    for (page, on_large), on_small in zip(
        large.items(), small.values(), strict=True
    ):  # the ids in the addresses differ
        check(
            on_large.queries <= most[route(page)],
            f"{page} sends {on_large.queries} queries, and at most {most[route(page)]} on a small database",
        )
        yield Figure(page, "ms", [on_large.p50], "a small database", [on_small.p50], f"<= {LIMIT} ms")
    slowest = max(large, key=lambda page: large[page].p99)
    yield Figure(f"slowest page, p99: {slowest}", "ms", [large[slowest].p99], aim=f"<= {LIMIT} ms")


@dataclass(frozen=True)
class Measured:
    """The milliseconds of a page, and its queries."""

    p50: float
    p99: float
    queries: int


def route(page: str) -> str:
    """Return the address without its query and without ids."""
    return re.sub(r"/\d+$", "", page.partition("?")[0])


def measured(engine: str, size: Size, rounds: int) -> dict[str, Measured]:
    with database(engine) as url:
        app = create_app(
            {"DATABASE_URL": url, "SECRET_KEY": "x" * 40, "WTF_CSRF_ENABLED": False, "LOG_LEVEL": "WARNING"}
        )
        try:
            for worker in idle_workers(size.workers, "worker"):  # so that the pages show the actions of each
                app.extensions["background_workers"].add(worker)
            with app.app_context():
                upgrade()
                fill(app, size)
            gc.collect()
            gc.freeze()  # like gunicorn.conf.py
            client = logged_in(app)
            return timed(client, list(pages(app, size)), rounds, engine)
        finally:
            app.extensions["background_workers"].stop()
            with app.app_context():
                db.engine.dispose()


def logged_in(app: Flask) -> FlaskClient:
    client = app.test_client()
    answer = client.post("/login", data={"email": EMAIL, "password": PASSWORD})
    assert answer.status_code == 302, answer.text
    return client


def pages(app: Flask, size: Size) -> Iterator[str]:
    """Yield the addresses of the dashboard, some with queries, and of the pages for monitors."""
    round_number = size.executions - size.executions % size.workers
    values: dict[str, dict[str, Any]] = {
        "background.message": {"id": size.messages},
        "background.execution": {"name": "worker_7", "id": round_number - size.workers + 7},
    }
    more = {
        "background.overview": ["page=2", "q=worker_7"],
        "background.worker": ["state=failed", f"until={ago(3_600)}", f"at={ago(3_600)}"],
        "background.timeline": [
            "window=1m",
            "window=1h",
            "window=6h",
            f"until={ago(7_200)}",
            "worker=worker_7&window=6h",
        ],
        "background.charts": ["span=1h", "span=14d"],
        "background.messages": ["topic=orders", "state=dead", "state=waiting", "text=nothing", "error=nothing"],
    }
    with app.test_request_context():
        for rule in app.url_map.iter_rules():
            is_engine = rule.endpoint.startswith("background.") and not rule.endpoint.endswith("static")
            if "GET" in (rule.methods or ()) and (is_engine or rule.rule in ("/metrics", "/health/ready")):
                address = app.url_for(
                    rule.endpoint, **values.get(rule.endpoint, dict.fromkeys(rule.arguments, "worker_7"))
                )
                yield address
                yield from (f"{address}?{query}" for query in more.get(rule.endpoint, ()))


def ago(seconds: float) -> str:
    return (STARTED - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def timed(client: FlaskClient, addresses: list[str], rounds: int, engine: str) -> dict[str, Measured]:
    """Get the pages in turns, so that a slow minute of the machine is not the minute of one page."""
    took: dict[str, list[float]] = {address: [] for address in addresses}
    queries: Counter[str] = Counter()
    for number in progress(range(WARM_UP + rounds), f"{engine}: pages"):
        for address in addresses:
            with counted() as seen:
                began = clock()
                answer = client.get(address)
                seconds = clock() - began
            check(answer.status_code in (200, 503), f"{address}: {answer.status}")
            if number >= WARM_UP:
                took[address].append(seconds * 1000)
            queries[address] = max(queries[address], len(seen))  # the first look at the migrations takes more
    return {
        address: Measured(percentile(of_page, 0.5), percentile(of_page, 0.99), queries[address])
        for address, of_page in took.items()
    }


@contextmanager
def counted() -> Iterator[list[str]]:
    """Collect the statements on every engine, of the application and of the workers."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", note)

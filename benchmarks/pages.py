"""Milliseconds and queries of every page of the dashboard, on a small and on a big database.

    python -m benchmarks.pages --engine postgresql

Needs requirements-dev.txt: it starts a PostgreSQL of its own. The big one has 1,000 workers, 1,000,000 executions,
100 instances and 1,000,000 messages. The times include the rendering, but no network. The CPU time of this process
stands beside them, because a busy machine lengthens it less.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from flask_security import hash_password
from sqlalchemy import Connection, Engine, event, text

from app import create_app
from background import PeriodicWorker, WorkerContext
from migrations.schema import upgrade
from models import User, db

from .harness.databases import database

EMAIL, PASSWORD = "admin@example.com", "correct horse battery staple"
LIMIT = 50  # ms
WARM_UP = 3
STARTED = datetime.now(UTC)
RUNNING = 50


@dataclass(frozen=True)
class Size:
    workers: int
    executions: int
    instances: int
    messages: int


SMALL = Size(10, 1_000, 3, 1_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["sqlite", "postgresql"], required=True)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    big = Size(arguments.workers, arguments.executions, arguments.instances, arguments.messages)
    small, large = (measured(arguments.engine, size, arguments.rounds) for size in (SMALL, big))
    columns = f"{'p50 ms':>7} {'p99 ms':>7} {'CPU ms':>7} {'queries':>8}"
    print(f"{'':58} {'small':>32} {'big':>32}\n{'page':58} {columns} {columns}")
    for (page, much), little in zip(large.items(), small.values(), strict=True):  # the ids in them differ
        notes = ["over the limit"] * (much.p50 > LIMIT) + ["more queries"] * (much.queries > little.queries)
        print(f"{page:58} {little} {much} {', '.join(notes)}".rstrip())
    pages = {page: much for page, much in large.items() if page.startswith("/workers/")}
    for share in ("p50", "p99", "cpu"):
        slowest = max(pages, key=lambda page: getattr(pages[page], share))
        print(f"slowest page, {share} (aim: < {LIMIT} ms): {getattr(pages[slowest], share):.1f} ms, {slowest}")


@dataclass(frozen=True)
class Figures:
    p50: float
    p99: float
    cpu: float
    queries: int

    def __str__(self) -> str:
        return f"{self.p50:7.1f} {self.p99:7.1f} {self.cpu:7.1f} {self.queries:8}"


def measured(engine: str, size: Size, rounds: int) -> dict[str, Figures]:
    with database(engine) as url:
        app = create_app(
            {"DATABASE_URL": url, "SECRET_KEY": "x" * 40, "WTF_CSRF_ENABLED": False, "LOG_LEVEL": "WARNING"}
        )
        try:
            register(app, size.workers)
            with app.app_context():
                upgrade()
                fill(app, size)
            gc.collect()
            gc.freeze()  # like gunicorn.conf.py
            client = logged_in(app)
            return {address: timed(client, address, rounds) for address in list(pages(app, size))}
        finally:
            app.extensions["background_workers"].stop()
            with app.app_context():
                db.engine.dispose()


def register(app: Flask, workers: int) -> None:
    """Register all workers, so that the pages show the actions of each."""
    for number in range(workers):
        declared = {"__doc__": "Look at the rows.", "name": f"worker_{number}", "period": timedelta(hours=1)}
        app.extensions["background_workers"].add(type("Worker", (PeriodicWorker,), {**declared, "do_work": look}))


def look(_worker: PeriodicWorker, _context: WorkerContext) -> None:
    """Do nothing. No worker runs here."""


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


def timed(client: FlaskClient, address: str, rounds: int) -> Figures:
    took, computed, queries = [], [], 0
    for number in range(WARM_UP + rounds):
        with counted() as seen:
            began, spent = time.perf_counter(), time.process_time()
            answer = client.get(address)
            spent, seconds = time.process_time() - spent, time.perf_counter() - began
        assert answer.status_code in (200, 503), f"{address}: {answer.status}"
        if number >= WARM_UP:
            took.append(seconds * 1000)
            computed.append(spent * 1000)
            queries = max(queries, len(seen))
    took.sort()
    return Figures(took[len(took) // 2], took[int(len(took) * 0.99)], statistics.median(computed), queries)


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


# -- filling -------------------------------------------------------------------------------------


def fill(app: Flask, size: Size) -> None:
    admin = User(email=EMAIL, name="Admin", is_admin=True, created_at=datetime.now(UTC), confirmed_at=datetime.now(UTC))
    admin.password = hash_password(PASSWORD)
    db.session.add(admin)
    db.session.commit()
    heartbeats = app.extensions["background_workers"].stores.connections.heartbeats
    with heartbeats.begin() as connection:
        fill_instances(connection, size)
    with db.engine.begin() as connection:
        fill_workers(connection, size)
        fill_messages(connection, size)
    with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE" if connection.dialect.name == "postgresql" else "ANALYZE")
    while app.extensions["background_workers"].stores.roll_up.step():
        pass


def insert(connection: Connection, rows: int, table: str, **columns: str) -> None:
    """Insert `rows` rows. Each column is an SQL expression of `i`, which counts from 1."""
    names, expressions = ", ".join(columns), ", ".join(columns.values())
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})"
    connection.execute(text(f"INSERT INTO {table} ({names}) {numbers} SELECT {expressions} FROM n"))


def before(connection: Connection, seconds: str) -> str:
    """Return SQL for the moment `seconds` ago. `seconds` is an SQL expression."""
    if connection.dialect.name == "postgresql":
        return f"now() - ({seconds}) * interval '1 second'"
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', printf('%+.3f seconds', -({seconds})))"


def fill_instances(connection: Connection, size: Size) -> None:
    insert(
        connection,
        size.instances,
        "background_instances",
        id="'instance_' || i",
        host="'host-' || i",
        pid="4000 + i",
        started_at=before(connection, "86400 + i"),
        heartbeat_at=before(connection, "1"),
        expires_at=before(connection, "-86400"),
        clock_offset="0.001",
        release="'3f2a91c'",
    )


def fill_workers(connection: Connection, size: Size) -> None:
    """Insert a fleet that begins about 17 executions each second. Some fail, and the newest are running."""
    began = f"({size.executions} - i) * 0.06"
    is_running, has_failed = f"i > {size.executions - RUNNING}", "i % 97 = 0"
    insert(
        connection,
        size.executions,
        "background_executions",
        worker=f"'worker_' || (i % {size.workers})",
        tick=before(connection, f"{began} + 0.01"),
        trigger="'schedule'",
        state=f"CASE WHEN {is_running} THEN 'running' WHEN {has_failed} THEN 'failed' ELSE 'succeeded' END",
        attempt="1",
        token="i",
        instance=f"'instance_' || (1 + i % {size.instances})",
        instance_name=f"'host-' || (1 + i % {size.instances}) || ':' || (4001 + i % {size.instances})",
        started_at=before(connection, began),
        finished_at=f"CASE WHEN NOT ({is_running}) THEN {before(connection, f'{began} - 0.05')} END",
        reason=f"CASE WHEN {has_failed} THEN 'Traceback (most recent call last):\n  File ...\nOSError: no' END",
        log="'2026-11-20 12:00:00,000 INFO    looked at ' || i || ' rows'",
    )
    insert(
        connection,
        size.workers,
        "background_workers",
        name="'worker_' || (i - 1)",
        mark=before(connection, "60"),
        token=f"{size.executions} + 1",
        schedule="'every 3600s'",
        declared="'every 3600s'",
        scheduled_at=before(connection, "86400"),
        running=f"(SELECT token FROM background_executions WHERE id > {size.executions - RUNNING}"
        f" AND worker = 'worker_' || (n.i - 1) ORDER BY id DESC LIMIT 1)",
    )
    for kind in ("state", "duration", "lateness"):
        labels = 3 if kind == "state" else 12
        insert(
            connection,
            size.workers * labels,
            "background_totals",
            worker=f"'worker_' || (i % {size.workers})",
            kind=f"'{kind}'",
            label=f"CASE (i - 1) / {size.workers} WHEN 0 THEN 'succeeded' WHEN 1 THEN 'failed' ELSE 'lost' END"
            if kind == "state"
            else f"'' || ((i - 1) / {size.workers})",
            count="i",
            seconds="i * 0.5",
            latest_at=before(connection, "60"),
        )


def fill_messages(connection: Connection, size: Size) -> None:
    """Insert messages. Most are done, 1 % wait, 0.1 % are dead and 0.01 % are running."""
    is_waiting, is_dead, is_running = "i % 100 = 1", "i % 1000 = 0", "i % 10000 = 2"
    state = f"CASE WHEN {is_waiting} THEN 'waiting' WHEN {is_dead} THEN 'dead' WHEN {is_running} THEN 'running'"
    at = f"({size.messages} - i) * 0.02"
    insert(
        connection,
        size.messages,
        "background_messages",
        topic="CASE i % 3 WHEN 0 THEN 'mail' ELSE 'orders' END",
        payload="'{\"order\": ' || i || '}'",
        state=f"{state} ELSE 'done' END",
        enqueued_at=before(connection, at),
        due_at=before(connection, at),
        attempt="1",
        token="1",
        instance=f"CASE WHEN {is_running} THEN 'instance_' || (1 + i % {size.instances}) END",
        claimed_at=before(connection, at),
        finished_at=f"CASE WHEN NOT ({is_waiting} OR {is_running}) THEN {before(connection, at)} END",
    )
    insert(
        connection,
        size.messages // 1000,
        "background_message_errors",
        message="i * 1000",
        attempt="1",
        at=before(connection, "60"),
        error="'Traceback (most recent call last):\n  File ...\nOSError: no'",
    )


if __name__ == "__main__":
    main()

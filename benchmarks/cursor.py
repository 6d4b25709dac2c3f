"""The sweep of stale users with its cursor: killed again and again, and beside the same sweep without a cursor.

    python -m benchmarks.cursor --engine postgresql --users 1000000 --kills 20
    python -m benchmarks.cursor --engine postgresql --users 200000 --pairs 6

With `--kills`, processes run `PassiveUserCheckerWorker`, and the process that sweeps is killed so many times. It exits
with 1 if a slice was done twice or missed. With `--pairs`, the ratio of the times counts. Needs requirements-dev.txt.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import svcs
from flask import Flask, current_app
from sqlalchemy import Column, Engine, Integer, MetaData, Table, func, insert, select, update

import app as shop
from background import WorkerContext
from background.database.tables import executions
from background.manager import the_manager
from background.runs.fence import current_run
from demo import add_users
from models import User, UserRepository, db
from workers import PassiveUserCheckerWorker

from .harness.databases import context, database, settle

PROCESSES = 3
SETTINGS = {"WORKERS_LEASE_SECONDS": "2", "WORKERS_HEARTBEAT_SECONDS": "0.5", "LOG_LEVEL": "WARNING"}

slices = Table(
    "benchmark_slices",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("first", Integer, nullable=False),
    Column("last", Integer, nullable=False),
    Column("changed", Integer, nullable=False),
)


class TracedRepository(UserRepository):
    """Leaves a row for each slice, in the slice's own transaction."""

    def _set_passive(self, ids: str, cutoff: datetime) -> int:
        changed = super()._set_passive(ids, cutoff)
        numbers = [int(each) for each in ids.strip("{}[]").split(",")]
        attempt = run.attempt if (run := current_run.get()) else 0
        row = {"attempt": attempt, "first": min(numbers), "last": max(numbers), "changed": changed}
        self.session.execute(insert(slices).values(row))
        return changed


def create_app() -> Flask:
    """Make the application of the processes that are killed (FLASK_APP)."""
    app = shop.create_app()
    for name in app.extensions["background_workers"].names - {PassiveUserCheckerWorker.name}:
        app.extensions["background_workers"].remove(name)
    svcs.flask.register_factory(app, UserRepository, lambda: TracedRepository(db.session))
    return app


PassiveUserCheckerWorker.max_attempts = 1_000


class SweepWithoutCursor(PassiveUserCheckerWorker):
    """The same work, and no cursor."""

    name = "sweep_without_cursor"

    def do_work(self, context: WorkerContext) -> None:
        users = context.services.get(UserRepository)
        cutoff = context.tick - timedelta(days=current_app.config["PASSIVE_AFTER_DAYS"])

        def after_slice(done: int, total: int, last_id: int) -> None:
            context.progress(done, total)
            context.commit()
            context.raise_if_stopping()

        users.update_inactive_user_statuses(cutoff, after_slice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["sqlite", "postgresql"], required=True)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=0)
    arguments = parser.parse_args()
    with database(arguments.engine) as url, context(url):
        add_users(db.engine, arguments.users, datetime.now(UTC))
        make_all_stale(db.engine)
        if arguments.pairs:
            compare(db.engine, arguments.pairs)
        is_fine = not arguments.kills or kill(db.engine, url, arguments.users, arguments.kills)
    sys.exit(0 if is_fine else 1)


def make_all_stale(engine: Engine) -> None:
    with engine.begin() as connection:
        for part in range(50):  # as different as in a real table, for PostgreSQL's planner
            long_ago = datetime.now(UTC) - timedelta(days=365 + part)
            stale = update(User).where(User.id % 50 == part).values(status="active", last_login_at=long_ago)
            connection.execute(stale)
    settle(engine)


# -- beside a sweep without a cursor -------------------------------------------------------------


def compare(engine: Engine, pairs: int) -> None:
    manager = the_manager()
    manager.add(SweepWithoutCursor)
    ratios = []
    for number in range(pairs):
        names = [SweepWithoutCursor.name, PassiveUserCheckerWorker.name]
        took = {name: timed(engine, name) for name in (names if number % 2 else reversed(names))}
        without, with_cursor = (took[name] for name in names)
        ratios.append(with_cursor / without)
        print(f"{number + 1}: without {without:.2f} s, with {with_cursor:.2f} s: x{ratios[-1]:.3f}", flush=True)
    print(f"time with a cursor, of the time without (aim: <= 1.03): x{statistics.median(ratios):.3f}", flush=True)


def timed(engine: Engine, name: str) -> float:
    make_all_stale(engine)
    execution = the_manager().trigger(name)
    assert execution is not None
    assert execution.state == "succeeded"
    columns = executions.c.started_at, executions.c.finished_at
    with engine.connect() as connection:
        began, ended = connection.execute(select(*columns).where(executions.c.id == execution.claim.execution)).one()
    return float((ended - began).total_seconds())


# -- killed again and again ----------------------------------------------------------------------


def kill(engine: Engine, url: str, users: int, kills: int) -> bool:
    """Kill the sweeping process `kills` times. Return whether each slice was done once."""
    make_all_stale(engine)
    slices.create(engine)
    size = UserRepository.slice_size
    began = time.monotonic()
    with ExitStack() as started:
        fleet = [started.enter_context(process(url)) for _ in range(PROCESSES)]
        for number in range(1, kills + 1):
            wait_for_slices(engine, number * (users // size) // (kills + 1))
            victim = sweeping(engine, fleet)
            victim.kill()
            victim.wait()
            fleet.remove(victim)
            fleet.append(started.enter_context(process(url)))
        while newest(engine).state != "succeeded":
            time.sleep(0.1)
    return report(engine, users, time.monotonic() - began)


@contextmanager
def process(url: str) -> Iterator["subprocess.Popen[bytes]"]:
    environment = {**os.environ, **SETTINGS, "DATABASE_URL": url, "SECRET_KEY": "benchmark"}
    command = [sys.executable, "-m", "flask", "--app", "benchmarks.cursor:create_app", "workers", "run"]
    with subprocess.Popen(command, env=environment) as started:
        try:
            yield started
        finally:
            started.terminate()


def newest(engine: Engine) -> Any:
    query = select(executions).where(executions.c.worker == PassiveUserCheckerWorker.name)
    with engine.connect() as connection:
        return connection.execute(query.order_by(executions.c.id.desc()).limit(1)).one()


def sweeping(engine: Engine, fleet: list["subprocess.Popen[bytes]"]) -> "subprocess.Popen[bytes]":
    """Return the process that sweeps, once the tick of a killed process is taken over."""
    pids = {process.pid: process for process in fleet}
    while True:
        row = newest(engine)
        if row.state == "running" and (found := pids.get(int(row.instance_name.rpartition(":")[2]))):
            return found
        time.sleep(0.02)


def wait_for_slices(engine: Engine, number: int) -> None:
    with engine.connect() as connection:
        while (connection.scalar(select(func.count()).select_from(slices)) or 0) < number:
            connection.rollback()
            time.sleep(0.02)


def report(engine: Engine, users: int, seconds: float) -> bool:
    with engine.connect() as connection:
        rows = connection.execute(select(slices).order_by(slices.c.first)).all()
        passive = connection.scalar(select(func.count()).where(User.status == "passive").select_from(User))
    again = sum(following.first <= row.last for row, following in pairwise(rows))
    changed, attempts = sum(row.changed for row in rows), {row.attempt for row in rows}
    print(f"{len(rows)} slices by {len(attempts)} attempts, the last {max(attempts)}, in {seconds:.0f} s")
    print(f"slices done twice (aim: 0): {again}")
    print(f"users passive: {passive:,} of {users:,}, changed by slices: {changed:,}")
    return again == 0 and passive == changed == users


if __name__ == "__main__":
    main()

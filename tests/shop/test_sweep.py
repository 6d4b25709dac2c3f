"""The sweep of stale users: its boundary, the logins during a sweep, and its cost."""

import re
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Event, Thread
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import Engine, event, select, text, update
from sqlalchemy.orm import Session

from background.testing import run_worker
from demo import add_users
from models import User, UserRepository, db
from workers import PassiveUserCheckerWorker

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
CUTOFF = NOW - timedelta(days=30)
STALE = NOW - timedelta(days=31)
FRESH = NOW - timedelta(days=1)


@pytest.fixture
def users(app: Flask) -> Iterator[UserRepository]:
    with app.app_context():
        yield UserRepository(db.session)
        db.session.remove()


def status(user: User) -> str:
    with Session(db.engine) as session:
        return session.scalars(select(User.status).where(User.id == user.id)).one()


AGES = [
    (timedelta(days=29, hours=23), "active"),
    (timedelta(days=30), "active"),
    (timedelta(days=30, microseconds=1), "passive"),
    (timedelta(days=30, seconds=1), "passive"),
]


def test_a_user_is_passive_when_last_seen_more_than_30_days_ago(
    users: UserRepository, make_user: Callable[..., User]
) -> None:
    """`created_at` counts for a user who has never logged in."""
    for column, (age, expected) in product(("last_login_at", "created_at"), AGES):
        user = make_user(**{"created_at": NOW - timedelta(days=300), column: NOW - age})
        assert users.update_inactive_user_statuses(CUTOFF) == (expected == "passive"), (column, age)
        assert status(user) == expected, (column, age)


def test_a_login_counts_and_not_the_age_of_the_account(users: UserRepository, make_user: Callable[..., User]) -> None:
    user = make_user(created_at=NOW - timedelta(days=300), last_login_at=FRESH)
    assert users.update_inactive_user_statuses(CUTOFF) == 0
    assert status(user) == "active"


def test_an_admin_is_not_exempt(users: UserRepository, make_user: Callable[..., User]) -> None:
    admin = make_user(created_at=STALE, is_admin=True)
    assert users.update_inactive_user_statuses(CUTOFF) == 1
    assert status(admin) == "passive"


def test_a_passive_user_is_not_counted_again(users: UserRepository, make_user: Callable[..., User]) -> None:
    make_user(created_at=STALE)
    assert [users.update_inactive_user_statuses(CUTOFF) for _ in range(2)] == [1, 0]


def test_logging_in_makes_a_passive_user_active(users: UserRepository, make_user: Callable[..., User]) -> None:
    user = make_user(created_at=STALE, status="passive")
    users.record_login(user.id, NOW)
    db.session.commit()
    assert status(user) == "active"
    assert users.update_inactive_user_statuses(CUTOFF) == 0


def test_each_slice_is_committed_and_reported(users: UserRepository, make_user: Callable[..., User]) -> None:
    stale = [make_user(created_at=STALE) for _ in range(5)]
    make_user(created_at=FRESH)
    users.slice_size = 2
    seen = []

    def after_slice(done: int, total: int, last_id: int) -> None:
        db.session.commit()
        seen.append((done, total, [status(user) for user in stale].count("passive")))

    assert users.update_inactive_user_statuses(CUTOFF, after_slice) == 5
    assert seen == [(2, 5, 2), (4, 5, 4), (5, 5, 5)]


def test_a_stopped_sweep_keeps_its_committed_slices(users: UserRepository, make_user: Callable[..., User]) -> None:
    stale = [make_user(created_at=STALE) for _ in range(4)]
    users.slice_size = 2

    def stop(done: int, total: int, last_id: int) -> None:
        db.session.commit()
        raise InterruptedError

    with pytest.raises(InterruptedError):
        users.update_inactive_user_statuses(CUTOFF, stop)
    db.session.rollback()
    assert [status(user) for user in stale] == ["passive", "passive", "active", "active"]
    assert users.update_inactive_user_statuses(CUTOFF) == 2


def test_a_worker_that_was_stopped_goes_on_behind_its_last_slice(
    app: Flask, users: UserRepository, make_user: Callable[..., User], monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = [make_user(created_at=STALE) for _ in range(6)]
    monkeypatch.setattr(UserRepository, "slice_size", 2)
    statements: list[str] = []

    @event.listens_for(db.engine, "before_cursor_execute")
    def stop(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE users SET status"):
            statements.append(statement)
            if len(statements) == 2:
                app.extensions["background_workers"].runs.tell()

    assert run_worker(app, PassiveUserCheckerWorker).state == "handed back"
    assert [status(user) for user in stale].count("passive") == 4
    with db.engine.begin() as connection:  # a second look at the finished slice would find this user
        connection.execute(update(User).where(User.id == stale[0].id).values(status="active"))
    assert run_worker(app, PassiveUserCheckerWorker).state == "succeeded"
    assert [status(user) for user in stale] == ["active", *["passive"] * 5]


def test_a_login_between_two_slices_wins(users: UserRepository, make_user: Callable[..., User]) -> None:
    first, second = make_user(created_at=STALE), make_user(created_at=STALE)
    users.slice_size = 1

    def log_the_second_in(done: int, total: int, last_id: int) -> None:
        db.session.commit()
        if done == 1:
            log_in(second)

    assert users.update_inactive_user_statuses(CUTOFF, log_the_second_in) == 1
    assert (status(first), status(second)) == ("passive", "active")


def log_in(user: User) -> None:
    with Session(db.engine) as session:
        UserRepository(session).record_login(user.id, NOW)
        session.commit()


def test_a_login_that_the_sweep_waits_for_wins(
    app: Flask, users: UserRepository, make_user: Callable[..., User]
) -> None:
    """Hold the row (on SQLite the only write lock) when the sweep's statement reaches it."""
    user = make_user(created_at=STALE)
    reached, swept = Event(), []

    def on_update(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE users SET status"):
            reached.set()

    def sweep() -> None:
        with app.app_context():
            swept.append(UserRepository(db.session).update_inactive_user_statuses(CUTOFF))
            db.session.remove()

    with Session(db.engine) as session:
        UserRepository(session).record_login(user.id, NOW)
        event.listen(db.engine, "before_cursor_execute", on_update)
        thread = Thread(target=sweep)
        thread.start()
        assert reached.wait(20)
        wait_until_blocked(db.engine, thread)
        session.commit()
    thread.join(20)
    assert swept == [0]
    assert status(user) == "active"


def wait_until_blocked(engine: Engine, thread: Thread) -> None:
    """Wait until the statement is blocked.

    PostgreSQL lists the waiting sessions. SQLite's driver waits unseen, so its wait may start later.
    """
    if engine.dialect.name == "sqlite":
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'UPDATE%'")
        while connection.scalar(waiting) == 0:
            assert thread.is_alive()


def test_a_sweep_with_nothing_to_do_is_one_probe_of_the_index(
    users: UserRepository, make_user: Callable[..., User], engine: Engine
) -> None:
    make_user(created_at=FRESH)
    statements: list[tuple[str, Any]] = []
    event.listen(engine, "before_cursor_execute", lambda c, cur, sql, values, *_: statements.append((sql, values)))
    assert users.update_inactive_user_statuses(CUTOFF) == 0
    [(sql, values)] = statements
    assert "ix_users_last_seen_at_of_active" in plan(engine, sql, values)


def test_the_query_for_stale_users_reads_the_index_of_active_users(users: UserRepository, engine: Engine) -> None:
    add_users(engine, 2_000, NOW)
    statements: list[tuple[str, Any]] = []
    event.listen(engine, "before_cursor_execute", lambda c, cur, sql, values, *_: statements.append((sql, values)))
    assert users.update_inactive_user_statuses(CUTOFF) == 200
    _probe, (look, look_values), (update, update_values) = statements
    assert "ix_users_last_seen_at_of_active" in plan(engine, look, look_values)
    if engine.dialect.name == "sqlite":  # PostgreSQL's planner chooses by cost
        assert "INTEGER PRIMARY KEY" in plan(engine, update, update_values)
    else:  # the list is a constant of the plan
        assert re.search(r"id = ANY \('\{[\d,]+\}'::integer\[\]\)", plan(engine, update, update_values))


def plan(engine: Engine, sql: str, values: Any) -> str:
    """Return the query plan, with sequential scans of small tables discouraged."""
    explain = "EXPLAIN " if engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET enable_seqscan = off")
        rows = connection.exec_driver_sql(explain + sql, values).fetchall()
        connection.invalidate()  # the settings end with the connection
    return "\n".join(str(row[-1]) for row in rows)


LOG_IN_UNTIL_TOLD = """
import multiprocessing, sys
from datetime import UTC, datetime
from random import Random
from app import create_app
from models import UserRepository, db

app = create_app({"DATABASE_URL": sys.argv[1], "SECRET_KEY": "test"})
context = multiprocessing.get_context("fork")  # nothing is opened yet, no thread runs: as under gunicorn --preload
began, told = context.Barrier(9), context.Event()

def member(number):
    with app.app_context():
        users, random, logins = UserRepository(db.session), Random(number), 0
        began.wait()
        while not (logins and told.is_set()):
            users.record_login(random.randint(1, 20_000), datetime.now(UTC))
            db.session.commit()
            logins += 1

members = [context.Process(target=member, args=(number,)) for number in range(8)]
for process in members:
    process.start()
began.wait()
print("ready", flush=True)
sys.stdin.readline()
told.set()
for process in members:
    process.join()
print([process.exitcode for process in members])
"""


@pytest.mark.promise
def test_eight_processes_that_log_users_in_meet_no_locked_database(
    users: UserRepository, database_url: str, engine: Engine
) -> None:
    add_users(engine, 20_000, datetime.now(UTC))
    cutoff = datetime.now(UTC) - timedelta(days=30)
    command = [sys.executable, "-c", LOG_IN_UNTIL_TOLD, database_url]
    users.slice_size = 200
    with Popen(command, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as logins:
        assert logins.stdout is not None
        assert logins.stdout.readline() == "ready\n"
        changed = users.update_inactive_user_statuses(cutoff)
        answer, errors = logins.communicate("\n", timeout=60)
    assert answer == f"{[0] * 8}\n", errors
    assert 0 < changed <= 2_000
    with Session(engine) as session:
        assert UserRepository(session).update_inactive_user_statuses(cutoff) == 0

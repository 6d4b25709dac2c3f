"""The condition of the fleet: each page, the commands and a probe show when no worker runs."""

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from click.testing import Result
from flask import Flask
from flask.testing import FlaskClient
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Column, Engine, Index, Integer, event, insert, update
from sqlalchemy import text as sql
from sqlalchemy.exc import OperationalError
from support.databases import close, on_postgresql, on_sqlite
from support.fleet import HOUR, PATIENCE, Fleet, Hourly, db, statements, wait_until

from background import BackgroundWorkerManager, MessageWorker, PeriodicWorker
from background.dashboard import dashboard
from background.database import tables
from background.history.condition import condition
from background.monitoring.health import health
from background.testing.runs import wait_until_joined

PAGES = ("", "timeline", "timeline?until=2026-01-01T00:00Z", "instances", "messages", "worker/hourly")


class Timed(Hourly):
    timeout = timedelta(seconds=30)


class Noting(MessageWorker):
    topic = "notes"

    def handle(self, message: Any, context: Any) -> None:
        pass


def manager_of(app: Flask) -> BackgroundWorkerManager:
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    return manager


def asked(app: Flask) -> tuple[int, dict[str, Any]]:
    """Return the status of /health/workers, and its checks without their ages."""
    response = app.test_client().get("/health/workers")
    assert response.headers["Cache-Control"] == "no-store"
    assert response.json["status"] == ("running" if response.status_code == 200 else "not running")
    checks = response.json["checks"]
    for check in checks.values():
        check.pop("age_seconds", None)
    return response.status_code, checks


def failed(app: Flask) -> list[str]:
    status, checks = asked(app)
    names = [name for name, check in checks.items() if not check["ok"]]
    assert status == (503 if names else 200)
    return names


def command(app: Flask, *arguments: str) -> Result:
    return app.test_cli_runner().invoke(args=["workers", *arguments])


def joined(fleet: Fleet, *workers: type[PeriodicWorker], **config: Any) -> Flask:
    """Give an application that has joined the fleet, and whose workers are known."""
    app = fleet.app(*workers, **config)
    manager_of(app).start()
    wait_until_joined(manager_of(app))
    for worker in workers:
        manager_of(app).recovery.look(worker)
    return app


def left(fleet: Fleet, **columns: Any) -> None:
    """Pretend that the last instance left a quarter of an hour ago."""
    ago = datetime.now(UTC) - timedelta(minutes=15)
    manager = manager_of(fleet.apps[0])
    with manager.stores.leases.engine.begin() as connection:
        connection.execute(update(tables.instances).values(**{"heartbeat_at": ago, "expires_at": ago} | columns))


def running(fleet: Fleet, app: Flask, name: str, since: timedelta, instance: str | None = None) -> None:
    """Insert a run that has lasted this long, on the instance `id` or on the application's own."""
    manager = manager_of(app)
    own = manager.presence.instance
    fleet.set(name, token=7, running=7, mark=datetime.now(UTC))
    row = {"worker": name, "tick": datetime.now(UTC) - since, "trigger": "schedule", "state": "running", "attempt": 1}
    row |= {"token": 7, "instance": instance or (own and own.id), "instance_name": "web-1:7"}
    with manager.stores.main.engine.begin() as connection:
        connection.execute(insert(tables.executions).values(**row, started_at=datetime.now(UTC) - since))


# -- no instance is alive --------------------------------------------------------------------------


@pytest.fixture
def silent_app(fleet: Fleet) -> Flask:
    """Give a web process whose workers ran elsewhere until a quarter of an hour ago."""
    app = fleet.app(Hourly, WORKERS_ENABLED=False, WORKERS_LEASE_SECONDS=60)
    gone = fleet.manager(Hourly)
    gone.recovery.look(Hourly)
    gone.presence.sign_on()
    left(fleet)
    return app


def test_every_page_has_a_banner_with_the_time_and_the_command_to_run(
    silent_app: Flask, make_admin: Callable[[Flask], FlaskClient]
) -> None:
    client = make_admin(silent_app)
    for path in PAGES:
        page = client.get(f"/workers/{path}").text
        (alarm,) = re.findall(r'<div class="bw-alarm">(.*?)</div>', page, re.DOTALL)
        sentence = r"No instance has been alive since <time .*?</time> \(15 min( \d+ s)?\): no worker runs"
        assert re.search(sentence, alarm), path
        assert "Start an instance with <code>flask workers run</code>" in alarm
    manager_of(silent_app).presence.sign_on()
    assert [path for path in PAGES if "bw-alarm" in client.get(f"/workers/{path}").text] == []


@pytest.fixture
def make_admin() -> Callable[[Flask], FlaskClient]:
    """Let the dashboard admit every client."""

    def make(app: Flask) -> FlaskClient:
        app.before_request_funcs["background"].clear()
        return app.test_client()

    return make


def test_the_command_line_says_in_the_first_line_that_no_instance_is_alive(silent_app: Flask) -> None:
    first, *_ = command(silent_app, "list").stdout.splitlines()
    assert re.fullmatch(
        r"No instance has been alive since \S+Z \(15 min( \d+ s)?\), when \S+:\d+ was last seen: no worker runs\. "
        r"`flask workers run` starts one\.",
        first,
    )
    checked = command(silent_app, "check")
    assert checked.exit_code == 1
    assert "Problem: No instance has been alive since " in checked.stderr
    (problem, *_) = json.loads(command(silent_app, "check", "--json").stdout)["problems"]
    assert problem.startswith("No instance has been alive since ")


def test_a_probe_of_the_fleet_fails_while_no_instance_is_alive_and_this_process_stays_ready(silent_app: Flask) -> None:
    status, checks = asked(silent_app)
    assert status == 503
    silence = checks["instances"].pop("silent_seconds")
    assert 900 <= silence < 900 + PATIENCE
    assert checks["instances"] == {"ok": False, "alive": 0}
    assert silent_app.test_client().get("/health/ready").status_code == 200
    manager_of(silent_app).presence.sign_on()
    status, checks = asked(silent_app)
    assert status == 200
    assert checks["write"].pop("milliseconds") > 0
    assert checks == {
        "instances": {"ok": True, "alive": 1},
        "overdue": {"ok": True, "workers": []},
        "stuck": {"ok": True, "workers": []},
        "write": {"ok": True},
    }


def test_an_instance_that_signed_off_counts_from_then_on(silent_app: Flask, fleet: Fleet) -> None:
    left(fleet, signed_off_at=datetime.now(UTC) - timedelta(minutes=5))
    assert " (5 min" in command(silent_app, "list").stdout.splitlines()[0]
    assert "signed off: no worker runs" in command(silent_app, "list").stdout.splitlines()[0]


def test_a_row_shows_since_when_its_tick_is_overdue(silent_app: Flask, fleet: Fleet, make_admin) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    fleet.set("hourly", mark=hour - 2 * HOUR, scheduled_at=hour - 9 * HOUR)
    since = (hour - HOUR).isoformat()
    assert f"overdue since {since.replace('+00:00', 'Z')}" in command(silent_app, "list").stdout
    rows = json.loads(command(silent_app, "list", "--json").stdout)
    assert rows[0]["overdue_since"] == since.replace("+00:00", "Z")
    for path in ("", "worker/hourly"):
        page = make_admin(silent_app).get(f"/workers/{path}").text
        assert re.search(rf'overdue since <time datetime="{re.escape(since)}"', page), path
    assert "The worker hourly is overdue since" in command(silent_app, "check").stderr
    manager_of(silent_app).pause("hourly")
    assert "overdue" not in command(silent_app, "list").stdout


# -- workers that wait or are stuck ----------------------------------------------------------------


def test_a_probe_names_the_workers_that_are_overdue_by_two_periods(fleet: Fleet) -> None:
    web, app = fleet.app(Hourly), joined(fleet)
    manager_of(web).recovery.look(Hourly)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    fleet.set("hourly", mark=hour - 2 * HOUR, scheduled_at=hour - 9 * HOUR)
    assert failed(web) == []  # by one period only
    assert "The worker hourly is overdue since" in command(web, "check").stderr
    assert "although 1 instance is alive: the log of an instance says why" in command(web, "check").stderr
    fleet.set("hourly", mark=hour - 3 * HOUR)
    assert failed(web) == ["overdue"]
    assert asked(web)[1]["overdue"] == {"ok": False, "workers": ["hourly"]}
    assert failed(app) == []  # this process does not have the worker


@pytest.mark.promise
@pytest.mark.parametrize(
    ("worker", "since", "why"),
    [
        (Timed, timedelta(minutes=5), r"it runs for 5 min( \d+ s)?, past its timeout of 30\.0 s"),
        (
            Hourly,
            timedelta(hours=5),
            "it runs for 5 h( 1 min)?, longer than three periods and ten times its average",
        ),
    ],
)
def test_a_run_that_does_not_end_is_stuck(
    fleet: Fleet, worker: type[PeriodicWorker], since: timedelta, why: str, make_admin
) -> None:
    web, app = fleet.app(worker), joined(fleet)
    manager_of(web).recovery.look(worker)
    running(fleet, app, worker.name, timedelta(seconds=20))
    assert failed(web) == []
    with fleet.engine.begin() as connection:
        connection.execute(update(tables.executions).values(started_at=datetime.now(UTC) - since))
    assert failed(web) == ["stuck"]
    assert asked(web)[1]["stuck"] == {"ok": False, "workers": [worker.name]}
    checked = command(web, "check")
    assert checked.exit_code == 1
    assert re.search(f"The worker {worker.name} is stuck: {why}", checked.stderr)
    assert re.search(f"stuck: {why}", command(web, "list").stdout)
    assert re.search(f"Stuck: {why}", make_admin(web).get("/workers/").text)


@on_sqlite
def test_a_run_that_lasts_as_long_as_earlier_runs_is_not_stuck(fleet: Fleet) -> None:
    web, app = fleet.app(Hourly), joined(fleet)
    manager_of(web).recovery.look(Hourly)
    running(fleet, app, "hourly", timedelta(hours=5))
    row = {"worker": "hourly", "kind": "duration", "label": "inf", "count": 4, "latest_at": datetime.now(UTC)}
    with fleet.engine.begin() as connection:
        connection.execute(insert(tables.totals).values(**row, seconds=4 * HOUR.total_seconds()))
    assert failed(web) == []


@pytest.mark.promise
def test_the_claim_of_a_dead_instance_is_stuck_if_no_instance_takes_it_over_in_time(fleet: Fleet) -> None:
    web, app = fleet.app(Hourly), joined(fleet)
    manager_of(web).recovery.look(Hourly)
    running(fleet, app, "hourly", timedelta(seconds=3), instance="unknown")
    assert failed(web) == []
    with fleet.engine.begin() as connection:
        connection.execute(update(tables.executions).values(started_at=datetime.now(UTC) - timedelta(minutes=1)))
    assert failed(web) == ["stuck"]
    assert "web-1:7, which runs it, is gone, and no instance takes it over" in command(web, "check").stderr


@pytest.mark.promise
def test_threads_that_are_used_up_are_a_problem_while_a_worker_waits(fleet: Fleet) -> None:
    class Other(Hourly):
        name = "other"

    web, app = fleet.app(Hourly, Other, WORKERS_THREADS=1), joined(fleet)
    for worker in (Hourly, Other):
        manager_of(web).recovery.look(worker)
    running(fleet, app, "hourly", timedelta(seconds=20))
    assert command(web, "check").exit_code == 0, command(web, "check").output
    day_ago = datetime.now(UTC) - timedelta(days=1)
    fleet.set("other", mark=day_ago, scheduled_at=day_ago)
    own = manager_of(app).presence.instance
    assert own is not None
    assert f"The threads of {own.name} are used up (1 of WORKERS_THREADS)" in command(web, "check").stderr


def test_the_fleet_is_seen_in_a_constant_number_of_queries(fleet: Fleet) -> None:
    workers = [type(f"Extra{number}", (Hourly,), {}) for number in range(30)]
    manager = manager_of(fleet.app(*workers))
    manager.stores.controls.register({})
    with statements(manager.stores.leases.engine) as few:
        condition(manager.stores, manager.workers)
    for worker in workers:
        manager.recovery.look(worker)
    with statements(manager.stores.leases.engine) as many:
        assert len(condition(manager.stores, manager.workers).statuses) == 30
    assert len(few) == len(many) == 5


# -- the application's pool ------------------------------------------------------------------------


@on_postgresql
def test_a_probe_of_the_fleet_fails_while_the_applications_pool_cannot_write(fleet: Fleet) -> None:
    app = joined(fleet, Hourly)
    assert failed(app) == []

    def set_read_only(connection: Any) -> None:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")

    with app.app_context():
        event.listen(db.engine, "begin", set_read_only)
        assert failed(app) == ["write"]
        event.remove(db.engine, "begin", set_read_only)
    assert failed(app) == []


@on_sqlite
def test_a_probe_of_the_fleet_waits_for_no_writer_and_fails_if_the_file_is_read_only(fleet: Fleet) -> None:
    app = joined(fleet, Hourly)
    with fleet.engine.begin() as connection:
        connection.execute(sql("UPDATE background_workers SET paused_at = NULL"))  # holds the write lock
        assert failed(app) == []

    def set_query_only(value: str, driver: Any, *_: Any) -> None:
        driver.execute(f"PRAGMA query_only = {value}")

    for value, expected in {"ON": ["write"], "OFF": []}.items():
        setting = partial(set_query_only, value)
        with app.app_context():
            event.listen(db.engine, "checkout", setting)
            assert failed(app) == expected
            event.remove(db.engine, "checkout", setting)
    with app.app_context(), db.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000
    assert failed(app) == []


# -- models without a migration --------------------------------------------------------------------


@pytest.fixture
def changed_models() -> Iterator[None]:
    """Give the models a column, an index and a table that the database lacks."""
    notes = db.metadata.tables["notes"]
    column = Column("shelf", Integer)
    notes.append_column(column)
    index = Index("ix_notes_shelf", column)
    table = db.Table("shelves", Column("id", Integer, primary_key=True))
    yield
    notes.indexes.discard(index)
    notes._columns.remove(column)
    db.metadata.remove(table)


def test_check_names_the_parts_of_the_models_that_the_database_lacks(
    app: Flask, manager: BackgroundWorkerManager, changed_models: None
) -> None:
    manager.presence.sign_on()
    checked = command(app, "check")
    assert checked.exit_code == 1
    assert [line.partition(", which")[0] for line in checked.stderr.splitlines()] == [
        "Problem: The models have the table shelves",
        "Problem: The models have the column notes.shelf",
        "Problem: The models have the index ix_notes_shelf of notes",
    ]
    assert checked.stderr.count("lacks: make it with `db.create_all()`, as this application has no Flask-Migrate.") == 1
    assert checked.stderr.count(IN_SQL) == 2


IN_SQL = (
    "which the database lacks: make it in SQL, as this application has no Flask-Migrate and "
    "`db.create_all()` makes whole tables only."
)


def test_check_names_each_table_that_an_empty_database_lacks(
    app: Flask, manager: BackgroundWorkerManager, changed_models: None
) -> None:
    with app.app_context():
        db.drop_all()
    checked = command(app, "check")
    assert checked.exit_code == 1
    assert sorted(line.partition(", which")[0] for line in checked.stderr.splitlines()) == [
        f"Problem: The models have the table {name}" for name in sorted(db.metadata.tables)
    ]


def test_check_names_the_remedy_for_a_missing_column_that_the_fleet_needs(
    app: Flask, manager: BackgroundWorkerManager
) -> None:
    with app.app_context(), db.engine.begin() as connection:
        connection.execute(sql("ALTER TABLE background_workers DROP COLUMN mark_ahead"))
    checked = command(app, "check")
    assert checked.exit_code == 1
    assert checked.stderr == f"Problem: The models have the column background_workers.mark_ahead, {IN_SQL}\n"
    assert "Not looked at: the fleet; whether a run would succeed" in checked.stdout


def test_check_names_the_call_that_brings_the_engines_tables_up_to_date(
    app: Flask, manager: BackgroundWorkerManager
) -> None:
    Migrate(app, db)
    manager.presence.sign_on()
    with app.app_context(), db.engine.begin() as connection:
        connection.execute(sql("DROP INDEX ix_background_messages_dead"))
    checked = command(app, "check")
    assert checked.exit_code == 1
    assert checked.stderr == (
        "Problem: The models have the index ix_background_messages_dead of background_messages, which the database "
        "lacks: make a migration with `flask db revision` that calls `background.migrate_to(op, version=2)`, or that "
        "makes it by hand if the tables have that version.\n"
    )


def test_check_ignores_objects_that_only_the_database_has(app: Flask, manager: BackgroundWorkerManager) -> None:
    manager.presence.sign_on()
    with app.app_context(), db.engine.begin() as connection:
        connection.execute(sql("CREATE TABLE of_another_application (id INTEGER)"))
        connection.execute(sql("ALTER TABLE notes ADD COLUMN of_a_newer_release INTEGER"))
    assert command(app, "check").exit_code == 0, command(app, "check").output


# -- in an application that only uses the engine ---------------------------------------------------


@pytest.mark.promise
def test_a_host_application_has_every_view_of_the_condition(empty_database_url: str, tmp_path) -> None:
    app, other = Flask("host", root_path=str(tmp_path)), SQLAlchemy()
    app.config["SQLALCHEMY_DATABASE_URI"] = empty_database_url
    other.init_app(app)
    manager = BackgroundWorkerManager(app, other)
    manager.add(Hourly)
    manager.add(Noting)
    app.register_blueprint(dashboard(lambda: None))
    app.register_blueprint(health())
    with app.app_context():
        other.create_all()
        engine: Engine = other.engine
    try:
        assert failed(app) == ["instances"]
        assert app.test_client().get("/health/workers").json["checks"]["instances"]["alive"] == 0
        assert all(
            "bw-alarm" in app.test_client().get(f"/workers/{path}").text for path in ("", "timeline", "messages")
        )
        first = "No instance is alive, and none is known: no worker runs. `flask workers run` starts one."
        assert command(app, "list").stdout.splitlines()[0] == first
        assert command(app, "check").exit_code == 1
        manager.start()
        wait_until(lambda: failed(app) == [], "joining")
        assert command(app, "check").exit_code == 0, command(app, "check").output
        assert "bw-alarm" not in app.test_client().get("/workers/").text
        with app.app_context(), engine.begin() as connection:
            connection.execute(sql("ALTER TABLE background_executions DROP COLUMN progress_total"))
        checked = command(app, "check")
        assert checked.exit_code == 1
        assert "Problem: " in checked.stderr
    finally:
        manager.stop()
        with app.app_context():
            engine.dispose()
        close()


# -- one line for each outage ----------------------------------------------------------------------


def test_the_log_does_not_blame_the_server_for_a_connection_that_the_instance_cut(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    app = joined(fleet, Hourly)
    supervisor, connections = manager_of(app).supervisor, manager_of(app).stores.connections
    assert supervisor is not None
    supervisor.heartbeat.stop()
    caplog.clear()
    supervisor._outage.ended()
    supervisor._beat()
    connections.cut()
    supervisor._beat_failed(OperationalError("SELECT 1", {}, Exception("server closed the connection unexpectedly")))
    assert "no answer came before the lease ended, so this instance cut its connections" in caplog.text
    assert "server closed" not in caplog.text

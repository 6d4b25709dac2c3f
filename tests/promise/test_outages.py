"""A fail-over that closes no socket: the old primary turns read-only, and its work is done on the new primary."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import URL, select
from sqlalchemy import text as sql
from support.databases import administer, reload, text
from support.fleet import PATIENCE, Fleet, Hourly, db, effect, wait_until
from support.servers import PostgreSQL
from support.shop import migrate

from background import Message, MessageWorker, PeriodicWorker, WorkerContext
from background.database import tables
from background.database.outages import is_cut_off


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    server = PostgreSQL(migrate)
    yield server
    server.close()


@pytest.fixture
def url(server: PostgreSQL) -> Iterator[URL]:
    yield server.database()
    turn(server, read_only=False)


@pytest.fixture
def fleet(url: URL) -> Iterator[Fleet]:
    fleet = Fleet(text(url))
    yield fleet
    fleet.close()


def turn(server: PostgreSQL, read_only: bool) -> None:
    """Have all sessions, open and new, only read from their next transaction on, or write again."""
    setting = "SET default_transaction_read_only = on" if read_only else "RESET default_transaction_read_only"
    administer(server.url, f"ALTER SYSTEM {setting}")
    reload(server.url)


def fail_over(server: PostgreSQL, url: URL) -> None:
    """Have the open sessions only read, and new sessions write. No socket is closed."""
    administer(server.url, f"ALTER DATABASE {url.database} SET default_transaction_read_only = off")
    turn(server, read_only=True)


class Noting(MessageWorker):
    topic = "notes"
    max_attempts = 2
    backoff = timedelta(milliseconds=10)

    def handle(self, message: Message, context: WorkerContext) -> None:
        effect(context, message.payload)


class Often(PeriodicWorker):
    period = timedelta(milliseconds=200)

    def do_work(self, context: WorkerContext) -> None:
        effect(context, "often")


class Slow(PeriodicWorker):
    """Keeps a connection until the test lets it go on, and then writes on this connection."""

    period = timedelta(days=366)
    run_on_first_start = True
    began: threading.Event
    go_on: threading.Event

    def do_work(self, context: WorkerContext) -> None:
        with db.engine.connect() as kept:
            kept.execute(sql("SELECT 1"))
            kept.rollback()
            self.began.set()
            assert self.go_on.wait(PATIENCE)
            kept.execute(sql("INSERT INTO effects (key, note) VALUES ('', '')"))
        effect(context, f"slow {context.attempt}")


def ready(app: Flask) -> dict[str, bool]:
    checks = app.test_client().get("/health/ready").json["checks"]
    return {name: check["ok"] for name, check in checks.items()}


def fill_pools(*apps: Flask) -> None:
    """Open five connections in each application's pool, and give them back."""
    for app in apps:
        with app.app_context():
            opened = [db.engine.connect() for _ in range(5)]
            for each in opened:
                each.close()


def test_a_fail_over_that_closes_no_socket_fails_no_run_and_counts_no_attempt_of_a_message(
    server: PostgreSQL, url: URL, fleet: Fleet
) -> None:
    slow = type("Slow", (Slow,), {"began": threading.Event(), "go_on": threading.Event()})
    apps = [fleet.app(Noting, Often, slow) for _ in range(2)]
    for app in apps:
        app.extensions["background_workers"].start()
    assert slow.began.wait(PATIENCE)
    fill_pools(*apps)
    wait_until(lambda: fleet.effects().count("often") >= 2, "two runs")
    fail_over(server, url)
    for number in range(20):
        administer(
            url,
            f"INSERT INTO background_messages (topic, payload, enqueued_at, due_at) "
            f"VALUES ('notes', '{number}', now(), now())",
        )
    slow.go_on.set()
    wait_until(lambda: {row.state for row in fleet.messages()} == {"done"}, "the messages")
    wait_until(lambda: "slow 2" in fleet.effects(), "the second attempt")
    before = fleet.effects().count("often")
    wait_until(lambda: fleet.effects().count("often") >= before + 2, "two more runs")
    assert fleet.errors() == []
    assert {row.attempt for row in fleet.messages()} == {1}
    assert sorted(note for note in fleet.effects() if note.isdigit()) == sorted(map(str, range(20)))
    assert fleet.states("slow") == ["lost", "succeeded"]
    assert "failed" not in fleet.states("often")
    wait_until(lambda: all(all(ready(app).values()) for app in apps), "both ready")


def test_the_applications_pool_is_emptied_by_an_error_on_the_engines_own_connections(
    server: PostgreSQL, url: URL, fleet: Fleet
) -> None:
    app = fleet.app(Hourly, WORKERS_LEASE_SECONDS=PATIENCE)
    fill_pools(app)
    app.extensions["background_workers"].start()
    instance = wait_until(lambda: app.extensions["background_workers"].presence.instance, "the joining")
    wait_until(lambda: fleet.states() == ["succeeded"], "the run, whose own error would empty the pool")
    number = app.extensions["background_workers"].stores.outages._number
    fail_over(server, url)
    wait_until(lambda: app.extensions["background_workers"].stores.outages._number > number, "a heartbeat's error")
    with app.app_context():
        db.session.execute(sql("INSERT INTO effects (key, note) VALUES ('a', 'a request')"))
        db.session.commit()
    assert "a request" in fleet.effects()
    assert app.extensions["background_workers"].presence.instance is instance


def test_while_every_session_is_read_only_no_process_is_ready_and_no_attempt_is_counted(
    server: PostgreSQL, fleet: Fleet
) -> None:
    app = fleet.app(Noting, Often)
    manager = app.extensions["background_workers"]
    manager.start()
    wait_until(lambda: fleet.effects().count("often") >= 2, "two runs")
    turn(server, read_only=True)
    wait_until(lambda: not ready(app)["database"], "a process that is not ready")
    instance = manager.presence.instance
    wait_until(lambda: not instance.is_alive, "the lease's end")
    turn(server, read_only=False)
    fleet.enqueue("notes", *range(5))
    wait_until(lambda: {row.state for row in fleet.messages()} == {"done"}, "the messages")
    before = fleet.effects().count("often")
    wait_until(lambda: fleet.effects().count("often") >= before + 2, "two more runs")
    assert {row.attempt for row in fleet.messages()} == {1}
    assert fleet.errors() == []
    assert "failed" not in fleet.states("often")
    wait_until(lambda: all(ready(app).values()), "a process that is ready")


def test_a_message_whose_lease_ran_out_while_the_database_was_away_was_not_tried(
    server: PostgreSQL, fleet: Fleet
) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Held(Noting):
        max_attempts = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            if not began.is_set():
                context.commit()
                began.set()
                assert go_on.wait(PATIENCE)
            effect(context, message.payload)

    managers = [fleet.manager(Held) for _ in range(2)]
    for manager in managers:
        manager.start()
    wait_until(lambda: all(manager.presence.instance for manager in managers), "both of them")
    fleet.enqueue("notes", "a")
    assert began.wait(PATIENCE)
    turn(server, read_only=True)
    instances = [manager.presence.instance for manager in managers]
    wait_until(lambda: not any(each.is_alive for each in instances), "the leases' end")
    go_on.set()
    wait_until(lambda: not [c for manager in managers for c in manager.runs._contexts], "the handler's end")
    turn(server, read_only=False)
    wait_until(lambda: {row.state for row in fleet.messages()} <= {"done", "dead"}, "its end")
    assert [(row.state, row.attempt) for row in fleet.messages()] == [("done", 1)]
    assert fleet.errors() == []


@pytest.mark.parametrize("raw", [False, True], ids=["by SQLAlchemy", "by the driver"])
def test_a_session_that_the_server_made_read_only_is_recognized_by_any_driver_error(
    server: PostgreSQL, url: URL, fleet: Fleet, raw: bool
) -> None:
    app = fleet.app(Hourly)
    outages, insert = (
        app.extensions["background_workers"].stores.outages,
        "INSERT INTO effects (key, note) VALUES ('', '')",
    )
    with app.app_context():
        db.session.execute(sql("SELECT 1"))
        db.session.commit()
        fail_over(server, url)

        def refused() -> Any:
            db.session.rollback()  # a transaction keeps the mode in which it began
            try:
                if raw:
                    db.session.connection().connection.cursor().execute(insert)
                else:
                    db.session.execute(sql(insert))
            except Exception as error:
                return error
            return None

        error = wait_until(refused, "the reloading")
        assert is_cut_off(error)
        outages.notice(error)
        db.session.rollback()
        assert outages._number == 1
        db.session.execute(sql(insert))


def test_a_run_that_made_its_own_transaction_read_only_has_failed_and_the_next_one_runs(fleet: Fleet) -> None:
    class Reader(Often):
        def do_work(self, context: WorkerContext) -> None:
            context.session.execute(sql("SET TRANSACTION READ ONLY"))
            effect(context)

    manager = fleet.manager(Reader)
    manager.start()
    wait_until(lambda: fleet.states("reader").count("failed") >= 2, "two failures")
    assert set(fleet.states("reader")) <= {"failed", "running", "skipped", "missed"}
    assert manager.stores.outages._number == 0


def test_a_message_whose_connection_was_ended_was_not_tried(fleet: Fleet) -> None:
    class Ended(Noting):
        max_attempts = 1
        calls = 0

        def handle(self, message: Message, context: WorkerContext) -> None:
            Ended.calls += 1
            if Ended.calls <= 2:
                context.session.execute(sql("SELECT pg_terminate_backend(pg_backend_pid())"))
            effect(context, message.payload)

    fleet.manager(Ended).start()
    fleet.enqueue("notes", "a", "b")
    wait_until(lambda: {row.state for row in fleet.messages()} <= {"done", "dead"}, "their end")
    assert [(row.state, row.attempt) for row in fleet.messages()] == [("done", 1)] * 2
    assert fleet.errors() == []


@pytest.mark.parametrize("mode", ["SET TRANSACTION READ ONLY", "SET default_transaction_read_only = on"])
def test_a_handler_that_made_its_own_session_read_only_has_as_many_attempts_as_any_failing_handler(
    fleet: Fleet, mode: str
) -> None:
    class Reading(Noting):
        def handle(self, message: Message, context: WorkerContext) -> None:
            context.session.execute(sql(mode))
            context.commit()
            context.session.execute(sql("SET TRANSACTION READ ONLY"))
            effect(context)

    fleet.manager(Reading).start()
    fleet.enqueue("notes", "a")
    wait_until(lambda: [row.state for row in fleet.messages()] == ["dead"], "its burial")
    assert len(fleet.errors()) == Reading.max_attempts


def test_a_run_that_keeps_its_own_session_read_only_is_given_up(fleet: Fleet) -> None:
    class Stubborn(Hourly):
        period = timedelta(days=366)
        max_attempts = 2

        def do_work(self, context: WorkerContext) -> None:
            context.session.execute(sql("SET default_transaction_read_only = on"))
            context.session.rollback()
            context.session.execute(sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
            context.session.commit()
            effect(context)

    manager = fleet.manager(Stubborn)
    manager.start()
    wait_until(lambda: manager.presence.instance, "the joining")
    manager.tick("stubborn", datetime.now(UTC))
    wait_until(lambda: fleet.states("stubborn") == ["lost", "lost"], "the last attempt")
    wait_until(lambda: fleet.row("stubborn").pending_tick is None, "the end")


def test_errors_of_another_database_empty_no_pool(server: PostgreSQL, url: URL, fleet: Fleet) -> None:
    other = server.database()
    same = url.update_query_dict({"application_name": "another user of it"})
    app = fleet.app(Hourly, SQLALCHEMY_BINDS={"same": text(same), "other": text(other)})
    outages = app.extensions["background_workers"].stores.outages
    with app.app_context():
        for bind, number in (("other", 0), ("same", 1)):
            engine = db.engines[bind]
            name = engine.url.database
            with engine.connect() as connection:
                connection.execute(select(tables.workers.c.name)).all()
                administer(
                    server.url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
                )
                with pytest.raises(Exception, match="terminating connection"):
                    connection.execute(select(tables.workers.c.name))
            assert outages._number == number
        for engine in db.engines.values():
            engine.dispose()

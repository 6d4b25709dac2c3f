"""Probes show whether a process is alive and ready. The responses are quick, and tell a stranger nothing."""

import logging
import os
import re
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import insert, make_url, update
from support.databases import on_sqlite, text
from support.fleet import HOUR, PATIENCE, Fleet, Hourly, last_hour, make_app, statements, stop, wait_until
from support.processes import margin
from support.proxy import Proxy

from background import BackgroundWorkerManager, PeriodicWorker
from background.database import tables
from background.database.clock import steady
from background.history import status
from background.monitoring import timebox
from background.monitoring.timebox import Timebox
from background.testing.runs import wait_until_joined

DAY = timedelta(days=1)
HEALTH = import_module("background.monitoring.health")  # the package has a function with this name


class Daily(Hourly):
    period = DAY


class CatchesNothingUp(Hourly):
    catch_up = False
    run_on_first_start = False


class Disabled(Hourly):
    enabled = False


class Lasting(Hourly):
    """Runs until the test lets it end."""

    began: threading.Event
    go_on: threading.Event

    def do_work(self, context: Any) -> None:
        self.began.set()
        assert self.go_on.wait(PATIENCE)


def ready(app: Flask) -> tuple[int, dict[str, Any]]:
    response = app.test_client().get("/health/ready")
    return response.status_code, response.json["checks"]


def failed(app: Flask) -> list[str]:
    """Return the names of the checks that are not ok. The status agrees with them."""
    status, checks = ready(app)
    names = [name for name, check in checks.items() if not check["ok"]]
    assert status == (503 if names else 200)
    return names


def live(app: Flask) -> tuple[int, dict[str, Any]]:
    response = app.test_client().get("/health/live")
    return response.status_code, {name: check["ok"] for name, check in response.json["checks"].items()}


def manager_of(app: Flask) -> BackgroundWorkerManager:
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    return manager


# -- the response -----------------------------------------------------------------------------


def test_a_process_without_workers_is_judged_alive_and_ready_without_them(app: Flask, client: FlaskClient) -> None:
    alive = client.get("/health/live")
    assert (alive.status_code, alive.json["status"]) == (200, "alive")
    assert alive.json["checks"] == {
        "process": {"ok": True},
        "scheduler": {"ok": True, "here": False},
        "heartbeat": {"ok": True, "here": False},
    }
    is_ready = client.get("/health/ready")
    assert (is_ready.status_code, is_ready.json["status"]) == (200, "ready")
    checks = is_ready.json["checks"]
    assert checks["database"].pop("milliseconds") > 0
    ages = [checks[name].pop("age_seconds") for name in ("database", "migrations", "workers")]
    assert all(0 <= age < PATIENCE for age in ages)
    assert checks == {
        "database": {"ok": True},
        "migrations": {"ok": True},
        "workers": {"ok": True, "overdue": 0},
        "heartbeat": {"ok": True, "here": False},
    }
    for response in (alive, is_ready):
        assert response.headers["Cache-Control"] == "no-store"


def test_a_response_contains_no_name_and_no_explanation(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    app = fleet.app(Hourly)
    with caplog.at_level(logging.INFO):
        overdue(fleet, app)
        answer = app.test_client().get("/health/ready").text
        app.test_client().get("/health/ready")
        fleet.set("hourly", mark=datetime.now(UTC))
        assert failed(app) == []
    assert '"overdue":1' in answer
    for detail in ("hourly", socket.gethostname(), str(os.getpid()), "sqlite", "postgres"):
        assert detail not in re.sub(r"\d+\.\d+", "", answer)  # may contain the digits of a process id
    assert [record.message for record in caplog.records if record.name == "background.monitoring.health"] == [
        "Not ready: workers (overdue: ['hourly'])",
        "Ready again",
    ]


# -- the workers -----------------------------------------------------------------------------------


def overdue(fleet: Fleet, app: Flask, name: str = "hourly", **more: Any) -> None:
    """Make the worker look as if no instance had run it for a day."""
    for worker in manager_of(app).workers.values():
        manager_of(app).recovery.look(worker)
    day_ago = datetime.now(UTC) - timedelta(days=1)
    fleet.set(name, **{"scheduled_at": day_ago - HOUR, "mark": day_ago} | more)


def test_a_worker_is_overdue_once_a_tick_waits_and_two_more_have_passed(fleet: Fleet) -> None:
    app = fleet.app(Daily)
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    overdue(fleet, app, "daily", scheduled_at=midnight - 10 * DAY)
    for days, names in [(0, []), (2, []), (3, ["workers"]), (9, ["workers"])]:
        fleet.set("daily", mark=midnight - days * DAY)
        assert failed(app) == names, days
    fleet.set("daily", mark=None, scheduled_at=midnight - 2 * DAY - timedelta(seconds=1))
    assert failed(app) == ["workers"]
    fleet.set("daily", mark=None, scheduled_at=midnight - 2 * DAY)  # its first tick is a day later
    assert failed(app) == []
    fleet.set("daily", mark=midnight - 9 * DAY, schedule="every 2592000s", scheduled_at=midnight)
    assert failed(app) == []


def statuses(manager: BackgroundWorkerManager) -> list[status.WorkerStatus]:
    return status.statuses(manager.stores, manager.workers)


@pytest.mark.parametrize("ahead", [timedelta(minutes=1), HOUR, 400 * DAY], ids=str)
def test_a_worker_is_overdue_even_if_a_clock_ahead_decided_its_ticks(fleet: Fleet, ahead: timedelta) -> None:
    app = fleet.app(Hourly)
    overdue(fleet, app, mark=datetime.now(UTC) + ahead)
    assert failed(app) == ["workers"]
    (found,) = statuses(manager_of(app))
    assert found.overdue_since == last_hour() - 24 * HOUR  # the first tick after it was scheduled
    skipped = {"worker": "hourly", "trigger": "schedule", "state": "missed", "tick": last_hour() - 5 * HOUR}
    with fleet.engine.begin() as connection:
        connection.execute(insert(tables.executions).values(**skipped, through=last_hour() - 4 * HOUR))
        connection.execute(
            insert(tables.executions).values(skipped | {"tick": last_hour(), "through": last_hour() + DAY})
        )
    (found,) = statuses(manager_of(app))
    assert found.overdue_since == last_hour() - 3 * HOUR
    fleet.set("hourly", scheduled_at=datetime.now(UTC) + ahead)
    assert failed(app) == ["workers"]


def test_a_worker_that_no_instance_should_run_is_not_overdue(fleet: Fleet) -> None:
    app = fleet.app(Disabled, Hourly)
    overdue(fleet, app, "disabled")
    overdue(fleet, app, "hourly", paused_at=datetime.now(UTC))
    assert failed(app) == []
    fleet.set("hourly", paused_at=None)
    assert failed(app) == ["workers"]
    manager_of(app).remove("hourly")  # as in a release that no longer has it
    assert failed(app) == []
    manager_of(app).add(Hourly)
    fleet.set("hourly", schedule="a newer release's")
    assert failed(app) == []


def test_a_running_worker_is_overdue_only_if_no_instance_is_left_to_run_it(fleet: Fleet) -> None:
    lasting = type("Lasting", (Lasting,), {"began": threading.Event(), "go_on": threading.Event()})
    app, runs = fleet.app(Hourly, lasting), fleet.manager(lasting)
    runs.start()
    assert lasting.began.wait(PATIENCE)
    day_ago = datetime.now(UTC) - timedelta(days=1)
    fleet.set("lasting", mark=day_ago, scheduled_at=day_ago)
    assert failed(app) == []
    with runs.stores.leases.engine.begin() as connection:
        connection.execute(update(tables.instances).values(signed_off_at=datetime.now(UTC)))
    assert failed(app) == ["workers"]
    lasting.go_on.set()


def test_a_tick_without_an_instance_is_not_overdue_without_catch_up(fleet: Fleet) -> None:
    app = fleet.app(CatchesNothingUp)
    overdue(fleet, app, "catches_nothing_up")
    assert failed(app) == ["workers"]  # no instance is up to run the next tick
    fleet.manager(CatchesNothingUp).start()
    wait_until(lambda: failed(app) == [], "the other instance's start")


def test_a_web_process_whose_workers_run_elsewhere_reports_them_overdue_and_stays_ready(fleet: Fleet) -> None:
    app = fleet.app(Hourly, WORKERS_ENABLED=False)
    overdue(fleet, app)
    manager_of(app).serve()
    status, checks = ready(app)
    assert status == 200
    assert checks["workers"].pop("age_seconds") >= 0
    assert checks["workers"] == {"ok": True, "overdue": 1}
    assert checks["heartbeat"] == {"ok": True, "here": False}


def test_the_workers_are_one_read_and_a_cron_is_computed_once_per_tick(fleet: Fleet) -> None:
    def worker(number: int) -> type[PeriodicWorker]:
        return type(f"Cron{number}", (Hourly,), {"period": None, "cron": "0 3 * * *"})

    app = fleet.app(*(worker(number) for number in range(30)))
    manager = manager_of(app)
    manager.stores.controls.register({name: status.parse_schedule("cron 0 3 * * * UTC") for name in manager.workers})
    assert failed(app) == []
    reckoned = status._first_and_third.cache_info().misses
    with statements(manager.stores.leases.engine) as seen:
        assert len(statuses(manager)) == 30
    assert len(seen) == 1
    assert status._first_and_third.cache_info().misses == reckoned


# -- this process's own threads --------------------------------------------------------------------


@pytest.fixture
def member(fleet: Fleet) -> Flask:
    """Give an application whose workers have joined."""
    app = fleet.app(Hourly)
    manager_of(app).start()
    wait_until_joined(manager_of(app))
    return app


@on_sqlite
def test_a_member_is_ready_while_its_heartbeat_is_fresh_and_not_after_it_has_left(member: Flask) -> None:
    assert live(member) == (200, {"process": True, "scheduler": True, "heartbeat": True})
    _, checks = ready(member)
    assert 0 <= checks["heartbeat"]["age_seconds"] < 2
    manager_of(member).supervisor.heartbeat.stop()
    wait_until(lambda: failed(member) == ["heartbeat"], "the lease's end")
    assert live(member)[0] == 503
    manager_of(member).stop()
    assert failed(member) == ["heartbeat"]
    assert ready(member)[1]["heartbeat"] == {"ok": False, "here": True}
    assert live(member)[0] == 200


@on_sqlite
@pytest.mark.parametrize("thread", ["scheduler", "heartbeat"])
def test_a_process_whose_scheduler_or_heartbeat_thread_died_is_not_alive(
    member: Flask, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = manager_of(member).supervisor
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def die(*_: object) -> None:
        raise SystemExit  # the exception ends a thread

    if thread == "scheduler":
        supervisor.scheduler._scheduler._process_jobs = die
        supervisor.scheduler.look_again()
    else:
        supervisor.heartbeat._beat = die
    wait_until(lambda: live(member)[0] == 503, "its death")
    assert live(member)[1] == {"process": True, "scheduler": True, "heartbeat": True} | {thread: False}


@on_sqlite
def test_a_stopping_process_is_alive_until_it_has_stopped(member: Flask) -> None:
    manager_of(member).tell()
    assert live(member)[0] == 200


# -- the database ----------------------------------------------------------------------------------


def test_probes_during_a_hanging_database_share_one_query_for_a_limited_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, go_on = [], threading.Event()

    def ask(_url: str) -> int:
        asked.append(threading.current_thread())
        assert go_on.wait(PATIENCE)
        return len(asked)

    hanging = Timebox(ask, 0.05)
    for _ in range(3):
        with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
            hanging.answer("the database")
    wait_until(lambda: asked)
    assert len(asked) == 1
    monkeypatch.setattr(timebox, "_GIVEN_UP_SECONDS", 0.0)
    with pytest.raises(TimeoutError):
        hanging.answer("the database")
    wait_until(lambda: len(asked) == 2, "the second question")
    go_on.set()
    for thread in asked:
        thread.join(PATIENCE)

    def answer() -> int:
        with suppress(TimeoutError):  # on a busy machine
            return hanging.answer("the database")
        return 0

    assert wait_until(answer) >= 3


@pytest.fixture
def proxy(postgresql_url: str) -> Iterator[Proxy]:
    proxy = Proxy(make_url(postgresql_url))
    yield proxy
    proxy.close()


def test_ready_follows_the_database_and_a_hanging_database_does_not_hang_the_probe(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HEALTH, "_ANSWER_SECONDS", 0.3)
    app = make_app(text(proxy.url), Hourly)
    manager_of(app).start()
    try:
        wait_until(lambda: failed(app) == [], "joining")
        proxy.silence()
        for _ in range(2):
            began = steady()
            assert {"database", "migrations", "workers"} <= set(failed(app))
            assert steady() - began < 0.3 + margin()
        began = steady()
        assert live(app)[0] == 200
        assert steady() - began < margin()
        wait_until(lambda: "heartbeat" in failed(app), "the lease's end")
        proxy.heal()
        wait_until(lambda: failed(app) == [], "the database's return")
        proxy.refuse()
        wait_until(lambda: "database" in failed(app), "the database's going")
        assert live(app)[0] == 200
    finally:
        proxy.heal()
        stop(app)


def test_ready_does_not_fail_for_connections_that_a_restart_of_the_database_ended(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HEALTH, "_ANSWER_SECONDS", PATIENCE)
    app = make_app(text(proxy.url), Hourly)
    manager_of(app).start()
    try:
        wait_until(lambda: failed(app) == [], "joining")
        proxy.cut()  # no process has noticed
        assert failed(app) == []
    finally:
        stop(app)


def test_a_database_without_a_schema_is_not_ready(empty_database_url: str) -> None:
    if "sqlite" in empty_database_url:
        Path(make_url(empty_database_url).database or "").touch()
    app = make_app(empty_database_url, Hourly)
    assert failed(app) == ["workers"]
    stop(app)


def test_a_probe_makes_no_missing_database_file(tmp_path: Path) -> None:
    app = make_app(f"sqlite:///{tmp_path}/none.sqlite")
    assert failed(app) == ["database", "migrations", "workers"]
    assert app.test_client().get("/metrics").status_code == 200
    assert list(tmp_path.iterdir()) == []
    stop(app)


@on_sqlite
@pytest.mark.parametrize("path", ["/health/ready", "/metrics"])
def test_neither_a_probe_nor_a_scrape_waits_for_the_write_lock_of_a_run(
    app: Flask, client: FlaskClient, database_url: str, path: str
) -> None:
    with closing(sqlite3.connect(make_url(database_url).database or "")) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO notes (text, number) VALUES ('a', 1)")
        began = steady()
        response = client.get(path)
        assert response.status_code == 200
        assert steady() - began < margin()
        assert "background_up 0" not in response.text
        writer.rollback()

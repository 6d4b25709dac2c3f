"""The audit: the changes by admins and commands, with their actors and outcomes."""

import json
import os
import pwd
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError
from support.databases import close, on_sqlite
from support.shop import PASSWORD, settings

import audit
from app import create_app
from background import PeriodicWorker, WorkerContext
from background.testing import run_worker
from models import AuditEntry, RateLimit, User, db
from workers import PruneAuditWorker

Make = Callable[..., User]
PASSIVE = "passive_user_checker_worker"
ME = pwd.getpwuid(os.getuid()).pw_name

READING = {
    "": {"db"},
    "workers": {"alerts", "check", "history", "instances", "list", "preview", "run", "why"},
    "messages": {"list", "show", "stats"},
}
"""The commands that change nothing, that serve, or that are Alembic's, which makes the audit's own table."""


@pytest.fixture
def admin(client: FlaskClient, make_user: Make, login: Callable[[FlaskClient, User], None]) -> User:
    user = make_user(email="you@your.shop", is_admin=True)
    login(client, user)
    return user


def entries(app: Flask) -> list[AuditEntry]:
    with app.app_context():
        return list(db.session.scalars(select(AuditEntry).order_by(AuditEntry.id)))


def outcomes(app: Flask) -> list[tuple[str, str | None]]:
    return [(entry.action, entry.outcome) for entry in entries(app)]


# -- the admin's pages ------------------------------------------------------------------------------


@pytest.mark.usefixtures("admin")
def test_an_entry_has_the_outcome_of_its_request(app: Flask, client: FlaskClient, make_user: Make) -> None:
    client.post(f"/admin/users/{make_user().id}/password-link")
    client.post("/admin/users/99/password-link")
    assert outcomes(app) == [("admin.send_password_link", "302 FOUND"), ("admin.send_password_link", "404 NOT FOUND")]
    page = client.get("/admin/audit").text
    assert "302 FOUND" in page
    assert "404 NOT FOUND" in page


@pytest.mark.usefixtures("admin")
def test_a_part_of_a_form_may_have_no_name(app: Flask, client: FlaskClient) -> None:
    body = b"--b\r\nContent-Disposition: form-data\r\n\r\nnameless\r\n--b--\r\n"
    answer = client.post("/workers/messages/change", data=body, content_type="multipart/form-data; boundary=b")
    assert answer.status_code < 500
    assert [entry.action for entry in entries(app)] == ["background.change_messages"]


@pytest.mark.usefixtures("admin")
def test_the_outcome_of_an_error_is_its_name(app: Flask, client: FlaskClient) -> None:
    def fail(**_: int) -> None:
        db.session.execute(text("UPDATE users SET name = 'half done'"))
        raise ZeroDivisionError

    app.view_functions["admin.send_password_link"] = fail
    with pytest.raises(ZeroDivisionError):
        client.post("/admin/users/1/password-link")
    app.config["PROPAGATE_EXCEPTIONS"] = False
    assert client.post("/admin/users/1/password-link").status_code == 500
    assert [outcome for _, outcome in outcomes(app)] == ["500 ZeroDivisionError"] * 2
    with app.app_context():
        assert db.session.scalar(select(User.name)) != "half done"


@on_sqlite
@pytest.mark.usefixtures("admin")
def test_an_action_whose_outcome_cannot_be_written_is_answered(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: Any) -> None:
        raise OperationalError("UPDATE", {}, Exception("away"))

    monkeypatch.setattr(audit, "finish", away)
    assert client.post("/admin/users/99/password-link").status_code == 404
    assert outcomes(app) == [("admin.send_password_link", None)]
    assert "The outcome '404 NOT FOUND' of the audit's entry 1 could not be written" in caplog.text
    assert "not known" in client.get("/admin/audit").text


@on_sqlite
def test_an_admins_change_that_is_throttled_is_recorded_as_refused(
    app: Flask, client: FlaskClient, admin: User, make_user: Make
) -> None:
    app.before_request_funcs[None].insert(0, throttle)
    assert client.post(f"/admin/users/{admin.id}/make-admin").status_code == 429
    assert client.get("/admin/users").status_code == 429
    assert client.post("/login").status_code == 429
    assert outcomes(app) == [("admin.make_admin", "refused: 429 TOO MANY REQUESTS")]
    [entry] = entries(app)
    assert (entry.user_id, json.loads(entry.details)) == (admin.id, {"user_id": str(admin.id)})


@on_sqlite
def test_an_admin_who_is_throttled_again_and_again_has_one_entry(app: Flask, client: FlaskClient, admin: User) -> None:
    nonsense = "/workers/worker/nonsense/pause"
    client.post(nonsense)
    with app.app_context():
        db.session.execute(update(RateLimit).where(RateLimit.key.contains(f"/user {admin.id}/")).values(hits=300))
        db.session.commit()
    assert [client.post(nonsense).status_code for _ in range(3)] == [429] * 3
    assert [outcome for _, outcome in outcomes(app)] == ["404 NOT FOUND", "refused: 429 TOO MANY REQUESTS"]


@on_sqlite
def test_an_admins_change_without_a_recent_login_is_recorded_as_refused(
    app: Flask, client: FlaskClient, admin: User, make_user: Make
) -> None:
    user = make_user()
    with client.session_transaction() as session:
        session["fs_paa"] -= 86_400
        session.pop("fs_gexp", None)
    client.post(f"/admin/users/{user.id}/make-admin")
    client.post("/account/verify", data={"password": PASSWORD})
    client.post(f"/admin/users/{user.id}/make-admin")
    assert outcomes(app) == [
        ("admin.make_admin", "refused: no recent login"),
        ("admin.make_admin", "302 FOUND"),
    ]
    assert {entry.user_id for entry in entries(app)} == {admin.id}


class Holding(PeriodicWorker):
    """Writes, and holds SQLite's write lock until it is asked to stop."""

    period = timedelta(days=1)

    def do_work(self, context: WorkerContext) -> None:
        context.session.add(AuditEntry(action="open", details="{}", address="", operator="holding"))
        context.session.flush()
        holds.set()
        assert context.stopping.wait(60)
        context.raise_if_stopping()


holds = threading.Event()


def test_a_command_that_cancels_a_run_with_the_write_lock_is_recorded_afterwards(
    app: Flask, runner: FlaskCliRunner
) -> None:
    manager = app.extensions["background_workers"]
    manager.add(Holding)
    holds.clear()
    with ThreadPoolExecutor(1) as beside:
        run = beside.submit(manager.trigger, "holding")
        assert holds.wait(60)
        assert "is cancelled" in runner.invoke(args=["workers", "cancel", "holding"]).output
        assert run.result().state == "cancelled"
    assert outcomes(app) == [("flask workers cancel", "done")]
    assert manager.history.executions("holding")[0].cancelled_by == ME


def throttle() -> None:
    from werkzeug.exceptions import TooManyRequests

    raise TooManyRequests


# -- commands ---------------------------------------------------------------------------------------


def test_each_command_that_changes_something_is_recorded(app: Flask) -> None:
    for name, reading in READING.items():
        group: Any = app.cli.commands[name] if name else app.cli
        assert set(group.commands) == reading | set(audit.COMMANDS[name]) | (set(READING) - {""} if not name else set())


def test_a_command_is_recorded_with_its_operator_machine_and_outcome(
    app: Flask, runner: FlaskCliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "mallory")
    assert runner.invoke(args=["workers", "list"]).exit_code == 0
    assert runner.invoke(args=["workers", "pause", PASSIVE]).exit_code == 0
    assert runner.invoke(args=["messages", "discard", "4711"]).exit_code == 2
    assert runner.invoke(args=["reset-password", "them@example.com"]).exit_code == 1
    pause, discard, reset = entries(app)
    assert (pause.operator, pause.user_id, pause.address) == (ME, None, socket.gethostname()[:45])
    assert (pause.action, json.loads(pause.details), pause.outcome) == (
        "flask workers pause",
        {"name": PASSIVE},
        "done",
    )
    assert (discard.action, json.loads(discard.details)) == ("flask messages discard", {"ids": "4711"})
    assert discard.outcome.startswith("exit code 2: ")
    assert reset.outcome.startswith("exit code 1: No user has the e-mail 'them@example.com'")


def test_a_command_that_raises_is_recorded_with_its_error(
    app: Flask, runner: FlaskCliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("demo.add_users", fail)
    assert isinstance(runner.invoke(args=["demo", "--users", "7"]).exception, ZeroDivisionError)
    [entry] = entries(app)
    assert (entry.action, json.loads(entry.details), entry.outcome) == (
        "flask demo",
        {"number": "7"},
        "ZeroDivisionError",
    )


@on_sqlite
def test_a_dry_run_is_not_recorded(app: Flask, runner: FlaskCliRunner) -> None:
    assert runner.invoke(args=["workers", "trigger", PASSIVE, "--dry-run"]).exit_code == 0
    assert entries(app) == []
    assert runner.invoke(args=["workers", "trigger", PASSIVE]).exit_code == 0
    assert outcomes(app) == [("flask workers trigger", "done")]


def test_a_command_that_makes_the_database_ready_is_recorded_after_it(tmp_path: Any) -> None:
    app = create_app(settings("sqlite://"))
    app.config.update(SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path / 'new.sqlite'}", DATABASE_IS_TEMPORARY=False)
    try:
        result = app.test_cli_runner().invoke(args=["init-db", "--admin", "you@example.org"])
        assert result.exit_code == 0, result.output
        assert outcomes(app) == [("flask init-db", "done")]
    finally:
        close(app)


# -- the page ---------------------------------------------------------------------------------------


@pytest.fixture
def recorded(app: Flask, admin: User, make_user: Make) -> None:
    other = make_user(email="pat@your.shop")
    now = datetime.now(UTC)
    with app.app_context():
        for at, who, action in (
            (now, {"user_id": admin.id}, "admin.make_admin"),
            (now, {"user_id": other.id}, "admin.unmake_admin"),
            (now - timedelta(days=40), {"operator": "patrick"}, "flask init-db"),
            (now - timedelta(days=400), {"operator": "root"}, "flask reset-password"),
        ):
            db.session.add(AuditEntry(at=at, action=action, details="{}", address="", **who))
        db.session.commit()


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("search", "shown"),
    [
        ("", {"admin.make_admin", "admin.unmake_admin", "flask init-db", "flask reset-password"}),
        ("q=pat", {"admin.unmake_admin", "flask init-db"}),
        ("q=PAT%40your.shop", {"admin.unmake_admin"}),
        ("q=%25", set()),
        ("action=make_admin", {"admin.make_admin", "admin.unmake_admin"}),
        ("action=flask&q=root", {"flask reset-password"}),
        (
            f"since={datetime.now(UTC) - timedelta(days=50):%Y-%m-%d}",
            {"admin.make_admin", "admin.unmake_admin", "flask init-db"},
        ),
        ("since=9999-12-31", set()),
        ("since=0001-01-01&q=root&zone=Asia/Tokyo", {"flask reset-password"}),
        ("since=0001-01-01&q=root&zone=%00", {"flask reset-password"}),
    ],
)
def test_the_page_shows_the_actions_that_an_admin_searches_for(
    client: FlaskClient, search: str, shown: set[str]
) -> None:
    page = client.get(f"/admin/audit?{search}").text
    actions = ("admin.make_admin", "admin.unmake_admin", "flask init-db", "flask reset-password")
    assert {action for action in actions if f"<code>{action}</code>" in page} == shown
    assert ("No such actions." in page) == (not shown)


@on_sqlite
@pytest.mark.usefixtures("admin")
@pytest.mark.parametrize(("zone", "is_shown"), [("Pacific/Kiritimati", True), ("UTC", False), ("", False)])
def test_a_day_begins_in_the_zone_of_the_browser(app: Flask, client: FlaskClient, zone: str, is_shown: bool) -> None:
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)  # 2 o'clock of the next day on Kiritimati
    with app.app_context():
        db.session.add(AuditEntry(at=noon, action="flask demo", details="{}", address="", operator="root"))
        db.session.commit()
    page = client.get(f"/admin/audit?since=2026-01-02&zone={zone}").text
    assert ("<code>flask demo</code>" in page) == is_shown


@on_sqlite
@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("search", ["since=yesterday", "q=%00", "action=%0a%07", f"action={'x' * 101}"])
def test_an_invalid_search_is_explained(client: FlaskClient, search: str) -> None:
    page = client.get(f"/admin/audit?{search}")
    assert page.status_code == 200
    assert "invalid-feedback" in page.text
    assert "<code>" not in page.text


@on_sqlite
@pytest.mark.usefixtures("admin")
def test_the_next_page_keeps_the_search(app: Flask, client: FlaskClient) -> None:
    with app.app_context():
        db.session.add_all(
            AuditEntry(operator="root", action="flask demo", details="{}", address="") for _ in range(21)
        )
        db.session.commit()
    assert 'rel="next" href="/admin/audit?q=root&amp;after=' in client.get("/admin/audit?q=root").text


# -- the end ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("recorded")
def test_entries_are_deleted_after_audit_days(app: Flask) -> None:
    assert run_worker(app, PruneAuditWorker).state == "succeeded"
    assert [entry.action for entry in entries(app)] == ["admin.make_admin", "admin.unmake_admin", "flask init-db"]
    app.config["AUDIT_DAYS"] = 30
    assert run_worker(app, PruneAuditWorker, datetime.now(UTC) + timedelta(days=1)).state == "succeeded"
    assert [entry.action for entry in entries(app)] == ["admin.make_admin", "admin.unmake_admin"]

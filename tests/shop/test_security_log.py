"""The log of security events: each has a line and a count, with user, network and request, and without an e-mail."""

import io
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from flask_security.confirmable import generate_confirmation_token
from flask_security.recoverable import generate_reset_password_token
from support.databases import on_sqlite
from support.processes import ROOT

import security_log
import throttle
from config import TEXT_FORMAT, json_formatter
from models import User, db

Make = Callable[..., User]


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Return the lines of the logger so far, as LOG_FORMAT=json writes them."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(json_formatter())
    security_log.log.addHandler(handler)
    security_log.log.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    security_log.log.removeHandler(handler)
    security_log.log.setLevel(logging.NOTSET)


Lines = Callable[[], list[dict[str, Any]]]


def counted(client: FlaskClient, event: str) -> float:
    [number] = re.findall(rf'^security_events_total{{event="{event}",process=".*"}} (\S+)$', metrics(client), re.M)
    return float(number)


def metrics(client: FlaskClient) -> str:
    return client.get("/metrics").text


@pytest.fixture
def reader(client: FlaskClient, make_user: Make, login: Callable[[FlaskClient, User], None]) -> User:
    user = make_user(email="reader@example.com")
    login(client, user)
    return user


# -- each event -------------------------------------------------------------------------------------


def facts(lines: list[dict[str, Any]]) -> list[tuple[str, int | None, str | None]]:
    return [(line["event"], line.get("user"), line.get("endpoint")) for line in lines]


def test_each_step_of_an_account_is_recorded(app: Flask, client: FlaskClient, lines: Lines) -> None:
    first, second = "violet kettle 4711 drums", "amber lantern 1984 rain"
    registration = {"name": "Nat", "email": "nat@example.com", "password": first, "password_confirm": first}
    assert client.post("/register", data=registration).status_code == 302
    user = User(id=1, email="nat@example.com")
    assert client.post("/login", data={"email": user.email, "password": first}).status_code == 200  # not confirmed
    assert client.post(link(app, "confirm", generate_confirmation_token), data={"password": first}).status_code == 302
    client.post("/logout")
    for email, password in ((user.email, "wrong"), ("unknown@example.com", "wrong"), (user.email, first)):
        client.post("/login", data={"email": email, "password": password})
    for current in ("wrong", first):
        data = {"password": current, "new_password": second, "new_password_confirm": second}
        client.post("/account/password", data=data)
    client.post("/account/verify", data={"password": "wrong"})
    client.post("/logout")
    for email in (user.email, "unknown@example.com"):
        client.post("/account/reset", data={"email": email})
    client.post("/account/confirm", data={"email": "unknown@example.com"})
    data = {"password": first, "password_confirm": first}
    assert client.post(link(app, "reset", generate_reset_password_token), data=data).status_code == 302
    assert facts(lines()) == [
        ("link asked", 1, "security.register"),
        ("refused", None, "security.login"),
        ("link used", 1, "security.confirm_email"),
        ("login", 1, "security.confirm_email"),
        ("logged out", 1, "security.logout"),
        ("refused", 1, "security.login"),
        ("refused", None, "security.login"),
        ("login", 1, "security.login"),
        ("refused", 1, "security.change_password"),
        ("password changed", 1, "security.change_password"),
        ("refused", 1, "security.verify"),
        ("logged out", 1, "security.logout"),
        ("link asked", 1, "security.forgot_password"),
        ("link asked", None, "security.forgot_password"),
        ("link asked", None, "security.send_confirmation"),
        ("link used", 1, "security.reset_password"),
        ("password changed", 1, "security.reset_password"),
    ]
    assert not re.search("example.com|violet|amber|wrong", json.dumps(lines()))


def link(app: Flask, kind: str, token: Callable[[User], str]) -> str:
    with app.test_request_context():
        return f"/account/{kind}/{token(db.session.get_one(User, 1))}"


def test_rights_and_links_that_an_admin_gives_are_recorded_with_the_admin(
    client: FlaskClient, make_user: Make, login: Callable[[FlaskClient, User], None], lines: Lines
) -> None:
    admin, user = make_user(is_admin=True), make_user()
    login(client, admin)
    for action in ("password-link", "make-admin", "make-admin", "unmake-admin", "unmake-admin", "disable", "enable"):
        client.post(f"/admin/users/{user.id}/{action}")
    given = [(line["event"], line["user"], line["by"]) for line in lines() if "by" in line]
    assert given == [(event, user.id, admin.id) for event in ("link asked", "right given", "right taken")]


def test_commands_that_change_rights_and_passwords_are_recorded(
    app: Flask, runner: FlaskCliRunner, make_user: Make, lines: Lines
) -> None:
    demo_admin = make_user(email="admin@example.com", is_admin=True)
    assert runner.invoke(args=["init-db", "--admin", "you@example.org"]).exit_code == 0
    assert runner.invoke(args=["init-db", "--admin", "you@example.org"]).exit_code == 0
    assert runner.invoke(args=["reset-password", "you@example.org"]).exit_code == 0
    assert runner.invoke(args=["reset-password", "them@example.org"]).exit_code == 1
    you = demo_admin.id + 1
    assert facts(lines()) == [
        ("right given", you, None),
        ("right taken", demo_admin.id, None),
        ("password changed", you, None),
    ]
    assert "example.org" not in json.dumps(lines())


def test_a_forbidden_page_is_recorded_with_user_network_endpoint_and_request(
    client: FlaskClient, reader: User, lines: Lines
) -> None:
    before, since = counted(client, "forbidden"), len(lines())
    response = client.get("/admin/users", environ_overrides={"REMOTE_ADDR": "2001:db8::7"})
    assert response.status_code == 403
    [line] = lines()[since:]
    assert (line["logger"], line["level"], line["event"], line["user"]) == (
        "security",
        "WARNING",
        "forbidden",
        reader.id,
    )
    assert (line["network"], line["endpoint"]) == ("2001:db8::/64", "admin.users")
    assert line["request"] == response.headers["X-Request-ID"]
    assert line["message"] == (
        f"forbidden user={reader.id} network=2001:db8::/64 endpoint=admin.users request={line['request']}"
    )
    assert counted(client, "forbidden") == before + 1


@on_sqlite
def test_a_form_without_a_token_is_recorded(app: Flask, client: FlaskClient, lines: Lines) -> None:
    app.config["WTF_CSRF_ENABLED"] = True
    assert client.post("/login", data={"email": "secret@example.com"}).status_code == 400
    [line] = lines()
    assert (line["event"], line["endpoint"], line["network"]) == ("CSRF", "security.login", "127.0.0.1")
    assert "user" not in line


@on_sqlite
def test_each_forbidden_page_and_bad_form_is_counted_and_the_first_of_a_visitor_is_logged(
    app: Flask,
    client: FlaskClient,
    make_user: Make,
    login: Callable[[FlaskClient, User], None],
    lines: Lines,
    caplog: pytest.LogCaptureFixture,
) -> None:
    login(client, make_user())
    before = counted(client, "forbidden"), counted(client, "CSRF")
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert client.get("/admin/users").status_code == 403
    app.config["WTF_CSRF_ENABLED"] = True
    for last in (1, 1, 2):
        assert client.post("/login", environ_overrides={"REMOTE_ADDR": f"192.0.2.{last}"}).status_code == 400
    events = [line["event"] for line in lines()]
    assert [event for event in events if event != "login"] == ["forbidden", "CSRF", "CSRF"]
    assert "CSRF token is missing" not in caplog.text
    assert (counted(client, "forbidden"), counted(client, "CSRF")) == (before[0] + 3, before[1] + 3)


@on_sqlite
def test_each_throttled_request_is_counted_and_the_first_is_logged(client: FlaskClient, lines: Lines) -> None:
    before = counted(client, "throttled")
    number = int(throttle.LOGINS_OF_NETWORK_AND_ACCOUNT.split()[0])
    for _ in range(number + 3):
        response = client.post("/login", data={"email": "secret@example.com", "password": "hunter2"})
    assert response.status_code == 429
    assert [line["endpoint"] for line in lines() if line["event"] == "throttled"] == ["security.login"]
    assert counted(client, "throttled") == before + 3
    assert not re.search("secret|hunter2", json.dumps(lines()))


# -- the id of a request ----------------------------------------------------------------------------


@on_sqlite
@pytest.mark.parametrize(
    ("proxies", "given", "is_taken"),
    [
        (1, "7f3a-9.b:c_1", True),
        (1, "x" * 64, True),
        (0, "7f3a", False),
        (1, "", False),
        (1, "two words", False),
        (1, "line\tbreak", False),
        (1, "x" * 65, False),
        (1, "ä", False),
    ],
)
@pytest.mark.usefixtures("reader")
def test_the_id_of_a_request_is_the_proxys_if_it_is_one_word(
    app: Flask, client: FlaskClient, lines: Lines, proxies: int, given: str, is_taken: bool
) -> None:
    app.config["PROXIES"] = proxies
    client.get("/admin/users", headers={"X-Request-ID": given})
    used = lines()[-1]["request"]
    assert used == given if is_taken else re.fullmatch("[0-9a-f]{16}", used)


def test_two_requests_have_two_ids(client: FlaskClient, reader: User, lines: Lines) -> None:
    for address in ("192.0.2.1", "192.0.2.2"):
        client.get("/admin/users", environ_overrides={"REMOTE_ADDR": address})
    assert len({line["request"] for line in lines() if line["event"] == "forbidden"}) == 2


# -- outside a request, and as text -----------------------------------------------------------------


def test_a_command_has_no_network_and_no_request(lines: Lines) -> None:
    security_log.record("right given", 7)
    [line] = lines()
    assert line["message"] == "right given user=7"
    assert not {"network", "request", "endpoint"} & line.keys()


def test_a_line_of_text_has_the_same_facts() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logging.Formatter(TEXT_FORMAT))
    security_log.log.addHandler(handler)
    security_log.record("forbidden", 7, by=3)
    security_log.log.removeHandler(handler)
    assert written.getvalue().endswith("WARNING security: forbidden user=7 by=3\n")


def test_a_plain_configuration_of_logs_does_not_silence_the_events() -> None:
    security_log.log.disabled = True  # as `dictConfig` does to each logger that it does not name
    assert not security_log.log.disabled


# -- metrics and alerts -----------------------------------------------------------------------------


@on_sqlite
def test_each_event_has_a_series_before_it_happens(client: FlaskClient) -> None:
    for event in security_log.EVENTS:
        assert counted(client, event) >= 0


@pytest.mark.parametrize("arguments", ["check rules deploy/alerts.yml", "test rules tests/deploy/alerts_test.yml"])
def test_the_alerts_are_as_promtool_expects(arguments: str) -> None:
    tool = shutil.which("promtool") or pytest.skip("needs promtool, of Debian's package prometheus")
    done = subprocess.run([tool, *arguments.split()], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@on_sqlite
def test_each_metric_and_event_of_an_alert_is_in_a_scrape(client: FlaskClient) -> None:
    alerts = (ROOT / "deploy" / "alerts.yml").read_text(encoding="utf-8")
    named = re.findall(r'(\w+){event=~"([^"]+)"}', alerts)
    assert len(named) == alerts.count("expr:")
    for metric, events in named:
        for event in events.split("|"):
            assert f'{metric}{{event="{event}"' in metrics(client)

"""Registering: an e-mail belongs to the reader who confirms it, and no response says who has an account."""

import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from flask_security import hash_password
from sqlalchemy import Engine, event, func, select
from support.account_forms import (
    NEW,
    Make,
    is_logged_in,
    link_in,
    log_in,
    payloads,
    register,
    send_mails,
    stored,
    user_of,
)
from support.databases import close, on_sqlite
from support.shop import PASSWORD, PASSWORD_HASH, has_password, settings

import forms
from app import create_app
from background import current_workers
from models import User, UserRepository, db


@pytest.fixture
def clients(app: Flask) -> list[FlaskClient]:
    return [app.test_client() for _ in range(2)]


# ---- An e-mail is confirmed by its reader


@on_sqlite
def test_a_new_reader_confirms_the_email_by_the_link_and_the_password(
    app: Flask, client: FlaskClient, outbox: Path
) -> None:
    assert "We have sent a mail to nat@example.com." in register(client).text
    assert not log_in(client, "nat@example.com", PASSWORD)
    user = user_of(app, "nat@example.com")
    assert user is not None
    assert payloads(app) == [{"confirm": user.id}]
    [mail] = send_mails(app, outbox)
    assert (mail["To"], mail["Subject"]) == ("nat@example.com", "Please confirm your e-mail address")
    link = link_in(mail)
    assert "Your e-mail is nat@example.com." in client.get(link).text
    assert stored(app, user).confirmed_at is None  # opening the link, as mail scanners do, confirms nothing
    assert client.post(link, data={"password": PASSWORD}).location == "/"
    assert is_logged_in(client)
    confirmed = stored(app, user)
    assert confirmed.confirmed_at is not None
    assert confirmed.last_login_at is not None
    again = app.test_client().get(link, follow_redirects=True).text
    assert "This e-mail is confirmed already." in again


@on_sqlite
@pytest.mark.parametrize(
    ("settings_of_server", "is_told"),
    [({"PRODUCTION": False}, True), ({"PRODUCTION": False, "MAIL_URL": "smtp://mail.example.org"}, False), ({}, False)],
)
def test_a_page_says_that_the_link_is_in_the_log_where_it_is(
    database_url: str, app: Flask, settings_of_server: dict[str, Any], is_told: bool
) -> None:
    trial = create_app(settings(database_url, **settings_of_server))
    page = trial.test_client().post("/account/reset", data={"email": "nat@example.com"}).text
    assert ("look for the link in its log" in page) is is_told
    close(trial)


@on_sqlite
def test_a_reader_gives_no_account_to_the_stranger_who_registered_with_the_email(
    app: Flask, clients: list[FlaskClient], outbox: Path
) -> None:
    stranger, reader = clients
    register(stranger, password="the stranger chose this")
    register(reader, password=NEW)
    for mail in send_mails(app, outbox):
        assert mail["Subject"] == "Please confirm your e-mail address"
        assert "This is not your password." in reader.post(link_in(mail), data={"password": NEW}).text
    assert not log_in(stranger, "nat@example.com", "the stranger chose this")
    assert not log_in(reader, "nat@example.com", NEW)


@on_sqlite
def test_an_invalid_or_old_link_confirms_nothing(app: Flask, client: FlaskClient, outbox: Path) -> None:
    register(client)
    link = link_in(send_mails(app, outbox)[0])
    app.config["SECURITY_CONFIRM_EMAIL_WITHIN"] = timedelta(seconds=-1)
    for wrong in (link, f"{link}x", "/account/confirm/%00", "/account/confirm/x"):
        page = client.post(wrong, data={"password": PASSWORD}, follow_redirects=True).text
        assert "This link is no longer valid." in page, wrong
    user = user_of(app, "nat@example.com")
    assert user is not None
    assert user.confirmed_at is None


@on_sqlite
def test_a_reader_gets_another_link(app: Flask, client: FlaskClient, outbox: Path) -> None:
    register(client)
    client.post("/account/confirm", data={"email": "nat@example.com"})
    link = link_in(send_mails(app, outbox)[1])
    assert client.post(link, data={"password": PASSWORD}).location == "/"


@on_sqlite
def test_an_unconfirmed_user_does_not_become_an_admin(app: Flask, client: FlaskClient, make_user: Make) -> None:
    user = make_user(confirmed_at=None)
    with app.app_context():
        assert not UserRepository(db.session).make_admin(user.id)
        db.session.commit()
    assert not stored(app, user).is_admin


# ---- One mailbox, one account


@on_sqlite
def test_every_spelling_of_an_email_is_one_account(app: Flask, client: FlaskClient, make_user: Make) -> None:
    spellings = {
        "victim@example.com": [
            "VICTIM@Example.com ",
            "victim@ｅxample.com",
            "victim@ⓔxample.com",
            "victim@example。com",
        ],
        "x@xn--exmple-cua.com": ["x@exämple.com", "x@exa\u0308mple.com", "X@XN--EXMPLE-CUA.com"],
        "é@example.com": ["e\u0301@example.com", "É@example.com"],
    }
    for number, (normal, others) in enumerate(spellings.items()):
        for spelling in [normal, *others]:
            assert forms.normalized_email(spelling) == normal
            origin = {"REMOTE_ADDR": f"192.0.2.{number}"}
            form = {"name": "Nat", "email": spelling, "password": PASSWORD, "password_confirm": PASSWORD}
            assert client.post("/register", data=form, environ_overrides=origin).status_code == 302, spelling
    with app.app_context():
        assert set(db.session.scalars(select(User.email))) == spellings.keys()
    make_user(email="tan@xn--exmple-cua.com")
    assert log_in(client, "Tan@exämple.com", PASSWORD)


@pytest.mark.parametrize(
    "email", ["", "nat", "nat@", "nat@a..b", "nat\0@example.com", "n" * 300 + "@example.com", "a b@c.d"]
)
def test_an_invalid_email_has_no_normal_form(email: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        forms.normalized_email(email)


def test_the_admin_of_a_new_installation_has_a_normal_form() -> None:
    assert forms.normalized_email("Admin@localhost") == "admin@localhost"


# ---- No response says who has an account


@pytest.fixture
def work_of(app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Post a form, each time from another network. Return the statements and hashes that it took, in order."""
    done: list[str] = []
    networks = count(1)

    def post(path: str, code: int, **form: str) -> list[str]:
        done.clear()
        origin = {"REMOTE_ADDR": f"192.0.2.{next(networks)}"}
        assert client.post(path, data=form, environ_overrides=origin).status_code == code
        return [*done]

    context = app.extensions["security"].pwd_context
    for name in ("hash", "verify"):
        monkeypatch.setattr(context, name, noted(getattr(context, name), done))
    listeners = {
        "before_cursor_execute": lambda _connection, _cursor, statement, *_: done.append(statement),
        "commit": lambda _connection: done.append("COMMIT"),
        "rollback": lambda _connection: done.append("ROLLBACK"),
    }
    for event_name, listener in listeners.items():
        event.listen(Engine, event_name, listener)
    yield post
    for event_name, listener in listeners.items():
        event.remove(Engine, event_name, listener)


def noted(hashing: Callable[..., Any], done: list[str]) -> Callable[..., Any]:
    def note(*arguments: Any, **options: Any) -> Any:
        done.append("HASH")
        return hashing(*arguments, **options)

    return note


EMAILS = ("nat@example.com", "pat@example.com")


def test_registering_does_the_same_whether_the_email_has_an_account_or_not(
    app: Flask, work_of: Callable[..., list[str]], make_user: Make
) -> None:
    def work(email: str) -> list[str]:
        return work_of("/register", 302, name="Nat", email=email, password=PASSWORD, password_confirm=PASSWORD)

    known = [make_user().email, make_user(confirmed_at=None).email, make_user(active=False).email]
    first, *others = [work(email) for email in (*EMAILS, *known)]
    assert others == [first] * 4
    assert first.count("HASH") == 1
    assert [each.split()[0] for each in first[-5:]] == ["HASH", "INSERT", "SELECT", "INSERT", "COMMIT"]
    assert len(payloads(app)) == 5  # so the queue does not show the difference either
    assert {tuple(payload) for payload in payloads(app)} == {("confirm",)}


def test_refusing_does_the_same_for_a_known_and_an_unknown_email(
    work_of: Callable[..., list[str]], make_user: Make
) -> None:
    columns: list[dict[str, Any]] = [{"status": "passive"}, {"is_admin": True}, {"password": None}, {"password": ""}]
    columns += [{}, {"active": False}, {"confirmed_at": None}]
    emails = ["stranger@example.com", *(make_user(**each).email for each in columns)]
    first, *others = [work_of("/login", 200, email=email, password="wrong horse") for email in emails]
    assert others == [first] * len(columns)
    assert first.count("HASH") == 1


def test_asking_for_a_link_does_the_same_for_a_known_and_an_unknown_email(
    app: Flask, work_of: Callable[..., list[str]], make_user: Make
) -> None:
    emails = ["stranger@example.com", make_user().email, make_user(confirmed_at=None).email, make_user().email]
    for path in ("/account/reset", "/account/confirm"):
        first, *others = [work_of(path, 200, email=email) for email in emails]
        assert others == [first] * 3
    assert len(payloads(app)) == 8


@on_sqlite
def test_an_account_that_cannot_log_in_is_refused_like_an_unknown_email(client: FlaskClient, make_user: Make) -> None:
    answers = set()
    columns: list[dict[str, Any]] = [{"active": False}, {"confirmed_at": None}]
    columns += [{"password": each} for each in (None, "", "!", "scrypt:32768:8:1$a$b")]
    for each in columns:
        user = make_user(**each)
        response = client.post("/login", data={"email": user.email, "password": PASSWORD})
        assert response.status_code == 200, each
        answers.add(response.text.replace(user.email, ""))
    stranger = client.post("/login", data={"email": "stranger@example.com", "password": PASSWORD})
    assert answers == {stranger.text.replace("stranger@example.com", "")}
    assert "Wrong e-mail or password, or the e-mail is not confirmed yet." in stranger.text


@on_sqlite
def test_login_failures_take_equally_long(app: Flask, client: FlaskClient, make_user: Make) -> None:
    costs = {"memory_cost": 8, "rounds": 400, "parallelism": 1}
    context = app.extensions["security"].pwd_context
    context.update(**{f"argon2__{name}": value for name, value in costs.items()})
    with app.app_context():
        known = make_user(password=hash_password(PASSWORD)).email
    others = [make_user(password=None).email, "stranger@example.com"]
    quickest = dict.fromkeys((known, *others), float("inf"))

    def shares() -> dict[str, float]:
        return {email: seconds / quickest[known] for email, seconds in quickest.items()}

    for number in range(10):  # the eleventh is not checked
        for email in quickest:
            start = time.process_time()
            assert not log_in(client, email, "wrong horse")
            quickest[email] = min(quickest[email], time.process_time() - start)
        if number >= 2 and all(0.6 < share < 1.6 for share in shares().values()):
            break
    else:
        pytest.fail(str(shares()))


@on_sqlite
def test_registering_an_existing_email_gives_the_same_response_and_changes_nothing(
    app: Flask, clients: list[FlaskClient]
) -> None:
    first = register(clients[0])
    again = register(clients[1], "NAT@example.com", password=NEW, name="Other")
    hide = re.compile(r'value="[^"]*"')
    assert hide.sub("", first.text) == hide.sub("", again.text)
    with app.app_context():
        [user] = db.session.scalars(select(User))
        assert (user.name, has_password(user, PASSWORD)) == ("Nat", True)


@on_sqlite
def test_the_owner_of_an_email_gets_a_mail_when_a_stranger_registers_with_it(
    app: Flask, client: FlaskClient, make_user: Make, outbox: Path
) -> None:
    user = make_user(email="nat@example.com")
    register(client)
    [mail] = send_mails(app, outbox)
    assert (mail["To"], mail["Subject"]) == ("nat@example.com", "You have an account already")
    assert stored(app, user).password == PASSWORD_HASH


@on_sqlite
def test_a_mail_that_an_earlier_release_enqueued_is_sent_once(app: Flask, make_user: Make, outbox: Path) -> None:
    user = make_user()
    with app.app_context():
        for kind in ("welcome", "registered again", "registered again", "password link"):
            current_workers.enqueue("mail", {kind: user.id, "root": "http://localhost/"})
        db.session.commit()
    assert sorted(mail["Subject"] for mail in send_mails(app, outbox)) == [
        "Choose a new password",
        "Welcome to the Bookstore",
        "You have an account already",
    ]


@on_sqlite
def test_a_logged_in_user_does_not_register(app: Flask, client: FlaskClient, make_user: Make, login: Any) -> None:
    login(client, make_user())
    assert client.post("/register", data={"email": "other@example.com"}).location == "/"
    with app.app_context():
        assert db.session.scalar(select(func.count(User.id))) == 1

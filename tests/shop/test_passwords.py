"""Passwords: their rules, their hashes, changing them, and resetting them by a link."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote

import pytest
from flask import Flask
from flask.testing import FlaskClient
from flask_security.recoverable import generate_reset_password_token
from itsdangerous import URLSafeTimedSerializer
from passlib.hash import argon2
from sqlalchemy import text
from support.account_forms import (
    NEW,
    Login,
    Make,
    change,
    choose,
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
from support.fleet import at_once
from support.shop import PASSWORD, PASSWORD_HASH, has_password, settings
from werkzeug.test import TestResponse

from app import create_app
from background.testing import drain
from forms import Passwords
from models import User, UserRepository, db


@pytest.fixture
def clients(app: Flask) -> list[FlaskClient]:
    return [app.test_client() for _ in range(2)]


@pytest.fixture
def admin(client: FlaskClient, make_user: Make, login: Login) -> User:
    user = make_user(email="you@your.shop", is_admin=True)
    login(client, user)
    return user


# ---- Which passwords are accepted


@on_sqlite
@pytest.mark.parametrize(
    "password",
    [
        *("password", "12345678", "aaaaaaaa", "qwertyuiop", "Password1!", "letmein123"),
        *("nat@example.com", "natturner", "Nat Turner", "Bookstore2026", "bookstore!", "example.com1"),
    ],
)
def test_a_password_that_is_easy_to_guess_is_refused(app: Flask, client: FlaskClient, password: str) -> None:
    page = register(client, password=password, name="Nat Turner").text
    assert "This password is easy to guess." in page
    assert user_of(app, "nat@example.com") is None


@on_sqlite
def test_no_password_takes_seconds_to_judge(app: Flask) -> None:
    """A text of symbols that stand for letters once took 8 s. One word took 0.03 s."""
    began = time.process_time()
    with app.test_request_context():
        complaints, _ = Passwords(app).validate("4@8({[<369!1|71!|0$5+7%2" * 3, True, email="a@b.example", name="Nat")
    assert complaints is None
    assert time.process_time() - began < 2


@on_sqlite
def test_a_changed_password_and_a_password_by_a_link_have_the_same_rules(
    app: Flask, client: FlaskClient, make_user: Make, login: Login, link_of: Callable[[User], str]
) -> None:
    user = make_user(email="nat@example.com", name="Nat Turner")
    login(client, user)
    for password in ("natturner1", "bookstore1", "password"):
        assert "easy to guess" in change(client, password=password, repeated=password).text
        assert "easy to guess" in choose(app.test_client(), link_of(user), password).text
    assert stored(app, user).password == PASSWORD_HASH


@on_sqlite
def test_a_password_of_any_script_is_accepted_and_no_character_is_cut_off(app: Flask, client: FlaskClient) -> None:
    long = ("žluťoučký kůň úpěl ďábelské ódy " * 4)[:127]
    register(client, password=f"{long}x")
    user = user_of(app, "nat@example.com")
    assert user is not None
    assert has_password(user, f"{long}x")
    assert not has_password(user, f"{long}y")


@on_sqlite
def test_two_spellings_of_unicode_are_one_password(app: Flask, client: FlaskClient, make_user: Make) -> None:
    composed, decomposed = "tulipes séchées à Orléans", "tulipes se\u0301che\u0301es a\u0300 Orle\u0301ans"
    user = make_user(password=argon2.using(memory_cost=8, rounds=1, parallelism=1).hash(composed))
    for password in (composed, decomposed):
        assert log_in(client, user.email, password)
        client.post("/logout")


@on_sqlite
def test_a_password_that_is_too_long_is_refused_before_it_is_hashed(
    client: FlaskClient, make_user: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = make_user()
    for module in ("flask_security.forms.hash_password", "flask_security.registerable.hash_password"):
        monkeypatch.setattr(module, lambda _: pytest.fail("hashed"))
    monkeypatch.setattr(User, "verify_and_update_password", lambda *_: pytest.fail("hashed"))
    began = time.process_time()
    for length in (513, 200_000):
        assert not log_in(client, user.email, "p" * length)
        assert "use 8 to 128 characters" in register(client, password="p" * length).text
    assert "use 8 to 128 characters" in register(client, password="pq" * 70).text
    assert time.process_time() - began < 1


@on_sqlite
def test_a_password_is_kept_as_a_slow_hash(database_url: str) -> None:
    config = {name: value for name, value in settings(database_url).items() if not name.startswith("SECURITY_")}
    app = create_app(config)
    register(app.test_client())
    user = user_of(app, "nat@example.com")
    assert user is not None
    assert user.password is not None
    assert user.password.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    close(app)


# ---- Changing it


@on_sqlite
def test_a_user_who_changes_the_password_stays_logged_in_only_here(
    app: Flask, clients: list[FlaskClient], make_user: Make, login: Login, outbox: Path
) -> None:
    user, (here, elsewhere) = make_user(), clients
    for client in clients:
        login(client, user)
    assert change(here).location == "/account"
    assert "Your password has been changed." in here.get("/account").text
    assert not is_logged_in(elsewhere)
    assert not log_in(app.test_client(), user.email, PASSWORD)
    assert log_in(app.test_client(), user.email, NEW)
    [mail] = send_mails(app, outbox)
    assert (mail["To"], mail["Subject"]) == (user.email, "Your password has been changed")


@on_sqlite
def test_a_password_is_changed_only_by_a_user_who_knows_it_and_repeats_the_new_one(
    app: Flask, client: FlaskClient, make_user: Make, login: Login
) -> None:
    user = make_user()
    login(client, user)
    for given, complaint in [
        ({"current": "wrong horse"}, "This is not your password."),
        ({"current": ""}, "This field is required."),
        ({"repeated": "tulips"}, "The two passwords differ."),
        ({"password": "short", "repeated": "short"}, "use 8 to 128 characters"),
        ({"password": PASSWORD, "repeated": PASSWORD}, "This is your current password."),
    ]:
        assert complaint in change(client, **given).text
    assert stored(app, user).password == user.password


def test_one_of_several_requests_that_change_a_password_at_once_changes_it(
    app: Flask, client: FlaskClient, make_user: Make, login: Login
) -> None:
    user = make_user()
    login(client, user)
    cookie = client.get_cookie("session")
    assert cookie is not None

    def replace(index: int) -> str | None:
        browser = app.test_client()
        browser.set_cookie("session", cookie.value)
        return change(browser, password=f"{NEW} {index}", repeated=f"{NEW} {index}").location

    found = at_once(4, replace)
    assert found.count("/account") == 1
    assert has_password(stored(app, user), f"{NEW} {found.index('/account')}")


# ---- Choosing it by a link


@pytest.fixture
def link_of(app: Flask) -> Callable[[User], str]:
    def link(user: User) -> str:
        with app.test_request_context():
            return f"/account/reset/{generate_reset_password_token(stored(app, user))}"

    return link


def ask(client: FlaskClient, email: str, path: str = "/account/reset") -> TestResponse:
    return client.post(path, data={"email": email})


@on_sqlite
def test_a_user_who_forgot_the_password_chooses_another_by_mail(
    app: Flask, client: FlaskClient, make_user: Make, outbox: Path
) -> None:
    user = make_user(email="nat@example.com")
    assert "We have sent a mail to nat@example.com." in ask(client, " NAT@Example.com").text
    [payload] = payloads(app)
    assert payload == {"password link": user.id}  # neither a link nor a secret
    [mail] = send_mails(app, outbox)
    link = link_in(mail)
    for _ in range(2):
        assert user.email in client.get(link).text  # opening it, as mail scanners do, does not use it up
    assert choose(client, link).location == "/login"
    assert "Your password has been changed. Please log in." in client.get("/login").text
    assert log_in(client, user.email, NEW)
    for response in (client.get(link), choose(client, link, "another password")):
        assert response.location == "/account/reset"
    assert "This link is no longer valid." in client.get("/account/reset").text
    assert is_logged_in(client)


@on_sqlite
def test_an_email_without_an_account_gets_the_same_response_and_a_mail_without_a_link(
    app: Flask, client: FlaskClient, make_user: Make, outbox: Path
) -> None:
    make_user(email="nat@example.com")
    for path in ("/account/reset", "/account/confirm"):
        known, unknown = (ask(client, email, path).text for email in ("nat@example.com", "tan@example.com"))
        assert known.replace("nat@", "") == unknown.replace("tan@", "")
    found = sorted((mail["To"], mail["Subject"]) for mail in send_mails(app, outbox))
    assert found == [
        ("nat@example.com", "Choose a new password"),
        ("nat@example.com", "You have an account already"),
        ("tan@example.com", "You have no account"),
        ("tan@example.com", "You have no account"),
    ]


@on_sqlite
def test_a_password_link_confirms_the_email_and_removes_the_password_of_a_stranger(
    app: Flask, client: FlaskClient, outbox: Path
) -> None:
    register(client, password="the stranger chose this")
    ask(client, "nat@example.com")
    link = link_in(send_mails(app, outbox)[-1])
    assert choose(client, link).location == "/login"
    assert not log_in(client, "nat@example.com", "the stranger chose this")
    assert log_in(client, "nat@example.com", NEW)


@on_sqlite
def test_an_admin_has_a_link_mailed(
    app: Flask, client: FlaskClient, make_user: Make, admin: User, outbox: Path
) -> None:
    user = make_user(password=None)
    response = client.post(f"/admin/users/{user.id}/password-link?q=re&status=active&_scheme=javascript")
    assert response.location == "/admin/users?q=re&status=active"
    assert payloads(app) == [{"password link": user.id}]
    [mail] = send_mails(app, outbox)
    assert mail["To"] == user.email
    assert choose(app.test_client(), link_in(mail)).location == "/login"
    assert log_in(app.test_client(), user.email, NEW)


@on_sqlite
def test_a_password_link_ends_the_existing_sessions(
    clients: list[FlaskClient], make_user: Make, login: Login, link_of: Callable[[User], str]
) -> None:
    user = make_user()
    login(clients[0], user)
    choose(clients[1], link_of(user))
    assert not is_logged_in(clients[0])


def test_one_of_several_simultaneous_uses_of_a_password_link_sets_the_password(
    app: Flask, make_user: Make, link_of: Callable[[User], str]
) -> None:
    user = make_user()
    link, clients = link_of(user), [app.test_client() for _ in range(5)]
    at_once(5, lambda index: choose(clients[index], link, f"{NEW} {index}").status_code)
    done = [index for index in range(5) if "Your password has been changed. Please" in clients[index].get("/").text]
    assert len(done) == 1
    assert has_password(stored(app, user), f"{NEW} {done[0]}")


@on_sqlite
def test_an_old_used_or_invalid_password_link_changes_nothing(
    app: Flask, client: FlaskClient, make_user: Make, link_of: Callable[[User], str]
) -> None:
    user = make_user()
    link = link_of(user)
    forged = URLSafeTimedSerializer("guessed", salt="reset-salt").dumps([user.fs_uniquifier, None])
    for wrong in (
        f"{link}x",
        link[:-1],
        f"/account/reset/{forged}",
        "/account/reset/%00",
        "/account/reset/" + "x" * 5000,
    ):
        assert choose(client, wrong).location == "/account/reset", wrong
    form = {"password": NEW, "password_confirm": PASSWORD}
    assert "The two passwords differ." in client.post(link, data=form).text
    app.config["SECURITY_RESET_PASSWORD_WITHIN"] = timedelta(seconds=-1)
    assert choose(client, link).location == "/account/reset"
    app.config["SECURITY_RESET_PASSWORD_WITHIN"] = timedelta(hours=1)
    with app.app_context():
        UserRepository(db.session).end_sessions(user.id)
        db.session.commit()
    assert choose(client, link).location == "/account/reset"
    assert stored(app, user).password == user.password


@on_sqlite
def test_a_link_leads_to_the_public_url_whatever_host_the_admin_used(
    app: Flask, client: FlaskClient, make_user: Make, admin: User, outbox: Path
) -> None:
    app.config["PUBLIC_URL"] = "https://your.shop/books/"
    client.post(f"/admin/users/{make_user().id}/password-link", headers={"X-Forwarded-Host": "evil.example"})
    [mail] = send_mails(app, outbox)
    assert "\nhttps://your.shop/books/account/reset/" in mail.get_content().replace("\r", "")


@on_sqlite
def test_in_production_without_a_public_url_no_mail_has_a_link_to_the_host_of_a_request(
    app: Flask, client: FlaskClient, make_user: Make, admin: User, outbox: Path
) -> None:
    app.config["PRODUCTION"] = True
    client.post(f"/admin/users/{make_user().id}/password-link", headers={"X-Forwarded-Host": "evil.example"})
    app.config["PRODUCTION"] = False  # as in the process of the workers
    [error] = drain(app, "mail").errors
    assert "PUBLIC_URL was not set in production" in str(error)
    assert not outbox.exists()


# ---- Links stay out of the log


@on_sqlite
def test_a_password_link_is_in_no_log(
    app: Flask, caplog: pytest.LogCaptureFixture, make_user: Make, link_of: Callable[[User], str]
) -> None:
    link, atoms = link_of(make_user()), "%(r)s %(f)s"
    logging.getLogger("werkzeug").warning('"%s" %s', f"GET {link} HTTP/1.1", 200)
    logging.getLogger("gunicorn.access").warning(atoms, {"r": f"GET {link} HTTP/1.1", "f": f"https://your.shop{link}"})
    logging.getLogger(app.name).warning("Exception on %s [GET]", link)
    assert link.rpartition("/")[2] not in caplog.text
    assert '"GET /account/reset/... HTTP/1.1" 200' in caplog.text
    assert "GET /account/reset/... HTTP/1.1 https://your.shop/account/reset/...\n" in caplog.text


@on_sqlite
def test_a_password_link_is_in_no_log_however_its_address_is_written(
    caplog: pytest.LogCaptureFixture, make_user: Make, link_of: Callable[[User], str]
) -> None:
    token = link_of(make_user()).rpartition("/")[2]
    for path in ("/account//reset/", "/account/%72eset/", "/account/reset%2F", "/account/reset/%0A"):
        for written in (token, token.replace(".", "%2E"), "".join(f"%{ord(sign):02x}" for sign in token)):
            logging.getLogger("gunicorn.access").warning('"GET %s%s HTTP/1.1" "%s"', path, written, token)
    assert token not in unquote(caplog.text)
    assert len(caplog.text.splitlines()) == 12
    logging.getLogger("gunicorn.access").warning('"GET /books?q=%2541%0A HTTP/1.1"')
    assert caplog.messages[-1] == '"GET /books?q=%2541%0A HTTP/1.1"'


@pytest.mark.usefixtures("app")
@on_sqlite
def test_no_requested_address_slows_the_log_down() -> None:
    began = time.process_time()
    for word in ("a", "aaaaaa.", ".aaaaaa." + "a" * 26, "%61", "%2e%"):
        logging.getLogger("werkzeug").warning('"GET /%s HTTP/1.1" 404', (word * 60_000)[:60_000])
    assert time.process_time() - began < 3  # a pattern that began at every letter took a minute


@on_sqlite
def test_the_path_of_a_failed_request_is_one_line_of_the_log(
    app: Flask, client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    app.config["PROPAGATE_EXCEPTIONS"] = False
    with app.app_context():
        db.session.execute(text("DROP TABLE rate_limits"))
        db.session.commit()
    assert client.post("/account/reset/x%0AINFO forged%1B[2J").status_code == 500
    assert r"Exception on /account/reset/x\nINFO forged\x1b[2J [POST]" in caplog.messages

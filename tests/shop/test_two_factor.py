"""Two-factor login: admins can log in with a password and a code from an authenticator app."""

import re
import time
from html import unescape

import pytest
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from passlib.totp import TOTP
from support.account_forms import Login, Make, is_logged_in, log_in, stored
from support.databases import close, on_sqlite
from support.fleet import at_once
from support.shop import PASSWORD, settings

from app import create_app
from models import User

SETUP, CODE = "/account/two-factor", "/account/two-factor/code"


@pytest.fixture
def admin(client: FlaskClient, make_user: Make, login: Login) -> User:
    user = make_user(email="you@your.shop", is_admin=True)
    login(client, user)
    return user


def set_up(client: FlaskClient) -> TOTP:
    """Set up an authenticator app on the page. Return the app."""
    phone, action = begin(client)
    assert client.post(action, data={"code": "000000"}).location == SETUP
    assert phone.pretty_key() in client.post(SETUP, data={"setup": "authenticator"}).text  # the app is not set up twice
    assert client.post(action, data={"code": phone.generate().token}).location == "/account"
    return phone


def begin(client: FlaskClient) -> tuple[TOTP, str]:
    """Ask for an app's secret. Return the app, and the address that its first code is sent to."""
    page = client.post(SETUP, data={"setup": "authenticator"}).text
    phone = TOTP(key=re.search(r"<code>([^<]+)</code>", page)[1], format="base32")  # type: ignore[index]
    return phone, unescape(re.search(r'action="(/account/two-factor/[^"]+)"', page)[1])  # type: ignore[index]


def next_code(phone: TOTP) -> str:
    """Return a code that was not used yet."""
    return str(phone.generate(time.time() + 30).token)


def test_an_admin_logs_in_with_a_code_of_the_app_too(app: Flask, client: FlaskClient, admin: User) -> None:
    phone, other = set_up(client), app.test_client()
    assert log_in(other, admin.email, PASSWORD)
    assert not is_logged_in(other)
    assert other.get("/admin/users").status_code == 302
    assert "This code is not valid." in other.post(CODE, data={"code": "000000"}).text
    assert not is_logged_in(other)
    assert other.post(CODE, data={"code": next_code(phone)}).location == "/"
    assert other.get("/admin/users").status_code == 200


@on_sqlite
def test_logging_in_with_a_code_leads_to_the_requested_page(app: Flask, client: FlaskClient, admin: User) -> None:
    phone, other = set_up(client), app.test_client()
    form = {"email": admin.email, "password": PASSWORD}
    step = other.post("/login?next=/admin/users", data=form).location
    assert step == "/account/two-factor/code?next=/admin/users"
    assert other.post(step, data={"code": next_code(phone)}).location == "/admin/users"


@on_sqlite
def test_a_code_without_the_password_logs_no_one_in(app: Flask, client: FlaskClient, admin: User) -> None:
    phone, other = set_up(client), app.test_client()
    assert other.post(CODE, data={"code": next_code(phone)}).location == "/login"
    assert not is_logged_in(other)


@on_sqlite
def test_the_page_of_the_code_does_not_log_a_user_out(client: FlaskClient, admin: User) -> None:
    for response in (client.get(CODE), client.post(CODE, data={"code": "000000"})):
        assert response.location == "/"
    assert is_logged_in(client)


@on_sqlite
def test_a_code_logs_in_once(app: Flask, client: FlaskClient, admin: User) -> None:
    code = next_code(set_up(client))
    for expected in (True, False):
        other = app.test_client()
        log_in(other, admin.email, PASSWORD)
        other.post(CODE, data={"code": code})
        assert is_logged_in(other) == expected


@on_sqlite
def test_a_half_login_ends_with_the_sessions(app: Flask, client: FlaskClient, admin: User) -> None:
    phone, other = set_up(client), app.test_client()
    log_in(other, admin.email, PASSWORD)
    client.post("/logout")
    assert other.post(CODE, data={"code": next_code(phone)}).location == "/login"
    assert not is_logged_in(other)


@on_sqlite
def test_switching_it_on_or_off_needs_a_recent_login(app: Flask, client: FlaskClient, admin: User) -> None:
    def age() -> None:
        with client.session_transaction() as content:
            content.update(fs_paa=time.time() - 16 * 60, fs_gexp=0)

    age()
    assert client.get(SETUP).location == "/account/verify?next=/account/two-factor"
    client.post("/account/verify", data={"password": PASSWORD})
    set_up(client)
    age()
    assert client.post(SETUP, data={"setup": "disable"}).location.startswith("/account/verify")
    assert stored(app, admin).tf_primary_method == "authenticator"
    client.post("/account/verify", data={"password": PASSWORD})
    assert client.post(SETUP, data={"setup": "disable"}).location == "/account"
    assert log_in(app.test_client(), admin.email, PASSWORD)
    assert stored(app, admin).tf_totp_secret is None


@on_sqlite
def test_an_old_session_does_not_set_up_the_app_of_another_user(
    app: Flask, client: FlaskClient, make_user: Make, login: Login, admin: User
) -> None:
    strangers = app.test_client()
    login(strangers, make_user())
    phone, action = begin(strangers)
    with client.session_transaction() as content:
        content.update(fs_paa=time.time() - 16 * 60, fs_gexp=0)
    assert client.post(action, data={"code": next_code(phone)}).location.startswith("/account/verify")
    assert stored(app, admin).tf_primary_method is None


def test_a_code_works_once_also_for_several_logins_at_once(app: Flask, client: FlaskClient, admin: User) -> None:
    phone, clients = set_up(client), [app.test_client() for _ in range(4)]
    for each in clients:
        assert log_in(each, admin.email, PASSWORD)
    used = next_code(phone)

    def enter(number: int) -> bool:
        return clients[number].post(CODE, data={"code": used}).status_code == 302

    assert sorted(at_once(4, enter)) == [False, False, False, True]
    assert sum(map(is_logged_in, clients)) == 1


@on_sqlite
def test_a_user_without_rights_is_not_asked_to_set_it_up(
    client: FlaskClient, make_user: Make, login: Login, admin: User
) -> None:
    assert "Set up two-factor login" in client.get("/account").text
    client.post("/logout")
    login(client, make_user())
    assert "with a code" not in client.get("/account").text


@pytest.mark.promise
@on_sqlite
def test_an_operator_helps_an_admin_without_the_app(
    app: Flask, client: FlaskClient, runner: FlaskCliRunner, admin: User
) -> None:
    set_up(client)
    said = runner.invoke(args=["reset-password", admin.email]).output
    password = re.search(r"is (\S+) \(shown", said)[1]  # type: ignore[index]
    other = app.test_client()
    assert log_in(other, admin.email, password)
    assert is_logged_in(other)


@on_sqlite
def test_the_secret_of_the_codes_is_not_in_the_database_as_it_is(app: Flask, client: FlaskClient, admin: User) -> None:
    phone = set_up(client)
    kept = stored(app, admin).tf_totp_secret
    assert kept is not None
    assert phone.base32_key not in kept
    assert len(kept) < 255


@on_sqlite
def test_one_setting_turns_it_off(database_url: str, app: Flask, make_user: Make, login: Login) -> None:
    user = make_user(is_admin=True, tf_primary_method="authenticator", tf_totp_secret="x")
    without = create_app(settings(database_url, TWO_FACTOR=False))
    client = without.test_client()
    login(client, user)
    assert is_logged_in(client)
    assert client.get(SETUP).status_code == 404
    assert "Two-factor" not in client.get("/account").text
    close(without)

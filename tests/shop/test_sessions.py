"""Sessions: they end on the server, and everywhere at once."""

import time
from datetime import UTC, datetime, timedelta

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, update
from support.account_forms import NEW, Login, Make, change, is_logged_in, log_in, stored, token_on
from support.databases import close, on_sqlite
from support.fleet import at_once, in_threads, statements
from support.shop import PASSWORD, settings

import sessions
from app import create_app
from forms import NameForm
from models import User, UserRepository, db


@pytest.fixture
def clients(app: Flask) -> list[FlaskClient]:
    return [app.test_client() for _ in range(2)]


@pytest.fixture
def admin(client: FlaskClient, make_user: Make, login: Login) -> User:
    user = make_user(email="you@your.shop", is_admin=True)
    login(client, user)
    return user


def copy_cookie(client: FlaskClient, app: Flask) -> FlaskClient:
    """Return another browser with a copy of this client's cookie."""
    thief, cookie = app.test_client(), client.get_cookie("session")
    assert cookie is not None
    thief.set_cookie("session", cookie.value)
    return thief


# ---- What ends a session


@on_sqlite
def test_a_copied_cookie_is_worth_nothing_after_logging_out(
    app: Flask, clients: list[FlaskClient], make_user: Make, login: Login
) -> None:
    user, (here, elsewhere) = make_user(), clients
    for client in clients:
        login(client, user)
    thief = copy_cookie(here, app)
    assert is_logged_in(thief)
    here.post("/logout")
    assert [is_logged_in(client) for client in (here, thief, elsewhere)] == [False] * 3


def test_no_session_begins_under_a_password_that_was_changed_during_its_check(
    app: Flask, clients: list[FlaskClient], make_user: Make, login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, (owner, thief), check = make_user(), clients, User.verify_and_update_password
    login(owner, user)
    long_ago = stored(app, user).last_login_at

    def changed_meanwhile(checked: User, password: str) -> bool:
        monkeypatch.setattr(User, "verify_and_update_password", check)
        right = check(checked, password)
        in_threads(lambda: change(owner))
        return right

    monkeypatch.setattr(User, "verify_and_update_password", changed_meanwhile)
    log_in(thief, user.email, PASSWORD)
    assert not is_logged_in(thief)
    assert stored(app, user).last_login_at == long_ago
    assert log_in(app.test_client(), user.email, NEW)


def test_a_session_ends_when_its_user_becomes_an_admin_or_is_no_longer_an_admin(
    client: FlaskClient, app: Flask, make_user: Make, login: Login, admin: User
) -> None:
    user, theirs = make_user(), app.test_client()
    login(theirs, user)
    client.post(f"/admin/users/{user.id}/make-admin")
    assert not is_logged_in(theirs)
    with app.app_context():
        db.session.execute(update(User).where(User.id == user.id).values(password=user.password))
        db.session.commit()
    login(theirs, user)
    assert theirs.get("/admin/users").status_code == 200
    client.post(f"/admin/users/{user.id}/unmake-admin")
    assert not is_logged_in(theirs)
    login(theirs, user)
    assert theirs.get("/admin/users").status_code == 403


@on_sqlite
def test_an_admin_logs_a_user_out_everywhere(
    app: Flask, client: FlaskClient, clients: list[FlaskClient], make_user: Make, login: Login, admin: User
) -> None:
    user = make_user()
    for each in clients:
        login(each, user)
    page = client.post(f"/admin/users/{user.id}/log-out", follow_redirects=True).text
    assert f"{user.email} has been logged out everywhere." in page
    assert not any(is_logged_in(each) for each in clients)
    assert log_in(clients[0], user.email, PASSWORD)


@on_sqlite
def test_a_session_ends_after_a_time_without_a_request_and_a_week_after_its_password(
    app: Flask, client: FlaskClient, make_user: Make, login: Login
) -> None:
    login(client, make_user())
    cookie = client.get("/").headers["Set-Cookie"]  # each response renews the cookie
    expires = datetime.strptime(cookie.split("Expires=")[1][:29], "%a, %d %b %Y %H:%M:%S %Z").replace(tzinfo=UTC)
    assert abs(expires - datetime.now(UTC) - sessions.IDLE) < timedelta(minutes=1)
    assert app.config["PERMANENT_SESSION_LIFETIME"] == sessions.IDLE  # the age of a signed cookie that is accepted
    for age, expected in ((sessions.ABSOLUTE - timedelta(minutes=1), True), (sessions.ABSOLUTE, False)):
        with client.session_transaction() as content:
            content["fs_paa"] = time.time() - age.total_seconds()
        assert is_logged_in(client) == expected


@on_sqlite
def test_a_session_of_the_previous_release_is_logged_out(client: FlaskClient, make_user: Make) -> None:
    user = make_user()
    for known_as in (str(user.id), f"{user.id}.", f"{user.id}.ñ", f"{user.id}.{'0' * 32}"):
        with client.session_transaction() as content:
            content.update(_user_id=known_as, fs_paa=time.time())
        assert not is_logged_in(client), known_as


# ---- Its cookie and its token


@on_sqlite
def test_a_token_is_invalid_after_logging_in_or_out(app: Flask, client: FlaskClient, make_user: Make) -> None:
    app.config["WTF_CSRF_ENABLED"] = True
    form = {"email": make_user().email, "password": PASSWORD, "name": "Nat"}
    given_before = {**form, "csrf_token": token_on(client, "/login")}
    assert client.post("/login", data=given_before).status_code == 302
    assert client.post("/account", data=given_before).status_code == 400
    given_within = {**form, "csrf_token": token_on(client, "/account")}
    assert client.post("/logout", data=given_within).status_code == 302
    assert client.post("/login", data=given_within).status_code == 400


@on_sqlite
def test_logging_in_keeps_nothing_of_the_session_before(client: FlaskClient, make_user: Make, login: Login) -> None:
    with client.session_transaction() as content:
        content.update(planted="by another visitor", fs_gexp=time.time() + 10**6)
    login(client, make_user())
    with client.session_transaction() as content:
        assert content.keys() == {"_user_id", "_id", "_fresh", "fs_paa", "_permanent"}


@on_sqlite
def test_no_other_host_of_the_domain_sets_the_cookie_where_sessions_need_https(
    database_url: str, app: Flask, make_user: Make
) -> None:
    user = make_user()
    form = {"email": user.email, "password": PASSWORD}
    cookie = app.test_client().post("/login", data=form).headers["Set-Cookie"]
    assert cookie.startswith("session=")
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert "Secure" not in cookie
    secure = create_app(settings(database_url, PRODUCTION=False, SESSION_COOKIE_SECURE=True))
    cookie = secure.test_client().post("/login", data=form, base_url="https://localhost").headers["Set-Cookie"]
    assert cookie.startswith("__Host-session=")
    assert "Secure; HttpOnly; Path=/; SameSite=Lax" in cookie
    assert "Domain" not in cookie
    close(secure)


@on_sqlite
def test_json_or_a_token_in_the_address_logs_no_user_in(app: Flask, client: FlaskClient, make_user: Make) -> None:
    user = make_user()
    assert client.post("/login", json={"email": user.email, "password": PASSWORD}).status_code == 415
    with app.test_request_context():
        token = user.get_auth_token()
    for how in ({"query_string": {"auth_token": token}}, {"headers": {"Authentication-Token": token}}):
        assert client.get("/account", **how).status_code == 302  # type: ignore[arg-type]


# ---- Races


def test_a_change_under_a_session_that_has_just_ended_changes_nothing(
    app: Flask, client: FlaskClient, make_user: Make, login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = make_user(name="Nat")
    login(client, user)

    def ended_meanwhile(form: NameForm) -> bool:
        in_threads(lambda: end_sessions(app, user))
        return bool(form.validate())

    monkeypatch.setattr(NameForm, "validate_on_submit", ended_meanwhile)
    response = client.post("/account", data={"name": "Thief"})
    assert response.location == "/login"
    assert "Your account was changed at the same time" in client.get("/login").text
    assert stored(app, user).name == "Nat"


def end_sessions(app: Flask, user: User) -> None:
    with app.app_context():
        UserRepository(db.session).end_sessions(user.id)
        db.session.commit()


def test_logging_out_several_times_at_once_is_logging_out(
    app: Flask, client: FlaskClient, make_user: Make, login: Login
) -> None:
    login(client, make_user())
    browsers = [copy_cookie(client, app) for _ in range(4)]
    assert set(at_once(4, lambda index: browsers[index].post("/logout").status_code)) == {302}
    assert not any(is_logged_in(each) for each in [client, *browsers])


@on_sqlite
def test_a_static_file_asks_the_database_for_no_user(client: FlaskClient, make_user: Make, login: Login) -> None:
    login(client, make_user())
    with statements(Engine) as asked:
        assert client.get("/static/style.css", buffered=True).status_code == 200
        assert client.get("/health/live").status_code == 200
    assert asked == []


@on_sqlite
@pytest.mark.parametrize("body", ["[1]", '"x"', "null", '{"password": 1}'])
def test_json_is_no_form_of_an_account(client: FlaskClient, make_user: Make, login: Login, body: str) -> None:
    login(client, make_user())
    for path in ("/account", "/account/delete", "/account/password", "/account/verify"):
        assert client.post(path, data=body, content_type="application/json").status_code == 415

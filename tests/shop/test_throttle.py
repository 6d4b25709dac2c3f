"""Rate limits: all processes share one count, and no client locks another client out."""

import multiprocessing
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from limits.storage import storage_from_string
from sqlalchemy import select, update
from sqlalchemy.exc import DBAPIError, OperationalError
from support.databases import close, on_postgresql, on_sqlite
from support.fleet import at_once
from support.processes import margin
from support.shop import PASSWORD, settings
from werkzeug.test import TestResponse

import throttle
from app import create_app
from models import RateLimit, User, db
from throttle import RateLimits

context = multiprocessing.get_context("fork")  # as under gunicorn --preload, no connection is open


@pytest.fixture
def nat(make_user: Callable[..., User]) -> User:
    return make_user(email="nat@example.com")


def log_in(
    client: FlaskClient, password: str = "wrong", email: str = "nat@example.com", address: str = "192.0.2.1"
) -> TestResponse:
    origin = {"REMOTE_ADDR": address}
    return client.post("/login", data={"email": email, "password": password}, environ_overrides=origin)


def codes(client: FlaskClient, times: int, **more: Any) -> list[int]:
    return [log_in(client, **more).status_code for _ in range(times)]


def counts(app: Flask) -> list[int]:
    with app.app_context():
        return list(db.session.scalars(select(RateLimit.hits).order_by(RateLimit.hits)))


def raise_the_highest_count(app: Flask, to: int) -> None:
    """Make the highest count as high as after more attempts. A test needs no hundred requests then."""
    highest = counts(app)[-1]
    with app.app_context():
        db.session.execute(update(RateLimit).where(RateLimit.hits == highest).values(hits=to))
        db.session.commit()


# ---- Logging in


@pytest.mark.usefixtures("nat")
def test_after_ten_wrong_passwords_no_password_is_checked(client: FlaskClient) -> None:
    assert codes(client, 12) == [200] * 10 + [429] * 2
    response = log_in(client, PASSWORD)
    assert response.status_code == 429
    assert "too many attempts from your network. Please wait for 10 minutes, then try again." in response.text
    assert 500 < int(response.headers["Retry-After"]) <= 601


@pytest.mark.usefixtures("nat")
@on_sqlite
def test_guesses_lock_neither_the_account_elsewhere_nor_other_accounts_here(client: FlaskClient) -> None:
    assert codes(client, 11)[-1] == 429
    assert log_in(client, email="pat@example.com").status_code == 200
    assert log_in(client, PASSWORD, address="192.0.2.2").status_code == 302


@pytest.mark.usefixtures("nat")
@on_sqlite
def test_an_account_is_the_same_however_its_email_is_written(client: FlaskClient) -> None:
    assert codes(client, 10) == [200] * 10
    for written in (" NAT@Example.com ", "nat@ｅxample.com", "nat@example。com"):
        assert log_in(client, email=written).status_code == 429


@on_sqlite
def test_fifty_wrong_passwords_are_enough_for_one_network(app: Flask, client: FlaskClient) -> None:
    for number in (1, 2):
        assert log_in(client, email=f"{number}@example.com").status_code == 200
    raise_the_highest_count(app, to=49)
    assert [log_in(client, email=f"{number}@example.com").status_code for number in (3, 4)] == [200, 429]


@on_sqlite
@pytest.mark.usefixtures("nat")
def test_a_network_is_an_ipv4_address_or_an_ipv6_prefix(client: FlaskClient) -> None:
    for one, same, other in [
        ("2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1"),
        ("::ffff:192.0.2.7", "192.0.2.7", "::ffff:192.0.2.8"),
        ("", "unix:", "192.0.2.9"),
    ]:
        assert codes(client, 10, address=one) == [200] * 10
        assert [log_in(client, address=address).status_code for address in (same, other)] == [429, 200], one


@pytest.mark.usefixtures("nat")
@on_sqlite
def test_right_passwords_are_counted_too(client: FlaskClient) -> None:
    found = []
    for _ in range(11):
        found.append(log_in(client, PASSWORD).status_code)
        client.delete_cookie("session")
    assert found == [302] * 10 + [429]


@pytest.mark.usefixtures("nat")
def test_guesses_from_many_networks_have_one_ceiling_for_each_account(app: Flask, client: FlaskClient) -> None:
    guess_from_two_networks(app, client)
    assert codes(client, 3, address="198.51.100.3") == [200, 429, 429]
    assert "too many attempts with this account" in log_in(client, address="192.0.2.2").text
    assert log_in(client, email="pat@example.com", address="192.0.2.2").status_code == 200


def guess_from_two_networks(app: Flask, client: FlaskClient) -> None:
    """Leave one of the hundred guesses at the account."""
    for network in (1, 2):
        assert log_in(client, address=f"198.51.100.{network}").status_code == 200
    raise_the_highest_count(app, to=99)


@pytest.mark.usefixtures("nat")
def test_that_ceiling_does_not_lock_the_owner_out_of_a_known_network(app: Flask, client: FlaskClient) -> None:
    assert log_in(client, PASSWORD).status_code == 302
    guess_from_two_networks(app, app.test_client())
    assert codes(app.test_client(), 2, address="198.51.100.3") == [200, 429]
    assert log_in(app.test_client(), PASSWORD, address="192.0.2.2").status_code == 429
    assert log_in(app.test_client(), PASSWORD).status_code == 302


@on_sqlite
def test_a_login_whose_network_cannot_be_remembered_is_a_login(
    client: FlaskClient, nat: User, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On SQLite, a run may take the only write lock after the transaction of the login."""

    def locked(*_: Any) -> None:
        raise OperationalError("DELETE", {}, Exception("database is locked"))

    monkeypatch.setattr(RateLimits, "clear", locked)
    assert log_in(client, PASSWORD).status_code == 302
    assert client.get("/account").status_code == 200
    assert "The network of a login could not be remembered" in caplog.text


@pytest.mark.usefixtures("nat")
def test_simultaneous_guesses_are_limited_like_successive_guesses(app: Flask) -> None:
    found = sorted(at_once(16, lambda _: log_in(app.test_client()).status_code))
    assert found == [200] * 10 + [429] * 6


@pytest.mark.promise
@on_postgresql
def test_processes_share_one_count(app: Flask, database_url: str) -> None:
    children = [context.Process(target=hit, args=(database_url, 40)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert counts(app) == [120]


def hit(url: str, times: int) -> None:
    app = create_app(settings(url))
    with app.app_context():
        for _ in range(times):
            RateLimits().incr("LIMITER/x", 600)
    close(app)


# ---- Every route that may write


@pytest.fixture
def log_admin_in(app: Flask, make_user: Callable[..., User], login: Callable[..., None]) -> Callable[[], FlaskClient]:
    """Give a function that logs one admin in on a new client. The user with the id 1 is another user."""
    make_user()
    user = make_user(is_admin=True)

    def log_in() -> FlaskClient:
        client = app.test_client()
        login(client, user)
        return client

    return log_in


@pytest.fixture
def admin(log_admin_in: Callable[[], FlaskClient]) -> FlaskClient:
    return log_admin_in()


def writing(app: Flask) -> list[tuple[str, str, str]]:
    """Return the endpoint, a writing method and a path of each route that has such a method."""
    adapter = app.url_map.bind("localhost")
    return [
        (rule.endpoint, method, adapter.build(rule.endpoint, dict.fromkeys(rule.arguments, 1), method))
        for rule in app.url_map.iter_rules()
        for method in sorted(rule.methods & set(throttle.WRITING))
    ]


def make_the_next_request_the_thousandth(app: Flask) -> None:
    """Add 998 to each count of the previous request."""
    with app.app_context():
        db.session.execute(update(RateLimit).values(hits=RateLimit.hits + 998))
        db.session.commit()


def forget(app: Flask) -> None:
    with app.app_context():
        RateLimits().reset()


@on_sqlite
def test_the_thousandth_writing_request_of_one_user_is_refused_at_every_route(
    app: Flask, log_admin_in: Callable[[], FlaskClient]
) -> None:
    asked = writing(app)
    assert len(asked) > 15
    for endpoint, method, path in asked:
        client = log_admin_in()
        forget(app)
        first = client.open(path, method=method, environ_overrides={"REMOTE_ADDR": "192.0.2.1"})
        assert first.status_code != 429
        make_the_next_request_the_thousandth(app)
        second = log_admin_in().open(path, method=method, environ_overrides={"REMOTE_ADDR": "192.0.2.2"})
        assert second.status_code == 429, endpoint
        assert "too many attempts with this account" in second.text
        assert int(second.headers["Retry-After"]) > 0


@on_sqlite
def test_the_thousandth_writing_request_of_one_network_is_refused_at_every_route(
    app: Flask, admin: FlaskClient, client: FlaskClient
) -> None:
    for endpoint, method, path in writing(app):
        forget(app)
        assert admin.open(path, method=method).status_code != 429
        make_the_next_request_the_thousandth(app)
        assert client.open(path, method=method).status_code == 429, endpoint
    assert "too many attempts from your network" in client.post("/logout").text


@on_sqlite
def test_reading_is_not_counted(app: Flask, admin: FlaskClient) -> None:
    forget(app)
    for path in ("/", "/account", "/admin/users", "/workers/"):
        assert admin.get(path).status_code == 200
    assert counts(app) == []


@on_sqlite
def test_an_ordinary_day_meets_no_limit(app: Flask, admin: FlaskClient) -> None:
    path = "/workers/worker/passive_user_checker_worker"
    forget(app)
    assert admin.post(f"{path}/pause").status_code == 303
    raise_the_highest_count(app, to=199)
    assert admin.post(f"{path}/resume").status_code == 303


@on_sqlite
def test_a_refused_visitor_has_one_line_in_the_log(
    client: FlaskClient, nat: User, caplog: pytest.LogCaptureFixture
) -> None:
    codes(client, 15)
    lines = [record.getMessage() for record in caplog.records if record.name in ("security", "flask-limiter")]
    [line] = [line for line in lines if not line.startswith("refused")]
    assert line.startswith("throttled network=192.0.2.1 ")
    assert nat.email not in caplog.text


# ---- Stricter limits


@on_sqlite
def test_each_form_of_accounts_has_a_stricter_limit(app: Flask) -> None:
    """Three forms need no such limit: the name, the log out, and the choice of the second factor."""
    forms = {endpoint for endpoint, *_ in writing(app) if endpoint.split(".")[0] in ("security", "account")}
    free = {"account.profile", "security.logout", "security.tf_select"}
    assert forms - free == throttle.LIMITS.keys()


@on_sqlite
def test_a_network_asks_for_twenty_mails_and_uses_twenty_links_an_hour(app: Flask, client: FlaskClient) -> None:
    for path in ("/register", "/account/reset", "/account/confirm", "/account/reset/x", "/account/confirm/x"):
        form = {"email": "nat@example.com"}
        assert [client.post(path, data=form).status_code for _ in range(21)].count(429) == 1, path
        assert client.get(path).status_code != 429
        elsewhere = {"REMOTE_ADDR": "192.0.2.2"}
        assert client.post(path, data=form, environ_overrides=elsewhere).status_code != 429


@on_sqlite
def test_twenty_codes_of_a_second_factor_are_checked_in_an_hour_from_all_networks_together(
    app: Flask, client: FlaskClient, make_user: Callable[..., User]
) -> None:
    with app.app_context():
        secret = app.extensions["security"].totp_factory.generate_totp_secret()
    make_user(email="nat@example.com", is_admin=True, tf_primary_method="authenticator", tf_totp_secret=secret)
    assert "/account/two-factor/code" in log_in(client, PASSWORD).location
    found = [
        client.post(
            "/account/two-factor/code",
            data={"code": "000000", "email": f"{index}@example.com"},
            environ_overrides={"REMOTE_ADDR": f"192.0.2.{index}"},
        ).status_code
        for index in range(21)
    ]
    assert found == [200] * 20 + [429]


@on_sqlite
def test_the_current_password_is_not_guessed_in_a_session_that_was_left_open(
    client: FlaskClient, nat: User, login: Callable[..., None]
) -> None:
    login(client, nat)
    wrong = {"current": "wrong horse", "password": PASSWORD, "repeated": PASSWORD}
    assert [client.post("/account/password", data=wrong).status_code for _ in range(11)] == [200] * 10 + [429]


# ---- Where it is counted


@pytest.fixture
def limits(app: Flask) -> Any:
    with app.app_context():
        yield storage_from_string("database://")
        db.session.remove()


def expire(key: str) -> None:
    past = datetime.now(UTC) - timedelta(minutes=1)
    db.session.execute(update(RateLimit).where(RateLimit.key == key).values(expires_at=past))
    db.session.commit()


def test_a_window_begins_with_its_first_attempt_and_ends_by_the_databases_clock(limits: RateLimits) -> None:
    assert [limits.incr("a", 600), limits.incr("a", 5), limits.incr("a", 600, amount=3)] == [1, 2, 5]
    assert limits.get("a") == 5
    assert 590 < limits.get_expiry("a") - time.time() <= 600.5
    expire("a")
    assert limits.get("a") == 0
    assert limits.get_expiry("a") == pytest.approx(time.time(), abs=margin())
    assert limits.incr("a", 600) == 1


def test_a_new_window_deletes_expired_windows(limits: RateLimits) -> None:
    for key in ("a", "b", "c"):
        limits.incr(key, 600)
    expire("a")
    expire("b")
    limits.incr("d", 600)
    assert sorted(db.session.scalars(select(RateLimit.key))) == ["c", "d"]


def test_a_count_taken_back_after_its_window_is_no_credit_for_the_next_window(limits: RateLimits) -> None:
    limits.incr("a", 600)
    expire("a")
    assert limits.incr("a", 600, amount=-1) == 0
    assert limits.incr("a", 600) == 1


def test_counts_can_be_cleared(limits: RateLimits) -> None:
    limits.incr("a", 600)
    limits.incr("b", 600)
    limits.clear("a")
    assert (limits.get("a"), limits.get("b"), limits.check()) == (0, 1, True)
    assert limits.reset() == 1
    assert limits.get("b") == 0


def test_a_count_is_kept_whatever_the_outcome_of_the_request(limits: RateLimits) -> None:
    db.session.execute(select(RateLimit.key)).all()
    limits.incr("a", 600)
    db.session.rollback()
    assert limits.get("a") == 1


def test_many_windows_that_begin_and_end_at_once_do_not_wait_for_each_other(app: Flask) -> None:
    def begin(index: int) -> None:
        with app.app_context():
            for number in range(20):
                RateLimits().incr(f"{(index + number) % 7}", 600)
                if number % 5 == 0:
                    expire(f"{number % 7}")

    at_once(4, begin)
    assert len(counts(app)) <= 7


def test_a_database_that_does_not_answer_allows_no_guess(app: Flask, client: FlaskClient) -> None:
    with app.app_context():
        RateLimit.__table__.drop(db.engine)
    with pytest.raises(DBAPIError):
        log_in(client)
    app.config["PROPAGATE_EXCEPTIONS"] = False
    assert log_in(client).status_code == 500


@on_sqlite
@pytest.mark.parametrize(
    ("address", "known_as"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7:4711", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2:3:4:5:6]:4711", "2001:db8:1:2::/64"),
        ("nonsense", "nowhere"),
        ("", "nowhere"),
    ],
)
def test_a_visitors_network_is_recognized_in_any_notation_of_a_proxy(app: Flask, address: str, known_as: str) -> None:
    with app.test_request_context(environ_base={"REMOTE_ADDR": address}):
        assert throttle.network() == known_as

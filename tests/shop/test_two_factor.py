"""The second factor: an admin's own choice, and one setting for all."""

import re
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient
from passlib.totp import TOTP
from support.databases import close, on_sqlite
from support.shop import PASSWORD, settings

from app import create_app
from models import User, db

Make = Callable[..., User]


@pytest.fixture
def admin(client: FlaskClient, make_user: Make, login: Callable[[FlaskClient, User], None]) -> User:
    user = make_user(is_admin=True)
    login(client, user)
    return user


def set_up(client: FlaskClient) -> TOTP:
    """Set the second factor up by its pages. Return the generator of codes that the app has then."""
    page = client.post("/account/two-factor", data={"setup": "authenticator"}).text
    generator = TOTP(re.search(r"<code[^>]*>([A-Z2-7 -]+)</code>", page)[1])  # type: ignore[index]
    target = re.search(r'action="(/account/two-factor/[^"]+)"', page)[1]  # type: ignore[index]
    assert client.post(target, data={"code": generator.generate().token}).status_code == 302
    return generator


def is_logged_in(client: FlaskClient) -> bool:
    return client.get("/account").status_code == 200


def test_an_admin_logs_in_with_a_code_of_the_app_too(client: FlaskClient, admin: User) -> None:
    assert "Log in with a code of an app, too" in client.get("/account").text
    generator = set_up(client)
    assert "Two-factor is on" in client.get("/account").text
    client.post("/logout")
    answer = client.post("/login", data={"email": admin.email, "password": PASSWORD}, follow_redirects=True)
    assert answer.request.path == "/account/two-factor/code"
    assert not is_logged_in(client)
    right = generator.generate().token
    client.post("/account/two-factor/code", data={"code": f"{(int(right) + 1) % 10**6:06}"})
    assert not is_logged_in(client)
    client.post("/account/two-factor/code", data={"code": right})
    assert is_logged_in(client)


@on_sqlite
def test_the_secret_of_the_codes_is_not_in_the_database_as_it_is(app: Flask, client: FlaskClient, admin: User) -> None:
    generator = set_up(client)
    with app.app_context():
        kept = db.session.get_one(User, admin.id).tf_totp_secret
    assert kept
    assert generator.base32_key not in kept


@on_sqlite
def test_a_user_without_rights_is_not_asked_to_set_it_up(
    client: FlaskClient, make_user: Make, login: Callable[[FlaskClient, User], None]
) -> None:
    login(client, make_user())
    assert "two-factor" not in client.get("/account").text.lower()


def test_one_setting_turns_it_off(sqlite_url: str) -> None:
    app = create_app(settings(sqlite_url, TWO_FACTOR=False))
    try:
        assert not [rule for rule in app.url_map.iter_rules() if "two-factor" in rule.rule]
    finally:
        close(app)

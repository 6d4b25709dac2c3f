"""Helpers of the tests of accounts: they fill the shop's forms, and read its database and outbox."""

import json
import re
from collections.abc import Callable
from email import message_from_bytes
from email.policy import default
from pathlib import Path
from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import select
from support.shop import PASSWORD
from werkzeug.test import TestResponse

from background.database.tables import messages
from background.testing import drain
from models import User, db

NEW = "tulips are not enough"
Make = Callable[..., User]
Login = Callable[..., None]


def register(client: FlaskClient, email: str = "nat@example.com", password: str = PASSWORD, **fields: str) -> Any:
    form = {"name": "Nat", "email": email, "password": password, "password_confirm": password} | fields
    return client.post("/register", data=form, follow_redirects=True)


def log_in(client: FlaskClient, email: str, password: str) -> bool:
    return client.post("/login", data={"email": email, "password": password}).status_code == 302


def is_logged_in(client: FlaskClient) -> bool:
    return client.get("/account").status_code == 200


def change(client: FlaskClient, current: str = PASSWORD, password: str = NEW, repeated: str = NEW) -> TestResponse:
    form = {"password": current, "new_password": password, "new_password_confirm": repeated}
    return client.post("/account/password", data=form)


def choose(client: FlaskClient, link: str, password: str = NEW) -> TestResponse:
    return client.post(link, data={"password": password, "password_confirm": password})


def token_on(client: FlaskClient, path: str, **more: Any) -> str:
    return re.search(r'name="csrf_token"[^>]* value="([^"]*)"', client.get(path, **more).text)[1]  # type: ignore[index]


def stored(app: Flask, user: User) -> User:
    with app.app_context():
        return db.session.get_one(User, user.id)


def user_of(app: Flask, email: str) -> User | None:
    with app.app_context():
        return db.session.scalar(select(User).where(User.email == email))


def payloads(app: Flask) -> list[Any]:
    """Return the payloads of all messages, without the address of the shop."""
    with app.app_context():
        found = db.session.scalars(select(messages.c.payload).order_by(messages.c.id))
        return [{name: value for name, value in json.loads(text).items() if name != "root"} for text in found]


def states_of_messages(app: Flask) -> list[str]:
    with app.app_context():
        return list(db.session.scalars(select(messages.c.state)))


def send_mails(app: Flask, outbox: Path) -> list[Any]:
    """Send the mails that wait. Return all mails of the outbox."""
    assert drain(app, "mail").errors == ()
    paths = sorted(outbox.glob("*.eml")) if outbox.exists() else []
    return [message_from_bytes(path.read_bytes(), policy=default) for path in paths]


def link_in(mail: Any) -> str:
    """Return the path of the link in the mail."""
    return re.search(r"https?://[^/\s]+(/\S+)", mail.get_content())[1]  # type: ignore[index, no-any-return]

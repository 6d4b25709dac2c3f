"""The shop's pages while the database is away: 503, Retry-After and one line in the log. Afterwards they work again."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from support.databases import close, text
from support.processes import eventually
from support.servers import PostgreSQL, moved, stopped
from support.shop import PASSWORD_HASH, migrate, settings

from app import create_app
from models import User, db

try:
    from tests.books import rows as books
except ImportError:  # an application without the shop
    books = None  # type: ignore[assignment]

Away = Callable[[], Any]

PAGES = ("/account", "/admin/users", "/admin/audit", *(books.PAGES if books else ()))
API = books.JSON if books else ()
DASHBOARD = ("/workers/", "/workers/timeline", "/workers/instances", "/workers/messages", "/workers/messages/1")


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    server = PostgreSQL(migrate)
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> tuple[str, Away]:
    """Give the URL of a database with the schema, and a block in which it is away."""
    if request.param == "sqlite":
        url: str = request.getfixturevalue("sqlite_url")
        folder = Path(url.removeprefix("sqlite:///")).parent
        return url, lambda: moved(folder)
    server: PostgreSQL = request.getfixturevalue("server")
    return text(server.database()), lambda: stopped(server)


@pytest.fixture
def shop(database: tuple[str, Away]) -> Iterator[tuple[Flask, Away]]:
    """Give the application, and a block in which its database is away."""
    app = create_app(settings(database[0], TESTING=False))

    @contextmanager
    def away() -> Iterator[None]:
        if database[0].startswith("sqlite"):  # otherwise the connections go on with the moved file
            app.extensions["background_workers"].stop()
            with app.app_context():
                db.engine.dispose()
        with database[1]():
            yield

    with app.app_context():
        if books:
            books.add_book()
        columns = {"email": "admin@example.org", "name": "A", "password": PASSWORD_HASH, "is_admin": True}
        db.session.add(User(**columns, created_at=datetime.now(UTC), confirmed_at=datetime.now(UTC)))
        db.session.commit()
    yield app, away
    close(app)


@pytest.fixture
def admin(shop: tuple[Flask, Away], login: Callable[..., None]) -> FlaskClient:
    client = shop[0].test_client()
    with shop[0].app_context():
        login(client, db.session.scalars(db.select(User)).one())
    return client


@pytest.mark.promise
def test_every_page_is_a_503_with_one_line_in_the_log_and_works_again_afterwards(
    shop: tuple[Flask, Away], admin: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    _, away = shop
    usual = {path: admin.get(path).status_code for path in (*PAGES, *API, *DASHBOARD)}
    assert set(usual.values()) == {200, 404}
    with away():
        for path in usual:
            is_away(caplog, admin, "GET", path)
        for path in (
            *PAGES[4:5],
            "/login",
            "/account",
            "/workers/worker/mail_worker/pause",
            "/workers/messages/change",
            "/no-such-page",
        ):
            is_away(caplog, admin, "POST", path)
        assert admin.get("/").status_code == 503  # this page names the user
        with admin.get("/static/style.css") as response:
            assert response.status_code == 200
    for path, code in usual.items():
        assert eventually_is(admin, path) == code


def eventually_is(client: FlaskClient, path: str) -> int:
    """Return the response once no pool has an old connection. A page may meet one in each of the engine's pools."""
    return eventually(lambda: code if (code := client.get(path).status_code) != 503 else 0)


def is_away(caplog: pytest.LogCaptureFixture, client: FlaskClient, method: str, path: str) -> None:
    caplog.clear()
    response = client.open(path, method=method, data={"quantity": 1} if method == "POST" else None)
    lost = "background.database.dialects.sqlite_files"  # another line reports the lost file once
    said = [record for record in caplog.records if record.levelno >= logging.WARNING and record.name != lost]
    assert response.status_code == 503, (path, response.text)
    assert int(response.headers["Retry-After"]) >= 1
    assert [(record.name, record.exc_info) for record in said] == [("background.monitoring.unavailable", None)], (
        path,
        caplog.text,
    )
    assert "\n" not in said[0].getMessage()
    if path in API:
        assert response.json["error"] == "Service Unavailable"
    else:
        assert "does not answer at the moment" in response.text

"""Probes of the shop: they need no login, and they know the shop's migrations."""

from collections.abc import Callable

from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine
from sqlalchemy import text as sql
from support.databases import on_sqlite
from support.fleet import statements

from models import User


def failed(app: Flask) -> list[str]:
    """Return the names of the checks that are not ok. The status agrees with them."""
    response = app.test_client().get("/health/ready")
    names = [name for name, check in response.json["checks"].items() if not check["ok"]]
    assert response.status_code == (503 if names else 200)
    return names


@on_sqlite
def test_a_probe_needs_no_login_and_leaves_session_and_cookies_alone(
    app: Flask, client: FlaskClient, make_user: Callable[..., User], login: Callable[..., None], engine: Engine
) -> None:
    app.config["WTF_CSRF_ENABLED"] = True
    assert "Set-Cookie" not in client.get("/health/ready").headers
    app.config["WTF_CSRF_ENABLED"] = False
    login(client, make_user())
    for path in ("/health/live", "/health/ready"):
        with statements(engine) as asked:
            response = client.get(path)
        assert response.status_code == 200
        assert "Set-Cookie" not in response.headers
        assert asked == []
        assert client.post(path).status_code == 405


def test_ready_asks_again_for_migrations_that_were_behind_and_believes_for_a_while_that_they_are_at_head(
    app: Flask, engine: Engine
) -> None:
    def at(revision: str) -> None:
        with engine.begin() as connection:
            connection.execute(sql("UPDATE alembic_version SET version_num = :at"), {"at": revision})

    with engine.connect() as connection:
        head = connection.scalar(sql("SELECT version_num FROM alembic_version"))
    at("0001")
    assert failed(app) == ["migrations"]
    at(head)
    assert failed(app) == []
    with statements(engine) as asked:
        assert failed(app) == []
    assert asked == []


@on_sqlite
def test_a_scrape_needs_no_login_and_leaves_session_and_cookies_alone(
    client: FlaskClient, make_user: Callable[..., User], login: Callable[..., None]
) -> None:
    login(client, make_user())
    response = client.get("/metrics")
    assert response.headers["Cache-Control"] == "no-store"
    assert "Set-Cookie" not in response.headers
    assert client.post("/metrics").status_code == 405

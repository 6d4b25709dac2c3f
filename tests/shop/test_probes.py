"""Probes of the shop: they need no login, and they know the shop's migrations."""

from collections.abc import Callable
from pathlib import Path

from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, make_url
from sqlalchemy import text as sql
from support.databases import on_sqlite
from support.fleet import Hourly, statements, stop
from support.shop import make_shop

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


def test_ready_checks_pending_migrations_each_time_and_finished_migrations_only_now_and_then(
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


def test_a_database_without_a_schema_is_not_ready(empty_database_url: str) -> None:
    if "sqlite" in empty_database_url:
        Path(make_url(empty_database_url).database or "").touch()
    app = make_shop(empty_database_url, Hourly)
    assert failed(app) == ["migrations", "workers"]
    stop(app)


def test_a_probe_makes_no_missing_database_file(tmp_path: Path) -> None:
    app = make_shop(f"sqlite:///{tmp_path}/none.sqlite")
    assert failed(app) == ["database", "migrations", "workers"]
    assert app.test_client().get("/metrics").status_code == 200
    assert list(tmp_path.iterdir()) == []
    stop(app)

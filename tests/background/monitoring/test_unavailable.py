"""Pages while the database is away: 503, Retry-After and one line in the log. Afterwards they work again."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from support.databases import text
from support.fleet import db, make_tables
from support.servers import PostgreSQL, moved, stopped

from background import BackgroundWorkerManager
from background.dashboard import dashboard
from background.monitoring.unavailable import unavailable

Away = Callable[[], Any]

DASHBOARD = ("/workers/", "/workers/timeline", "/workers/instances", "/workers/messages", "/workers/messages/1")


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    server = PostgreSQL(make_tables)
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


def test_a_host_application_keeps_its_own_error_page(
    database: tuple[str, Away], tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    url, away = database
    apps = [host(url, tmp_path_factory.mktemp("host"), own_look) for own_look in (False, True)]
    for app, own_db in apps:
        assert app.test_client().get("/workers/").status_code == 200
        app.extensions["background_workers"].stop()
        with app.app_context():
            own_db.engine.dispose()
    with away():
        for (app, _), said in zip(apps, ("does not answer", "the host's own: 503"), strict=True):
            for path in DASHBOARD:
                caplog.clear()
                response = app.test_client().get(path)
                assert (response.status_code, int(response.headers["Retry-After"]) >= 1) == (503, True)
                assert said in response.text
                names = [
                    record.name
                    for record in caplog.records
                    if record.name != "background.database.dialects.sqlite_files"
                ]
                assert names == ["background.monitoring.unavailable"], caplog.text
    for app, own_db in apps:
        app.extensions["background_workers"].stop()
        with app.app_context():
            own_db.engine.dispose()


def host(url: str, folder: Path, own_look: bool) -> tuple[Flask, SQLAlchemy]:
    app, own_db = Flask("host", root_path=str(folder)), SQLAlchemy()
    app.config["SQLALCHEMY_DATABASE_URI"] = url.replace("postgresql:", "postgresql+psycopg:")
    own_db.init_app(app)
    BackgroundWorkerManager(app, own_db)
    app.register_blueprint(dashboard(lambda: None))
    if own_look:

        @app.errorhandler(503)
        def sorry(error: Any) -> Any:
            response = error.get_response()
            response.data = f"the host's own: {error.code}"
            return response

    return app, own_db


def test_an_error_that_the_database_reports_stays_an_error(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    app.testing = False
    app.add_url_rule("/wrong", view_func=lambda: str(db.session.execute(db.text("SELECT 1 FROM nowhere"))))
    response = app.test_client().get("/wrong")
    assert response.status_code == 500
    assert "Retry-After" not in response.headers
    assert "Traceback" in caplog.text


def test_an_exhausted_pool_counts_as_a_database_that_is_away(app: Flask) -> None:
    def use_up() -> str:
        raise PoolTimeout("QueuePool limit of size 5 overflow 10 reached")

    app.register_error_handler(SQLAlchemyError, unavailable)
    app.add_url_rule("/full", view_func=use_up)
    assert app.test_client().get("/full").status_code == 503


def test_a_button_that_a_locked_table_refuses_does_not_count_as_an_outage(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'locked.sqlite'}", connect_args={"timeout": 0})
    with engine.connect() as one, engine.connect() as other:
        one.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError) as raised:
            other.exec_driver_sql("BEGIN IMMEDIATE")
    engine.dispose()
    with pytest.raises(OperationalError, match="database is locked"):
        unavailable(raised.value)

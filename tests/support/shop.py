"""Helpers and fixtures of the tests that use the application itself: its schema and its users."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import svcs
from flask import Flask
from flask.testing import FlaskClient
from jinja2 import FileSystemBytecodeCache
from passlib.hash import argon2
from sqlalchemy import URL, Engine
from support.databases import administer, close, dispose, freeze, text
from support.fleet import QUICK

from app import create_app
from background import BackgroundWorkerManager
from background.worker import AnyWorker
from mail import Mailer
from migrations import schema
from models import User, db

PASSWORD = "correct horse battery staple"
QUICK_HASHES = {"argon2__memory_cost": 8, "argon2__rounds": 1, "argon2__parallelism": 1}  # they guard nothing
PASSWORD_HASH = argon2.using(memory_cost=8, rounds=1, parallelism=1).hash(PASSWORD)

_numbers = count(1)


def has_password(user: User, password: str) -> bool:
    return user.password is not None and argon2.verify(password, user.password)


def settings(database_url: str, **more: Any) -> dict[str, Any]:
    return {
        "DATABASE_URL": database_url,
        "TESTING": True,
        "WTF_CSRF_ENABLED": False,
        "SECRET_KEY": "test",
        "RELEASE": "tested",
        "SECURITY_PASSWORD_HASH_PASSLIB_OPTIONS": QUICK_HASHES,
        **more,
    }


def make_shop(database_url: str, *workers: AnyWorker, **config: Any) -> Flask:
    """Return the shop with `workers` only, and with short heartbeats."""
    app = create_app(settings(database_url, **QUICK | config))
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    for worker in (*manager.workers.values(), *manager.topics.values()):
        manager.remove(worker.name)
    for worker in workers:
        manager.add(worker)
    return app


def migrate(database_url: str) -> None:
    """Give the database the shop's schema."""
    app = create_app(settings(database_url))
    with app.app_context():
        schema.upgrade()
        dispose()


# -- fixtures: a conftest.py, or a file of tests, imports the ones that it needs ----------------------


@pytest.fixture(scope="session")
def template_postgresql(postgresql_server: URL) -> str:
    """Give the name of a database with the shop's schema. Each test gets a copy."""
    name = f"migrated_{next(_numbers)}"  # each folder of tests that imports this fixture has its own
    administer(postgresql_server, f"CREATE DATABASE {name}")
    migrate(text(postgresql_server.set(database=name)))
    freeze()
    return name


@pytest.fixture(scope="session")
def template_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("migrated") / "migrated.sqlite"
    migrate(f"sqlite:///{path}")
    freeze()
    return path


@pytest.fixture(scope="session")
def compiled_templates(tmp_path_factory: pytest.TempPathFactory) -> FileSystemBytecodeCache:
    """Give a cache of templates that the applications of all tests share."""
    return FileSystemBytecodeCache(str(tmp_path_factory.mktemp("templates")))


@pytest.fixture
def app(database_url: str, compiled_templates: FileSystemBytecodeCache) -> Iterator[Flask]:
    app = create_app(settings(database_url))
    app.jinja_env.bytecode_cache = compiled_templates
    yield app
    close(app)


@pytest.fixture
def engine(app: Flask) -> Iterator[Engine]:
    with app.app_context():
        yield db.engine


@pytest.fixture
def make_user(app: Flask) -> Callable[..., User]:
    """Make and commit a user with the given columns. Return the loaded user, usable outside any session."""

    def make(**columns: Any) -> User:
        number = next(_numbers)
        columns = {
            "email": f"reader{number}@example.com",
            "name": f"Reader {number}",
            "password": PASSWORD_HASH,
            "created_at": datetime.now(UTC),
            "confirmed_at": datetime.now(UTC),
            **columns,
        }
        with app.app_context():
            user = User(**columns)
            db.session.add(user)
            db.session.commit()
            db.session.refresh(user)
            db.session.expunge(user)
        return user

    return make


@pytest.fixture
def outbox(app: Flask, tmp_path: Path) -> Path:
    """Give the folder of the app's mails, instead of the instance folder."""
    folder = tmp_path / "outbox"
    svcs.flask.register_factory(app, Mailer, lambda: Mailer(None, "shop@example.com", folder))
    return folder


@pytest.fixture
def login() -> Callable[[FlaskClient, User], None]:
    """Log the user in through the shop's own form, with the tests' password."""

    def log_in(client: FlaskClient, user: User, password: str = PASSWORD) -> None:
        response = client.post("/login", data={"email": user.email, "password": password})
        assert response.status_code == 302, response.text

    return log_in

"""Databases for the tests, and the end of the applications that use them."""

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flask import Flask, current_app
from sqlalchemy import URL, create_engine
from sqlalchemy.pool import NullPool
from support import cached_url_rules as rules  # noqa: F401 - makes applications quickly

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


def freeze() -> None:
    """Exclude the present objects from collection. Without this each `gc.collect` takes a quarter of a second."""
    gc.collect()
    gc.freeze()


def dispose() -> None:
    """Close every connection of the application in whose context this is called, also the one that its session has."""
    db = current_app.extensions["sqlalchemy"]
    db.session.remove()
    for engine in db.engines.values():
        engine.dispose()


def server_folder() -> Path:
    """For the files of a server: in memory, where there is plenty, as a new database for each test is much to write."""
    memory = Path("/dev/shm")
    is_plenty = memory.exists() and shutil.disk_usage(memory).free > 4 * 10**9  # a container may have 64 MB
    return Path(tempfile.mkdtemp(prefix="bookstore-postgresql-", dir=memory if is_plenty else None))


def administer(server: URL, *statements: str) -> None:
    with administration(server) as execute:
        for statement in statements:
            execute(statement)


@contextmanager
def administration(server: URL) -> Iterator[Callable[[str], object]]:
    """Execute statements on the server outside any transaction, all on one connection."""
    engine = create_engine(server, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection.exec_driver_sql


def text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def close(*apps: Flask) -> None:
    """Stop their workers and leave no connection open; one that was left warns in the test that left it."""
    for app in apps:
        app.extensions["background_workers"].stop()
        with app.app_context():
            dispose()
        for name in app.config.get("SQLALCHEMY_BINDS") or ():
            # One `db` serves all tests, and would make tables on these binds too.
            app.extensions["sqlalchemy"].metadatas.pop(name, None)
    gc.collect()

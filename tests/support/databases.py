"""Databases for the tests, and the end of the applications that use them."""

import gc

import pytest
from flask import Flask, current_app
from sqlalchemy import URL
from support import cached_url_rules as rules  # noqa: F401 - makes applications quickly
from support.processes import eventually

from background.testing.postgresql import (  # noqa: F401 - the tests import them from here
    administer,
    administration,
    server_folder,
)
from background.testing.postgresql import as_text as text  # noqa: F401

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
# For a test that takes seconds.
on_postgresql_later = pytest.mark.parametrize(
    "database_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.promise)], indirect=True
)


def reload(server: URL) -> None:
    """Have the server read its settings, and wait until it has. Each connection has them from its next statement on."""
    with administration(server) as execute:
        asked = execute("SELECT clock_timestamp()").scalar_one()
        execute("SELECT pg_reload_conf()")

    def is_done() -> bool:
        with administration(server) as execute:  # a new connection inherits the server's settings
            return bool(execute("SELECT pg_conf_load_time()").scalar_one() > asked)

    assert eventually(is_done)


def freeze() -> None:
    """Exclude the present objects from collection. Without this each `gc.collect` takes a quarter of a second."""
    gc.collect()
    gc.freeze()


def dispose() -> None:
    """Close every connection of the current application, including the connection of its session."""
    db = current_app.extensions["sqlalchemy"]
    db.session.remove()
    for engine in db.engines.values():
        engine.dispose()


def close(*apps: Flask) -> None:
    """Stop the workers of the apps and close all connections.

    A connection that stays open warns in the test that left it open.
    """
    for app in apps:
        app.extensions["background_workers"].stop()
        with app.app_context():
            dispose()
        for name in app.config.get("SQLALCHEMY_BINDS") or ():
            # One `db` serves all tests, and would make tables on these binds too.
            app.extensions["sqlalchemy"].metadatas.pop(name, None)
    gc.collect()

"""Run by Alembic (`flask db ...`, `schema.py`): one transaction of what is pending, one runner at a time."""

import warnings
from collections.abc import Callable
from typing import Any

from alembic import context
from alembic.util import CommandError
from flask import current_app
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from background import DatabaseNotReady, include_object, render_item
from migrations.schema import LOCK_SECONDS, refuse_unreleased, why_not

database = current_app.extensions["sqlalchemy"]
# What `schema.py` does in the same transaction, once the schema is there.
finish: Callable[[Connection], None] | None = context.config.attributes.get("finish")


def configure(**arguments: Any) -> None:
    hooks = {"include_object": include_object, "render_item": render_item}
    context.configure(target_metadata=database.metadata, render_as_batch=True, **hooks, **arguments)


def migrate(connection: Connection) -> None:
    """The caller's transaction holds a lock: a second runner waits, and then finds nothing to do."""
    configure(connection=connection)
    # Of SQLite's indexes on expressions, which the tests compare in another way.
    warnings.filterwarnings("ignore", ".*expression-based index")
    try:
        context.run_migrations()
    except CommandError:  # such as for a revision that is in no file
        refuse_unreleased(database.engine.url, context.get_context().get_current_revision())
        raise
    if finish:
        finish(connection)


def run_on_postgresql(connection: Connection) -> None:
    with connection.begin():
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('alembic_version'))")
        migrate(connection)


def run_on_sqlite(connection: Connection) -> None:
    """The driver begins no transaction for DDL; and to rebuild a table must not take its children along."""
    connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
    connection.commit()
    with connection.begin():
        _take_write_lock(connection)
        migrate(connection)
        if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(5):
            raise RuntimeError(f"The migrations broke foreign keys, so nothing was changed: {broken}")
    connection.exec_driver_sql("PRAGMA foreign_keys = ON")
    connection.commit()


def _take_write_lock(connection: Connection) -> None:
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {LOCK_SECONDS * 1000:.0f}")
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    except DBAPIError as error:
        raise DatabaseNotReady(why_not(database.engine.url, error)) from None


def connected() -> Connection:
    try:
        return database.engine.connect()
    except DBAPIError as error:
        raise DatabaseNotReady(why_not(database.engine.url, error)) from None


if context.is_offline_mode():
    configure(url=database.engine.url, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    with connected() as connection:
        {"postgresql": run_on_postgresql, "sqlite": run_on_sqlite}[connection.dialect.name](connection)

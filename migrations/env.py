"""Runs all pending migrations in one transaction, for Alembic (`flask db ...`, `schema.py`), one process at a time."""

import warnings
from collections.abc import Callable
from typing import Any

import click
from alembic import context
from alembic.util import CommandError
from flask import current_app
from sqlalchemy import Connection

from background import include_object, render_item
from migrations.schema import LOCK_SECONDS, reaching, refuse_unreleased, writing

database = current_app.extensions["sqlalchemy"]
# `schema.py` calls this in the same transaction, after the migrations.
finish: Callable[[Connection], None] | None = context.config.attributes.get("finish")


def skip_empty(_context: Any, _revision: Any, scripts: list[Any]) -> None:
    """Make no file if `flask db migrate` finds no change of the models. `flask db revision` makes an empty file."""
    if getattr(context.config.cmd_opts, "autogenerate", False) and scripts[0].upgrade_ops.is_empty():
        scripts.clear()
        click.echo("The database has all that the models have, so no migration is made.")


def configure(**arguments: Any) -> None:
    hooks = {
        "include_object": include_object,
        "render_item": render_item,
        "process_revision_directives": skip_empty,
    }
    context.configure(target_metadata=database.metadata, render_as_batch=True, **hooks, **arguments)


def migrate(connection: Connection) -> None:
    """Run the pending migrations.

    Concurrency: another process may migrate the same database. The caller's transaction holds a lock, so the second
    process waits, and then finds nothing to do.
    """
    configure(connection=connection)
    # Alembic cannot compare SQLite's indexes on expressions. The tests compare them in another way.
    warnings.filterwarnings("ignore", ".*expression-based index")
    try:
        context.run_migrations()
    except CommandError:  # for example for a revision without a file
        refuse_unreleased(database.engine.url, context.get_context().get_current_revision())
        raise
    if finish:
        finish(connection)


def run_on_postgresql(connection: Connection) -> None:
    with connection.begin():
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('alembic_version'))")
        migrate(connection)


def run_on_sqlite(connection: Connection) -> None:
    """Migrate in a transaction that this function begins, as the driver begins none for DDL.

    Foreign keys are off meanwhile, because rebuilding a table must not delete the rows that refer to it.
    """
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
    with reaching(database.engine.url):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def connected() -> Connection:
    with reaching(database.engine.url):
        return database.engine.connect()


if context.is_offline_mode():
    configure(url=database.engine.url, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    with writing(database.engine.url), connected() as connection:
        {"postgresql": run_on_postgresql, "sqlite": run_on_sqlite}[connection.dialect.name](connection)

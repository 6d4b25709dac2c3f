"""Finds models that the database lacks: a changed table without a migration, or a migration that did not run."""

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Connection, Engine, MetaData, inspect

from ..host.logs import quieten

_MOST = 10


def unmigrated(app: Flask, db: SQLAlchemy) -> list[str] | None:
    """Return one sentence for each thing that the models have and the database lacks, at most ten.

    None if they cannot be compared: Alembic is not installed, or the application translates schemas. Things that only
    the database has are ignored. They may belong to another application, or to a newer release.
    """
    if find_spec("alembic") is None:
        return None
    remedy = (
        "make a migration with `flask db migrate` and run it with `flask db upgrade`"
        if "migrate" in app.extensions
        else "make it with a migration, or with `db.create_all()` in an empty database"
    )
    with app.app_context():
        if any("schema_translate_map" in engine.get_execution_options() for engine in db.engines.values()):
            return None
        found = [what for key, engine in db.engines.items() for what in _lacking(engine, db.metadatas.get(key))]
    said = [f"The models have {what}, which the database lacks: {remedy}." for what in found[:_MOST]]
    return said + (
        [f"The models have {len(found) - _MOST} more that the database lacks."] if len(found) > _MOST else []
    )


def _lacking(engine: Engine, models: MetaData | None) -> Iterator[str]:
    quieten("alembic")
    from alembic.autogenerate import compare_metadata  # late: only this command needs it
    from alembic.migration import MigrationContext

    if models is None:
        return
    with engine.connect() as connection, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*expression-based index")  # such an index of SQLite cannot be compared
        schemas = any(table.schema for table in models.tables.values())
        options = {"include_object": _is_ours, "include_schemas": schemas}
        context = MigrationContext.configure(connection, opts=options)
        found = compare_metadata(context, models)
        differences = chain.from_iterable(each if isinstance(each, list) else [each] for each in found)
        yield from (_said(each) for each in differences if not (schemas and _is_there(connection, each)))


def _is_ours(_thing: Any, _name: str | None, _kind: str, is_reflected: bool, model: Any) -> bool:
    return not (is_reflected and model is None)


def _is_there(connection: Connection, difference: Any) -> bool:
    """Return whether an added table exists: Alembic misses one whose model names the default schema."""
    kind, thing = difference[:2]
    return kind == "add_table" and inspect(connection).has_table(thing.name, schema=thing.schema)


def _said(difference: Any) -> str:
    """Describe one difference of Alembic's, such as ("add_column", schema, table, column)."""
    kind, *what = difference
    match kind:
        case "add_table":
            return f"the table {what[0].name}"
        case "add_column":
            return f"the column {what[1]}.{what[2].name}"
        case "add_index":
            return f"the index {what[0].name} of {what[0].table.name}"
        case "add_constraint" | "add_fk":
            return f"a constraint of {what[0].table.name} ({what[0].name or 'without a name'})"
        case "modify_type":
            return f"the column {what[1]}.{what[2]} as {what[5]}"
        case "modify_nullable":
            return f"the column {what[1]}.{what[2]} as {'NULL' if what[5] else 'NOT NULL'}"
        case _:
            return f"a difference that Alembic calls {kind}"

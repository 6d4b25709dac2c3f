"""Finds models that the database lacks: a changed table without a migration, or a migration that did not run."""

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Connection, Engine, MetaData, inspect

from ..database.migrations import STEPS
from ..database.tables import metadata
from ..host.logs import quieten

_MOST = 20


def unmigrated(app: Flask, db: SQLAlchemy) -> list[str] | None:
    """Return one sentence for each thing that the models have and the database lacks, at most ten.

    None if they cannot be compared: Alembic is not installed, or the application translates schemas. Things that only
    the database has are ignored. They may belong to another application, or to a newer release.
    """
    if find_spec("alembic") is None:
        return None
    with app.app_context():
        if any("schema_translate_map" in engine.get_execution_options() for engine in db.engines.values()):
            return None
        found = [thing for key, engine in db.engines.items() for thing in _lacking(engine, db.metadatas.get(key))]
    sentences = [
        f"The models have {thing}, which the database lacks: {_remedy(app, table, thing)}."
        for table, thing in found[:_MOST]
    ]
    if len(found) > _MOST:
        sentences.append(f"The models have {len(found) - _MOST} more that the database lacks.")
    return sentences


def _remedy(app: Flask, table: str, thing: str) -> str:
    if "migrate" not in app.extensions:
        if thing == f"the table {table}":
            return "make it with `db.create_all()`, as this application has no Flask-Migrate"
        return "make it in SQL, as this application has no Flask-Migrate and `db.create_all()` makes whole tables only"
    if table in metadata.tables:
        call = f"`background.migrate_to(op, version={len(STEPS)})`"
        made = "or that makes it by hand if the tables have that version"
        return f"make a migration with `flask db revision` that calls {call}, {made}"
    return "make a migration with `flask db migrate` and run it with `flask db upgrade`"


def _lacking(engine: Engine, models: MetaData | None) -> Iterator[tuple[str, str]]:
    """Yield the table and the words for each thing that the database lacks."""
    quieten("alembic")
    from alembic.autogenerate import compare_metadata  # imported here, as only this command needs Alembic
    from alembic.migration import MigrationContext

    if models is None:
        return
    with engine.connect() as connection, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*expression-based index")  # Alembic cannot compare such an index on SQLite
        schemas = any(table.schema for table in models.tables.values())
        options = {"include_object": _is_ours, "include_schemas": schemas}
        context = MigrationContext.configure(connection, opts=options)
        found = compare_metadata(context, models)
        differences = list(chain.from_iterable(each if isinstance(each, list) else [each] for each in found))
        new = {each[1].fullname for each in differences if each[0] == "add_table"}
        for each in differences:
            is_of_new = each[0] == "add_index" and each[1].table.fullname in new  # it comes with its table
            if not (is_of_new or (schemas and _exists(connection, each))):
                yield _described(each)


def _is_ours(_thing: Any, _name: str | None, _kind: str, is_reflected: bool, model: Any) -> bool:
    return not (is_reflected and model is None)


def _exists(connection: Connection, difference: Any) -> bool:
    """Return whether an added table exists. Alembic misses a table whose model names the default schema."""
    kind, thing = difference[:2]
    return kind == "add_table" and inspect(connection).has_table(thing.name, schema=thing.schema)


def _described(difference: Any) -> tuple[str, str]:
    """Describe one difference of Alembic's, such as ("add_column", schema, table, column)."""
    kind, *parts = difference
    match kind:
        case "add_table":
            return parts[0].name, f"the table {parts[0].name}"
        case "add_column":
            return parts[1], f"the column {parts[1]}.{parts[2].name}"
        case "add_index":
            return parts[0].table.name, f"the index {parts[0].name} of {parts[0].table.name}"
        case "add_constraint" | "add_fk":
            return parts[0].table.name, f"a constraint of {parts[0].table.name} ({parts[0].name or 'without a name'})"
        case "modify_type":
            return parts[1], f"the column {parts[1]}.{parts[2]} as {parts[5]}"
        case "modify_nullable":
            return parts[1], f"the column {parts[1]}.{parts[2]} as {'NULL' if parts[5] else 'NOT NULL'}"
        case _:
            return "", f"a difference that Alembic calls {kind}"

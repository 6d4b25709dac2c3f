"""The versions of the engine's tables, and the steps between them, for the migrations of an application.

To change the tables, change tables.py and append a Step to STEPS. A step of a release never changes. A new database
gets the newest tables. The steps lead from there to an older version.
SQLite rebuilds a table where it cannot alter it: see `op.batch_alter_table`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Inspector,
    Integer,
    MetaData,
    String,
    Text,
    inspect,
    literal_column,
    text,
)
from sqlalchemy.types import TypeEngine

from ..errors import DatabaseNotReady, InvalidMigration
from .clock import UtcDateTime
from .tables import LONGEST_USER, AnyText, Whole, metadata


def migrate_to(op: Any, version: int, schema: str | None = None) -> None:
    """Bring the engine's tables from their version to `version`. 0 is a database without them.

    `op` is Alembic's. By default, `schema` is that of the application's metadata. Nothing happens if the tables
    have that version. Raises InvalidMigration.
    """
    if type(version) is not int or not 0 <= version <= len(STEPS):
        raise InvalidMigration(
            f"The engine's tables have no version {version!r}; expected a whole number from 0 (no tables) to "
            f"{len(STEPS)}. A later version needs a newer release of the engine."
        )
    context = op.get_context()
    schema = schema or getattr(context.opts.get("target_metadata"), "schema", None)
    found = _offline_version(context) if context.as_sql else _version(op.get_bind(), schema)
    for step in STEPS[found:version]:
        step.up(op, schema)
    for step in reversed(STEPS[version:found]):
        step.down(op, schema)
    if context.as_sql:
        context.opts[_OFFLINE] = version


def _version(connection: Any, schema: str | None) -> int:
    """Return the version of the tables, as their columns show it.

    The columns are also there after `db.create_all()`, which would write no number into a row or a comment.
    """
    schema, inspector = _translated(connection, schema), inspect(connection)
    found = _steps_done(inspector, schema)
    if not found and (tables := [name for name in metadata.tables if inspector.has_table(name, schema)]):
        raise InvalidMigration(
            f"The database has {', '.join(tables)}, but not all parts of version 1 of the engine's tables; expected "
            "all or none. Finish with the release that made these tables, or drop them."
        )
    return found


def _steps_done(inspector: Inspector, schema: str | None) -> int:
    return next((below for below, step in enumerate(STEPS) if not step.is_done(inspector, schema)), len(STEPS))


def refuse_old_tables(connection: Connection, schema: str | None) -> None:
    """Raise DatabaseNotReady if the tables are of an older version. A database without them is no such case.

    `schema` is the schema of the tables after translation.
    """
    if 0 < (found := _steps_done(inspect(connection), schema)) < len(STEPS):
        raise DatabaseNotReady(
            f"The engine's tables are of version {found}; expected version {len(STEPS)}: run `flask db upgrade`, with "
            f"a migration that calls `background.migrate_to(op, version={len(STEPS)})`."
        )


def _translated(connection: Any, schema: str | None) -> str | None:
    """Return the schema that `schema_translate_map` gives. Alembic ignores this map when it alters a table."""
    translations: dict[str | None, str] = connection.get_execution_options().get("schema_translate_map", {})
    return translations.get(schema, schema)


def _altered(op: Any, schema: str | None) -> str | None:
    """Return the schema to name in an ALTER TABLE. Offline, there is no connection with a translation."""
    return schema if op.get_context().as_sql else _translated(op.get_bind(), schema)


_OFFLINE = "version_of_the_engines_tables"


def _offline_version(context: Any) -> int:
    """Return the version that the SQL so far leads to. Only a start at base is known to be without tables."""
    if start := context.get_current_heads():
        raise InvalidMigration(
            f"The version of the engine's tables cannot be read offline (--sql) from revision {', '.join(start)}; "
            "expected a start at base. Run this migration without --sql."
        )
    return int(context.opts.get(_OFFLINE, 0))


def include_object(thing: Any, name: str | None, kind: str, *_: Any) -> bool:
    """Return False for the engine's tables. Alembic's autogenerate then leaves them alone."""
    return not (kind == "table" and name in metadata.tables)


def render_item(kind: str, item: Any, autogenerate: Any) -> str | Literal[False]:
    """Write UtcDateTime with its import into a migration that Alembic generates."""
    if kind == "type" and isinstance(item, UtcDateTime):
        autogenerate.imports.add("from background import UtcDateTime")
        return "UtcDateTime()"
    return False


@dataclass(frozen=True)
class Step:
    """The way from one version of the tables to the next and back. `is_done` looks for the newer version.

    Each function is given the schema of the tables. A constraint without a name gets the name that the application's
    naming convention gives it.
    """

    up: Callable[[Any, str | None], None]
    down: Callable[[Any, str | None], None]
    is_done: Callable[[Inspector, str | None], bool]


def _create(op: Any, schema: str | None) -> None:
    """Make the newest tables, as `db.create_all()` does, and go back from there to version 1."""
    context = op.get_context()
    names = getattr(context.opts.get("target_metadata"), "naming_convention", None)
    newest = MetaData(naming_convention=names)
    for table in metadata.sorted_tables:
        context.impl.create_table(table.to_metadata(newest, schema=schema))  # type: ignore[arg-type]
    for step in reversed(STEPS[1:]):
        step.down(op, schema)


def _drop(op: Any, schema: str | None) -> None:
    for table in reversed(metadata.sorted_tables):
        if table.name not in _NEW_TABLES:
            op.drop_table(table.name, schema=schema)


def _is_created(inspector: Inspector, schema: str | None) -> bool:
    return all(inspector.has_table(name, schema) for name in metadata.tables if name not in _NEW_TABLES)


_NEW_TABLES = {"background_topics", "background_incidents", "background_tallies", "background_chores"}
_NEW_COLUMNS: dict[str, dict[str, TypeEngine[Any]]] = {
    "background_workers": {"pending_after": UtcDateTime(), "pending_until": UtcDateTime()},
    "background_executions": {"cancelled_at": UtcDateTime(), "cancelled_by": String(LONGEST_USER), "cursor": Text()},
    "background_instances": {"cancels": Text()},
    "background_messages": {"postponed": Whole(), "postponed_because": AnyText()},
}
_NEW_INDEX = ("ix_background_messages_tried", "background_messages")
_FINISHED = ("ix_background_executions_finished", "background_executions")


def _add_cancelling(op: Any, schema: str | None) -> None:
    """Add the parts for cancelled, continued and retried runs, paused topics, postponed messages and incidents."""
    for table, columns in _NEW_COLUMNS.items():
        for name, type in columns.items():
            op.add_column(table, Column(name, type), schema=_altered(op, schema))
    op.create_table(
        "background_topics",
        Column("topic", String(100), primary_key=True),
        Column("paused_at", UtcDateTime(), nullable=False),
        schema=schema,
    )
    tried = text("state = 'waiting' AND (attempt > 0 OR postponed > 0)")
    op.create_index(
        *_NEW_INDEX, ["topic", "id", "attempt", "postponed"], schema=schema, postgresql_where=tried, sqlite_where=tried
    )
    _add_incidents(op, schema)
    _add_tallies(op, schema)


def _add_incidents(op: Any, schema: str | None) -> None:
    op.create_table(
        "background_incidents",
        Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
        Column("kind", String(20), nullable=False),
        Column("subject", String(255), nullable=False),
        Column("opened_at", UtcDateTime(), nullable=False),
        Column("ended_at", UtcDateTime()),
        Column("detail", Text(), nullable=False),
        schema=schema,
    )
    is_open: ColumnElement[bool] = literal_column("ended_at IS NULL")
    indexes: dict[str, tuple[list[str], dict[str, Any]]] = {
        "open": (["kind", "subject"], {"postgresql_where": is_open, "sqlite_where": is_open}),
        "begun": (["kind", "subject", "opened_at"], {}),
    }
    for name, (keys, where) in indexes.items():
        index = f"ix_background_incidents_{name}"
        op.create_index(index, "background_incidents", keys, unique=True, schema=schema, **where)


def _add_tallies(op: Any, schema: str | None) -> None:
    is_finished = text("finished_at IS NOT NULL")
    where: dict[str, Any] = {"postgresql_where": is_finished, "sqlite_where": is_finished}
    op.create_index(*_FINISHED, ["finished_at"], schema=schema, **where)
    op.create_table(
        "background_tallies",
        Column("seconds", Integer(), primary_key=True),
        Column("start", UtcDateTime(), primary_key=True),
        Column("kind", String(10), primary_key=True),
        Column("name", String(200), primary_key=True),
        Column("counts", Text(), nullable=False),
        schema=schema,
    )
    op.create_table(
        "background_chores",
        Column("name", String(20), primary_key=True),
        Column("until", UtcDateTime(), nullable=False),
        schema=schema,
    )


def _remove_cancelling(op: Any, schema: str | None) -> None:
    for index in (_NEW_INDEX, _FINISHED):
        op.drop_index(*index, schema=schema)
    for table in _NEW_TABLES:
        op.drop_table(table, schema=schema)
    for table, columns in _NEW_COLUMNS.items():
        for name in columns:
            op.drop_column(table, name, schema=_altered(op, schema))


def _has_cancelling(inspector: Inspector, schema: str | None) -> bool:
    return all(inspector.has_table(name, schema) for name in _NEW_TABLES) and all(
        columns.keys() <= {column["name"] for column in inspector.get_columns(table, schema)}
        for table, columns in _NEW_COLUMNS.items()
    )


STEPS = (
    Step(_create, _drop, _is_created),
    Step(_add_cancelling, _remove_cancelling, _has_cancelling),
)
"""The step to version 1, then the step to version 2, and so on."""

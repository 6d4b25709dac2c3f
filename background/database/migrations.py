"""The versions of the engine's tables, and the steps between them, for the migrations of an application.

To change the tables, change tables.py and append a Step to STEPS. A step of a release never changes.
SQLite rebuilds a table where it cannot alter it: see `op.batch_alter_table`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Inspector, Integer, String, Text, inspect, text

from ..errors import InvalidMigration
from .clock import UtcDateTime
from .tables import metadata


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
    schema = connection.get_execution_options().get("schema_translate_map", {}).get(schema, schema)
    inspector = inspect(connection)
    found = next((below for below, step in enumerate(STEPS) if not step.is_done(inspector, schema)), len(STEPS))
    if not found and (tables := [name for name in metadata.tables if inspector.has_table(name, schema)]):
        raise InvalidMigration(
            f"The database has {', '.join(tables)}, but not all parts of version 1 of the engine's tables; expected "
            "all or none. Finish with the release that made these tables, or drop them."
        )
    return found


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

    Each function is given the schema of the tables. Constraints have no names here, so an application's naming
    convention holds for them as in `db.create_all()`.
    """

    up: Callable[[Any, str | None], None]
    down: Callable[[Any, str | None], None]
    is_done: Callable[[Inspector, str | None], bool]


_Id = BigInteger().with_variant(Integer, "sqlite")


def _where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": text(condition), "sqlite_where": text(condition)}


def _create(op: Any, schema: str | None) -> None:
    _create_workers(op, schema)
    _create_executions(op, schema)
    _create_messages(op, schema)
    _create_instances(op, schema)


def _create_workers(op: Any, schema: str | None) -> None:
    op.create_table(
        "background_workers",
        Column("name", String(200), primary_key=True),
        Column("mark", UtcDateTime),
        Column("mark_ahead", UtcDateTime),
        Column("previous_mark", UtcDateTime),
        Column("token", BigInteger, nullable=False, server_default="0"),
        Column("running", BigInteger),
        Column("claim", String(32)),
        Column("claim_tick", UtcDateTime),
        Column("claim_attempt", Integer),
        Column("claim_trigger", String(10)),
        Column("claim_instance", String(32)),
        Column("claim_instance_name", String(255)),
        Column("claim_at", UtcDateTime),
        Column("pending_tick", UtcDateTime),
        Column("pending_attempt", Integer),
        Column("pending_trigger", String(10)),
        Column("schedule", String(200), nullable=False),
        Column("declared", String(200), nullable=False),
        Column("declared_by", String(32)),
        Column("scheduled_at", UtcDateTime, nullable=False),
        Column("paused_at", UtcDateTime),
        schema=schema,
    )


def _create_executions(op: Any, schema: str | None) -> None:
    executions = "background_executions"
    op.create_table(
        executions,
        Column("id", _Id, primary_key=True),
        Column("worker", String(200), nullable=False),
        Column("tick", UtcDateTime, nullable=False),
        Column("through", UtcDateTime),
        Column("trigger", String(10), nullable=False),
        Column("state", String(12), nullable=False),
        Column("attempt", Integer),
        Column("token", BigInteger),
        Column("claim", String(32)),
        Column("instance", String(32)),
        Column("instance_name", String(255)),
        Column("started_at", UtcDateTime),
        Column("finished_at", UtcDateTime),
        Column("progress_done", Float),
        Column("progress_total", Float),
        Column("reason", Text),
        Column("log", Text),
        schema=schema,
    )
    op.create_index("ix_background_executions_worker_tick", executions, ["worker", "tick"], schema=schema)
    op.create_index("ix_background_executions_token", executions, ["worker", "token"], unique=True, schema=schema)
    op.create_index(
        "ix_background_executions_running", executions, ["worker"], schema=schema, **_where("state = 'running'")
    )
    op.create_table(
        "background_totals",
        Column("worker", String(200), primary_key=True),
        Column("kind", String(10), primary_key=True),
        Column("label", String(12), primary_key=True),
        Column("count", BigInteger, nullable=False),
        Column("seconds", Float, nullable=False),
        Column("latest_at", UtcDateTime, nullable=False),
        schema=schema,
    )


def _create_messages(op: Any, schema: str | None) -> None:
    messages = "background_messages"
    op.create_table(
        messages,
        Column("id", _Id, primary_key=True),
        Column("topic", String(100), nullable=False),
        Column("key", String(200)),
        Column("payload", Text, nullable=False),
        Column("state", String(10), nullable=False, server_default="waiting"),
        Column("enqueued_at", UtcDateTime, nullable=False),
        Column("due_at", UtcDateTime, nullable=False),
        Column("attempt", Integer, nullable=False, server_default="0"),
        Column("token", BigInteger, nullable=False, server_default="0"),
        Column("batch", String(32)),
        Column("instance", String(32)),
        Column("instance_name", String(255)),
        Column("claimed_at", UtcDateTime),
        Column("finished_at", UtcDateTime),
        schema=schema,
    )
    for name, columns, condition in (
        ("key", ["topic", "key"], "key IS NOT NULL"),
        ("due", ["topic", "due_at", "id"], "state = 'waiting'"),
        ("running", ["instance"], "state = 'running'"),
        ("dead", ["topic", "id"], "state = 'dead'"),
        ("finished", ["finished_at"], "finished_at IS NOT NULL"),
    ):
        is_unique = name == "key"
        op.create_index(
            f"ix_{messages}_{name}", messages, columns, unique=is_unique, schema=schema, **_where(condition)
        )
    parent = ForeignKey(f"{schema}.{messages}.id" if schema else f"{messages}.id", ondelete="CASCADE")
    op.create_table(
        "background_message_errors",
        Column("id", _Id, primary_key=True),
        Column("message", _Id, parent, nullable=False, index=True),
        Column("attempt", Integer, nullable=False),
        Column("at", UtcDateTime, nullable=False),
        Column("instance_name", String(255)),
        Column("error", Text, nullable=False),
        schema=schema,
    )


def _create_instances(op: Any, schema: str | None) -> None:
    op.create_table(
        "background_instances",
        Column("id", String(32), primary_key=True),
        Column("host", String(255), nullable=False),
        Column("pid", Integer, nullable=False),
        Column("started_at", UtcDateTime, nullable=False),
        Column("heartbeat_at", UtcDateTime, nullable=False),
        Column("expires_at", UtcDateTime, nullable=False),
        Column("signed_off_at", UtcDateTime),
        Column("clock_offset", Float),
        Column("release", String(100)),
        schema=schema,
    )
    op.create_table(
        "background_locks",
        Column("name", String(200), primary_key=True),
        Column("token", BigInteger, nullable=False),
        Column("holder", String(32)),
        Column("instance", String(32)),
        Column("instance_name", String(255)),
        Column("since", UtcDateTime, nullable=False),
        schema=schema,
    )


_TABLES = (
    *("background_message_errors", "background_messages", "background_locks", "background_instances"),
    *("background_totals", "background_executions", "background_workers"),
)


def _drop(op: Any, schema: str | None) -> None:
    for table in _TABLES:
        op.drop_table(table, schema=schema)


def _is_created(inspector: Inspector, schema: str | None) -> bool:
    return all(inspector.has_table(table, schema) for table in _TABLES)


STEPS = (Step(_create, _drop, _is_created),)
"""The step to version 1, then the step to version 2, and so on."""

"""Definitions of all objects of a schema, as text to compare."""

import re

from sqlalchemy import Connection, text


def definitions(connection: Connection, schema: str | None = None) -> list[str]:
    """Return the definition of every table, column, index and constraint, as the database itself writes it."""
    if connection.dialect.name == "sqlite":
        rows = connection.execute(text(f"SELECT sql FROM {schema or 'main'}.sqlite_master WHERE sql IS NOT NULL"))
    else:
        rows = connection.execute(
            text(
                "SELECT indexdef FROM pg_indexes WHERE schemaname = :schema "
                "UNION ALL SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)"
                " FROM pg_constraint WHERE connamespace = to_regnamespace(:schema) "
                "UNION ALL SELECT concat_ws(' ', table_name, column_name, data_type, character_maximum_length,"
                " collation_name, is_nullable, column_default)"
                " FROM information_schema.columns WHERE table_schema = :schema"
            ),
            {"schema": schema or "public"},
        )
    # A table that SQLite renamed has its name in quotes.
    written = [re.sub(r'^CREATE TABLE "(\w+)"', r"CREATE TABLE \1", row[0]) for row in rows]
    parts = [re.split(r"\s*,\s*|\s*\n\s*", each) for each in written if "alembic_version" not in each]
    return sorted(" ".join(sorted(some)) for some in parts)

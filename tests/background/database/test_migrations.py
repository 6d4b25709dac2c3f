"""The engine's tables are made and changed by versions, in the migrations of any application."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Column, Integer, MetaData, String, event, inspect, text
from support.definitions import definitions
from support.fleet import wait_until

from background import BackgroundWorkerManager, InvalidMigration, migrate_to
from background.database import migrations


class Host:
    """An application with only the engine's tables, in its schema if it has one."""

    def __init__(self, url: str, folder: Path, metadata: MetaData, **options: Any) -> None:
        self.metadata = metadata
        self.db = SQLAlchemy(metadata=metadata, engine_options=options)
        app = Flask("host")
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        self.db.init_app(app)
        self.manager = BackgroundWorkerManager(app, self.db)
        with app.app_context():
            self.engine = self.db.engine
        self.schema = "shop" if metadata.schema or options else None
        if self.schema and url.startswith("sqlite"):
            event.listen(self.engine, "connect", lambda driver, _: driver.execute(f"ATTACH '{folder}/shop' AS shop"))
        elif self.schema:
            with self.engine.begin() as connection:
                connection.execute(text("CREATE SCHEMA shop"))

    @contextmanager
    def migration(self) -> Iterator[Operations]:
        with self.engine.begin() as connection:
            opts = {"target_metadata": self.metadata, "include_schemas": bool(self.metadata.schema)}
            yield Operations(MigrationContext.configure(connection, opts=opts))

    def migrate_to(self, version: Any) -> None:
        with self.migration() as op:
            migrate_to(op, version=version)

    def create_all(self) -> None:
        with self.engine.begin() as connection:
            self.metadata.create_all(connection)

    def definitions(self) -> list[str]:
        with self.engine.connect() as connection:
            return definitions(connection, self.schema)

    def columns(self, table: str) -> set[str]:
        return {column["name"] for column in inspect(self.engine).get_columns(table, self.schema)}

    def tables(self) -> set[str]:
        return set(inspect(self.engine).get_table_names(self.schema))


METADATA: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"metadata": MetaData()},
    "with its own names for constraints": lambda: {
        "metadata": MetaData(
            naming_convention={
                "ix": "index_%(table_name)s_%(column_0_N_name)s",
                "fk": "parent_%(table_name)s_%(column_0_name)s",
                "pk": "key_%(table_name)s",
            }
        )
    },
    "in a schema": lambda: {"metadata": MetaData(schema="shop")},
    "in a schema by translation": lambda: {
        "metadata": MetaData(),
        "execution_options": {"schema_translate_map": {None: "shop"}},
    },
}


@pytest.fixture
def hosts(empty_database_url: str, tmp_path: Path) -> Iterator[Callable[[str], Host]]:
    made: list[Host] = []

    def make(kind: str) -> Host:
        made.append(Host(empty_database_url, tmp_path, **METADATA[kind]()))
        return made[-1]

    yield make
    for host in made:
        host.engine.dispose()


@pytest.fixture
def host(hosts: Callable[[str], Host]) -> Host:
    return hosts("plain")


@pytest.mark.parametrize("kind", METADATA)
def test_create_all_makes_the_newest_version(hosts: Callable[[str], Host], kind: str) -> None:
    host = hosts(kind)
    host.migrate_to(len(migrations.STEPS))
    by_the_steps = host.definitions()
    assert any("background_locks" in each for each in by_the_steps)
    if "translation" not in kind:
        with host.migration() as op:
            assert compare_metadata(op.get_context(), host.metadata) == []
    host.migrate_to(0)
    assert host.tables() == set()
    host.create_all()
    assert host.definitions() == by_the_steps


@pytest.mark.parametrize("kind", METADATA)
def test_tables_of_the_requested_version_are_left_unchanged(hosts: Callable[[str], Host], kind: str) -> None:
    host = hosts(kind)
    host.migrate_to(0)
    host.create_all()
    before = host.definitions()
    host.migrate_to(len(migrations.STEPS))
    assert host.definitions() == before


def test_a_migration_may_name_the_schema(hosts: Callable[[str], Host]) -> None:
    host = hosts("in a schema")
    with host.engine.begin() as connection:
        op = Operations(MigrationContext.configure(connection))
        migrate_to(op, version=len(migrations.STEPS), schema="shop")
    assert host.tables() == {table.name for table in host.metadata.tables.values()}


def colour_locks(op: Operations, schema: str | None) -> None:
    with op.batch_alter_table("background_locks", schema=schema) as batch:
        batch.add_column(Column("colour", String(10)))
        batch.alter_column("token", existing_type=Integer(), nullable=True)


def bleach_locks(op: Operations, schema: str | None) -> None:
    with op.batch_alter_table("background_locks", schema=schema) as batch:
        batch.drop_column("colour")
        batch.alter_column("token", existing_type=Integer(), nullable=False)


def are_coloured(inspector: Any, schema: str | None) -> bool:
    return any(column["name"] == "colour" for column in inspector.get_columns("background_locks", schema))


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = MetaData()
    for table in migrations.metadata.tables.values():
        table.to_metadata(newest)
    locks = newest.tables["background_locks"]
    locks.append_column(Column("colour", String(10)))
    locks.c.token.nullable = True
    step = migrations.Step(colour_locks, bleach_locks, are_coloured)
    monkeypatch.setattr(migrations, "metadata", newest)
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, step))


@pytest.mark.usefixtures("next_version")
@pytest.mark.parametrize("kind", ["plain", "in a schema"])
def test_each_version_is_reached_from_each_other(hosts: Callable[[str], Host], kind: str) -> None:
    host = hosts(kind)
    for version in (0, 0, 1, 1, 2, 2, 3, 3, 2, 1, 3, 1, 0, 3, 0):
        host.migrate_to(version)
        assert len(host.tables()) == (0, 7, 11, 11)[version]
        assert version == 0 or ("cursor" in host.columns("background_executions")) == (version >= 2)
        assert version == 0 or ("colour" in host.columns("background_locks")) == (version == 3)


@pytest.mark.usefixtures("next_version")
def test_a_step_keeps_the_rows(host: Host) -> None:
    host.migrate_to(1)
    with host.engine.begin() as connection:
        connection.execute(host.metadata.tables["background_locks"].insert().values(name="a", token=7, since=SINCE))
    for version in (3, 1, 2):
        host.migrate_to(version)
        with host.engine.begin() as connection:
            assert connection.execute(text("SELECT name, token FROM background_locks")).all() == [("a", 7)]


SINCE = text("'2026-01-01 00:00:00.000000+00:00'")


@pytest.mark.parametrize("version", [-1, 3, "1", True, None, 1.0])
def test_a_version_that_this_release_does_not_know_is_refused(host: Host, version: Any) -> None:
    with pytest.raises(InvalidMigration, match=rf"no version {version!r}; expected a whole number from 0 .* to 2"):
        host.migrate_to(version)
    assert host.tables() == set()


def test_tables_of_an_older_version_are_refused_with_one_sentence(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.migrate_to(1)
    said = (
        "The engine's tables are of version 1; expected version 2: run `flask db upgrade`, with a migration that calls "
        "`background.migrate_to(op, version=2)`."
    )
    checked = host.manager.app.test_cli_runner().invoke(args=["workers", "check"])
    assert (checked.exit_code, checked.stderr) == (1, f"Problem: {said}\n")
    host.manager.start()
    try:
        wait_until(lambda: f"The workers cannot start yet: {said}" in caplog.messages)
    finally:
        host.manager.stop()


def test_tables_of_no_version_are_left_alone_with_a_sentence(host: Host) -> None:
    host.create_all()
    with host.engine.begin() as connection:
        connection.execute(text("DROP TABLE background_locks"))
    before = host.definitions()
    for version in (0, 1):
        with pytest.raises(InvalidMigration, match=r"has background_workers, .*, but not all parts of version 1"):
            host.migrate_to(version)
    assert host.definitions() == before


# -- offline ---------------------------------------------------------------------------------------


def offline(host: Host, start: str | None) -> tuple[Operations, StringIO]:
    script = StringIO()
    opts = {"as_sql": True, "output_buffer": script, "starting_rev": start, "literal_binds": True}
    context = MigrationContext.configure(dialect=host.engine.dialect, opts=opts)
    return Operations(context), script


def test_sql_from_base_makes_the_tables_step_by_step(host: Host, request: pytest.FixtureRequest) -> None:
    if host.engine.dialect.name == "postgresql":  # without a connection, Alembic rebuilds no table of SQLite
        request.getfixturevalue("next_version")
    host.migrate_to(1)
    expected = host.definitions()
    host.migrate_to(0)
    op, script = offline(host, "base")
    for version in (1, 0, 1):
        migrate_to(op, version=version)
    with host.engine.begin() as connection:
        for statement in script.getvalue().split(";"):
            connection.execute(text(statement))
    assert host.definitions() == expected


def test_sql_from_a_revision_is_refused_with_a_sentence(host: Host) -> None:
    op, script = offline(host, "1002")
    with pytest.raises(InvalidMigration, match=r"cannot be read offline \(--sql\) from revision 1002; expected a"):
        migrate_to(op, version=1)
    assert script.getvalue() == ""

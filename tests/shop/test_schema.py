"""The schema: the result of the migrations, and the errors of a start whose database is not ready."""

import logging
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from flask import Flask
from flask.testing import FlaskCliRunner
from sqlalchemy import URL, Connection, Engine, create_engine, inspect, make_url, text
from sqlalchemy.pool import NullPool
from support.databases import administer, dispose, on_postgresql, reload
from support.definitions import definitions
from support.processes import environment, run
from support.shop import has_password, settings

import demo
from app import create_app
from background import BackgroundWorkerManager, DatabaseNotReady
from background.database.dialects.sqlite import prepare
from migrations import schema
from models import User, db

ROOT = Path(__file__).parents[2]
HEAD = schema._head()


@contextmanager
def app_context(database_url: str, **more: Any) -> Iterator[Flask]:
    app = create_app(settings(database_url, **more))
    with app.app_context():
        try:
            yield app
        finally:
            db.session.remove()
            dispose()


def tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names())


@pytest.mark.filterwarnings("ignore:.*expression-based")  # the next test compares these indexes
def test_the_migrations_make_the_tables_of_the_models(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, db.metadata) == []


def test_create_all_makes_the_same_schema_as_the_migrations(empty_database_url: str) -> None:
    with app_context(empty_database_url):
        db.create_all()
        with db.engine.begin() as connection:
            by_the_models = definitions(connection)
            db.metadata.drop_all(connection)
        schema.upgrade()
        with db.engine.connect() as connection:
            assert definitions(connection) == by_the_models


def test_a_downgrade_leaves_nothing_and_an_upgrade_brings_it_back(engine: Engine) -> None:
    before = tables(engine)
    command.downgrade(schema._config(), "base")
    assert tables(engine) == {"alembic_version"}
    schema.upgrade()
    assert tables(engine) == before


def test_a_failed_migration_leaves_nothing_half_done(empty_database_url: str) -> None:
    def fail(connection: Connection) -> None:
        raise ZeroDivisionError

    with app_context(empty_database_url):
        with pytest.raises(ZeroDivisionError):
            schema.upgrade(fail)
        assert tables(db.engine) == set()


def test_a_database_with_the_schema_is_ready(app: Flask) -> None:
    with app.app_context():
        demo.ensure_ready()


def test_a_database_without_a_schema_names_the_command(empty_postgresql_url: str, tmp_path: Path) -> None:
    empty_file = tmp_path / "empty.sqlite"
    empty_file.touch()
    for url in (empty_postgresql_url, f"sqlite:///{empty_file}"):
        with app_context(url), pytest.raises(DatabaseNotReady, match=r"has no schema.*`flask db upgrade`"):
            demo.ensure_ready()


def test_a_database_behind_the_migrations_names_both_revisions(
    app: Flask, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    release_a_migration(tmp_path, monkeypatch)
    with pytest.raises(DatabaseNotReady, match=rf"revision {HEAD}, behind this release's 9000.*`flask db upgrade`"):
        demo.ensure_ready()
    schema.upgrade()
    demo.ensure_ready()


def release_a_migration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the release have a revision 9000 that adds a table."""
    versions = folder / "versions"
    versions.mkdir()
    (versions / "9000_more.py").write_text(
        textwrap.dedent(f"""
            import sqlalchemy as sa
            from alembic import op
            revision, down_revision = "9000", "{HEAD}"
            def upgrade():
                op.create_table("more", sa.Column("id", sa.Integer, primary_key=True))
        """)
    )
    original = schema._config

    def config() -> Any:
        made = original()
        here = ROOT / "migrations" / "versions"
        made.set_main_option("version_locations", f"{here}{os.pathsep}{versions}")
        return made

    monkeypatch.setattr(schema, "_config", config)


def test_a_database_ahead_of_the_migrations_is_only_warned_about(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # each probe of /health/ready checks again
            demo.ensure_ready()
    assert caplog.text.count(f"revision 9999, which this release ({HEAD}) does not know") == 1


@pytest.mark.parametrize("revision", [HEAD, "9999"])
def test_a_record_of_a_revision_without_its_tables_is_refused(empty_database_url: str, revision: str) -> None:
    with app_context(empty_database_url):
        recorded(db.engine, revision)
        with pytest.raises(
            DatabaseNotReady,
            match=rf"at revision {revision} by its record, but lacks background_.*Correct DATABASE_URL",
        ):
            demo.ensure_ready()


def recorded(engine: Engine, revision: str) -> None:
    """Record the revision, as `flask db stamp` does."""
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)"))
        connection.execute(text("INSERT INTO alembic_version VALUES (:revision)"), {"revision": revision})


def test_a_table_of_another_application_ends_a_migration_with_a_sentence(empty_database_url: str) -> None:
    with app_context(empty_database_url) as app:
        with db.engine.begin() as connection:
            connection.execute(text("CREATE TABLE users (nick varchar(20))"))
        result = app.test_cli_runner().invoke(args=["db", "upgrade"])
        assert result.exit_code == 1
        assert re.search(
            r"^Error: The database .* does not fit its recorded revision, so nothing was changed: .*already exists "
            r"\(CREATE TABLE users .*\)\. Record the true revision with `flask db stamp`",
            result.stderr,
            re.MULTILINE,
        ), result.output
        assert tables(db.engine) == {"users"}


@on_postgresql
def test_tables_further_back_on_the_search_path_are_found(engine: Engine, postgresql_url: str) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA first"))
    with app_context(f"{postgresql_url}&options=-csearch_path%3Dfirst,public"):
        demo.ensure_ready()
        schema.upgrade()  # Alembic finds the same tables


# -- a database that the migrations before 0.1.0 made ------------------------------------------------


def at_revision(engine: Engine, revision: str) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


SAYS_WHAT_TO_DO = (
    r"at revision {} of the migrations before 0\.1\.0; expected 0006: reach that with the version that made the "
    r"database, back it up, and record it with `flask db stamp --purge 1002`"
)


@pytest.mark.parametrize("revision", ["0001", "0006"])
def test_a_database_from_before_0_1_0_is_refused_with_the_command(
    app: Flask, engine: Engine, manager: BackgroundWorkerManager, runner: FlaskCliRunner, revision: str
) -> None:
    at_revision(engine, revision)
    said, before = SAYS_WHAT_TO_DO.format(revision), definitions_of(engine)
    with pytest.raises(DatabaseNotReady, match=said):
        manager.prepare()
    for command_line in ("db upgrade", "db current", "db check", "db stamp head", "workers check"):
        result = runner.invoke(args=command_line.split())
        assert result.exit_code == 1
        assert re.search(said, result.stderr), command_line
        assert len(re.findall("before 0.1.0", result.output)) == 1
    assert definitions_of(engine) == before


def definitions_of(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return definitions(connection)


def test_an_embedded_database_from_before_0_1_0_is_refused_with_the_command(make_embedded: Callable[[], Flask]) -> None:
    with make_embedded().app_context():
        at_revision(db.engine, "0006")
        with pytest.raises(DatabaseNotReady, match=SAYS_WHAT_TO_DO.format("0006")):
            demo.ensure_ready()
        dispose()


# -- tables without a record of migrations -----------------------------------------------------------


def test_tables_that_create_all_made_are_enough_to_start(
    empty_database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with app_context(empty_database_url):
        db.create_all()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                demo.ensure_ready()
        assert caplog.text.count("no record of its migrations. If it is up to date, run `flask db stamp head`") == 1


def test_some_tables_without_a_record_of_migrations_are_not_touched(empty_database_url: str) -> None:
    with app_context(empty_database_url):
        db.create_all()
        db.metadata.tables["background_workers"].drop(db.engine)
        with pytest.raises(DatabaseNotReady, match=r"no record of its migrations, and lacks background_workers"):
            demo.ensure_ready()


def test_the_check_does_not_create_a_missing_sqlite_file(tmp_path: Path) -> None:
    path = tmp_path / "missing.sqlite"
    with app_context(f"sqlite:///{path}"), pytest.raises(DatabaseNotReady, match=r"does not exist.*`flask db upgrade`"):
        demo.ensure_ready()
    assert not path.exists()


def test_a_file_that_is_not_a_database_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "text.sqlite"
    path.write_text("this is no database " * 1000)
    with app_context(f"sqlite:///{path}"), pytest.raises(DatabaseNotReady, match=r"expected a SQLite database"):
        demo.ensure_ready()


def test_a_missing_postgresql_database_names_createdb(postgresql_server: URL) -> None:
    url = postgresql_server.set(database="nowhere").render_as_string(hide_password=False)
    with app_context(url), pytest.raises(DatabaseNotReady, match=r"does not exist.*`createdb -h .* nowhere`"):
        demo.ensure_ready()


def test_an_unreachable_server_is_reported_without_the_password() -> None:
    with app_context("postgresql://shop:hunter2@127.0.0.1:1/shop"), pytest.raises(DatabaseNotReady) as raised:
        demo.ensure_ready()
    message = str(raised.value)
    assert "shop:***@127.0.0.1:1/shop" in message
    assert "cannot be reached" in message
    assert "refused" in message
    assert "hunter2" not in message
    assert raised.value.__suppress_context__


def test_a_wrong_password_is_reported_without_the_password(postgresql_server: URL) -> None:
    asked = password_is_asked_for(postgresql_server)
    with asked as url, app_context(url), pytest.raises(DatabaseNotReady) as raised:
        demo.ensure_ready()
    message = str(raised.value)
    assert "password authentication failed" in message
    assert "hunter2" not in message


@contextmanager
def password_is_asked_for(server: URL) -> Iterator[str]:
    """Let the running server ask one role for a password, by its own access file."""
    administer(server, "CREATE ROLE careful LOGIN PASSWORD 'right'")
    access = Path(file_of(server, "hba_file"))
    original = access.read_text()
    access.write_text("local all careful scram-sha-256\n" + original)
    reload(server)
    yield server.set(username="careful", password="hunter2").render_as_string(hide_password=False)
    access.write_text(original)
    reload(server)
    administer(server, "DROP ROLE careful")


def file_of(server: URL, setting: str) -> str:
    with create_engine(server, poolclass=NullPool).connect() as connection:
        return str(connection.scalar(text(f"SHOW {setting}")))


# The embedded database, in processes of their own.


PREPARE = """
import multiprocessing, sys
from app import create_app
from demo import ensure_ready

app = create_app({"SECRET_KEY": "test"})

number = int(sys.argv[1])
context = multiprocessing.get_context("fork")  # nothing is opened yet, no thread runs: as under gunicorn --preload
barrier = context.Barrier(number)

def member():
    barrier.wait()
    with app.app_context():
        ensure_ready()

members = [context.Process(target=member) for _ in range(number)]
for process in members:
    process.start()
for process in members:
    process.join()
sys.exit(any(process.exitcode for process in members))
"""


@pytest.fixture
def fresh_clone(tmp_path: Path) -> Path:
    """Give a folder that runs the shop's code, with an instance folder of its own."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for path in ROOT.glob("*.py"):
        (clone / path.name).write_text(path.read_text())
    for name in ("background", "migrations", "templates", "static"):
        if (ROOT / name).exists():
            (clone / name).symlink_to(ROOT / name)
    return clone


def start(clone: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=clone,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def prepare_at_once(clone: Path, number: int) -> tuple[str, str]:
    """Prepare the database in `number` processes at the same instant. Return their outputs and their errors."""
    process = start(clone, PREPARE, str(number))
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out, errors


def ask(clone: Path, question: str) -> Any:
    connection = sqlite3.connect(clone / "instance" / "bookstore.sqlite")
    answer = connection.execute(question).fetchone()[0]
    connection.close()
    return answer


def test_a_new_file_is_private_and_an_existing_file_keeps_its_mode(tmp_path: Path) -> None:
    for name, mode in (("new.sqlite", 0o600), ("there.sqlite", 0o640)):
        path = tmp_path / name
        if name == "there.sqlite":
            path.touch()
            path.chmod(mode)
        with app_context(f"sqlite:///{path}"):
            schema.upgrade()
            found = {each.name: stat.S_IMODE(each.stat().st_mode) for each in tmp_path.glob(f"{name}*")}
        assert found == dict.fromkeys((name, f"{name}-shm", f"{name}-wal"), mode)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///file:other?mode=memory&uri=true"])
def test_a_database_that_is_not_a_file_makes_no_file(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = create_engine(url, poolclass=NullPool)
    prepare(engine)
    with engine.connect():
        assert not list(tmp_path.iterdir())
    engine.dispose()


@pytest.mark.promise
def test_four_processes_at_once_prepare_the_embedded_shop_once_and_it_is_left_as_it_is(fresh_clone: Path) -> None:
    out, errors = prepare_at_once(fresh_clone, 4)
    assert out.count("the password") == 1
    assert "the password" not in errors
    assert ask(fresh_clone, "SELECT count(*) FROM users") == 11
    found = re.search(r"admin@example.com, the password (\S+) ", out)
    assert found
    with app_context(f"sqlite:///{fresh_clone / 'instance' / 'bookstore.sqlite'}"):
        admin = db.session.scalars(db.select(User).where(User.email == "admin@example.com")).one()
        assert admin.is_admin
        assert has_password(admin, found[1])
        other = db.session.scalars(db.select(User).where(User.email == "user1@example.com")).one()
        assert other.password is None
    before = (fresh_clone / "instance" / "bookstore.sqlite").read_bytes()
    out, _ = prepare_at_once(fresh_clone, 1)
    assert "password" not in out
    assert (fresh_clone / "instance" / "bookstore.sqlite").read_bytes() == before


@pytest.mark.promise
def test_a_process_killed_while_it_prepares_leaves_nothing_half_done(fresh_clone: Path) -> None:
    killed = start(fresh_clone, PREPARE_AND_STAND_STILL)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "standing still\n"
    killed.kill()
    killed.communicate()
    out, _ = prepare_at_once(fresh_clone, 1)
    assert out.count("the password") == 1
    assert ask(fresh_clone, "SELECT count(*) FROM users") == 11
    assert ask(fresh_clone, "PRAGMA integrity_check") == "ok"


PREPARE_AND_STAND_STILL = """
import sys
from sqlalchemy import event
from app import create_app
from demo import ensure_ready
from models import db

def stand_still(connection, cursor, statement, *_):
    if statement.startswith("INSERT INTO users"):
        print("standing still", flush=True)
        sys.stdin.readline()

with create_app({"SECRET_KEY": "test"}).app_context():
    event.listen(db.engine, "before_cursor_execute", stand_still)
    ensure_ready()
"""


def test_the_sql_of_all_migrations_needs_no_database(tmp_path: Path) -> None:
    app = create_app(settings(f"sqlite:///{tmp_path}/none"))
    runner = app.test_cli_runner()
    made = runner.invoke(args=["db", "upgrade", "--sql"])
    assert made.exit_code == 0
    copied = {"_alembic_tmp_users", "_alembic_tmp_audit_entries"}
    assert {*re.findall(r"CREATE TABLE (\w+)", made.output)} == {*db.metadata.tables, "alembic_version", *copied}
    undone = runner.invoke(args=["db", "downgrade", f"{HEAD}:base", "--sql"])
    assert undone.exit_code == 1
    assert f"cannot be read offline (--sql) from revision {HEAD}" in undone.stderr
    assert list(tmp_path.iterdir()) == []
    dispose_of(app)


def dispose_of(app: Flask) -> None:
    with app.app_context():
        dispose()


# -- `flask db migrate` ------------------------------------------------------------------------------


CHANGED_MODELS = """
User.banned_at = mapped_column(UtcDateTime)

class Shelf(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    emptied_at: Mapped[datetime] = mapped_column(UtcDateTime)
"""


RUN_COMMANDS = """
import sys
from app import create_app

runner = create_app().test_cli_runner()
for line in sys.argv[1:]:
    result = runner.invoke(args=line.split())
    print(result.output)
    assert result.exit_code == 0, line
"""


@pytest.mark.promise
def test_a_generated_migration_leaves_the_engines_tables_alone_and_imports_utcdatetime(
    fresh_clone: Path, database_url: str
) -> None:
    versions = fresh_clone / "migrations" / "versions"
    (fresh_clone / "migrations").unlink()
    shutil.copytree(ROOT / "migrations", fresh_clone / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    there = set(versions.iterdir())
    with (fresh_clone / "models.py").open("a") as models:
        models.write(CHANGED_MODELS)
    engine = create_engine(database_url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE background_workers DROP COLUMN paused_at"))
        connection.execute(text("DROP INDEX ix_background_executions_running"))
    command_lines = "db migrate -m shelves", "db upgrade", "db check", "db downgrade base"
    environ = environment(database_url, PYTHONPATH=fresh_clone)
    code, said = run([sys.executable, "-c", RUN_COMMANDS, *command_lines], environ, fresh_clone)
    assert code == 0, said
    [made] = set(versions.glob("*.py")) - there
    source = made.read_text()
    assert "from background import UtcDateTime\n" in source
    assert "sa.Column('emptied_at', UtcDateTime(), nullable=False)" in source
    assert "sa.Column('banned_at', UtcDateTime(), nullable=True)" in source
    assert "background_" not in source
    assert tables(engine) == {"alembic_version"}


def test_an_embedded_database_that_is_behind_is_upgraded_in_place(
    sqlite_url: str, make_embedded: Callable[[], Flask], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    release_a_migration(tmp_path, monkeypatch)
    with make_embedded().app_context():
        demo.ensure_ready()
        assert "more" in tables(db.engine)
        assert db.session.scalar(db.select(db.func.count()).select_from(User)) == 0
        dispose()


@pytest.fixture
def make_embedded(sqlite_url: str) -> Callable[[], Flask]:
    def make() -> Flask:
        app = create_app(settings(sqlite_url))
        app.config["DATABASE_IS_EMBEDDED"] = True
        return app

    return make


def test_a_password_in_the_url_is_hidden_in_every_sentence() -> None:
    url = make_url("postgresql+psycopg://shop:hunter2@db/shop")
    assert "hunter2" not in schema._createdb(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://reader:sekrit@127.0.0.1:1/shop", r"^Error: The database postgresql://.* cannot be reached"),
        ("sqlite:///{folder}", r"^Error: The database file .* cannot be used"),
        (
            "sqlite:///{folder}/none/shop.sqlite",
            r"^Error: The folder .*/none of the database file does not exist: make",
        ),
    ],
)
def test_migrating_a_database_that_cannot_be_used_is_a_sentence(tmp_path: Path, url: str, said: str) -> None:
    app = create_app({"DATABASE_URL": url.format(folder=tmp_path), "SECRET_KEY": "x"})
    result = app.test_cli_runner().invoke(args=["db", "upgrade"])
    assert result.exit_code == 1
    assert re.search(said, result.stderr, re.MULTILINE), result.output
    assert "Traceback" not in result.output
    assert "sekrit" not in result.output


# -- the accounts of Flask-Security -------------------------------------------------------------------


BEFORE_ACCOUNTS = schema._scripts().get_revision("1003").down_revision
OLD_USERS = """
    INSERT INTO users (id, email, name, password_hash, status, is_admin, created_at, last_login_at) VALUES
    (1, 'nat@example.com', 'Nat', 'scrypt:32768:8:1$a$b', 'passive', false, '2026-01-02 03:04:05.000006', NULL),
    (2, 'you@your.shop', 'You', 'scrypt:32768:8:1$c$d', 'active', true, '2026-01-03 00:00:00.000000',
     '2026-02-03 00:00:00.000000'),
    (3, 'x@exämple.com', 'X', '!', 'active', false, '2026-01-04 00:00:00.000000', NULL),
    (4, 'y@exämple.com', 'Y', '!', 'active', false, '2026-01-04 00:00:00.000000', NULL),
    (5, 'y@xn--exmple-cua.com', 'Y', '!', 'active', false, '2026-01-04 00:00:00.000000', NULL)
"""


def test_the_accounts_of_before_are_carried_over_without_their_passwords(engine: Engine) -> None:
    with engine.connect() as connection:
        before = definitions(connection)
    command.downgrade(schema._config(), BEFORE_ACCOUNTS)
    with engine.begin() as connection:
        connection.execute(text(OLD_USERS))
        connection.execute(
            text(
                "INSERT INTO audit_entries (user_id, at, action, details, address)"
                " VALUES (2, '2026-02-03 00:00:00.000000', 'admin.make_admin', '{}', '::1')"
            )
        )
    schema.upgrade()
    with engine.connect() as connection:
        assert definitions(connection) == before
        assert connection.scalar(text("SELECT user_id FROM audit_entries")) == 2
    users = db.session.scalars(db.select(User).order_by(User.id)).all()
    assert [user.email for user in users] == [
        "nat@example.com",
        "you@your.shop",
        "x@xn--exmple-cua.com",
        "y@exämple.com",  # its e-mail is that of another account
        "y@xn--exmple-cua.com",
    ]
    assert [(user.status, user.is_admin) for user in users[:2]] == [("passive", False), ("active", True)]
    assert all(user.confirmed_at == user.created_at and user.active and user.password is None for user in users)
    assert len({user.fs_uniquifier for user in users}) == 5
    assert users[1].last_login_at is not None
    db.session.remove()


def test_a_downgrade_keeps_the_accounts(engine: Engine) -> None:
    db.session.add(User(email="nat@example.com", name="Nat", password="x"))
    db.session.commit()
    db.session.remove()
    command.downgrade(schema._config(), BEFORE_ACCOUNTS)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT email, password_hash FROM users")).all()
    assert [tuple(row) for row in found] == [("nat@example.com", "!")]
    schema.upgrade()

"""A PostgreSQL with the defaults of another country and time zone, which must not matter."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import URL, create_engine, event, make_url, select
from sqlalchemy.pool import NullPool
from support.databases import close, text
from support.fleet import Hourly, Note, db, effects, make_app, wait_until

from background import BackgroundWorkerManager, WorkerContext
from background.database import tables
from background.database.dialects import postgresql

NAME = "Žofie Łącka 株式会社"
DEFAULTS = [
    {"datestyle": "'SQL, DMY'"},
    {"datestyle": "'German'"},
    {"datestyle": "'Postgres, MDY'", "timezone": "'Asia/Kolkata'"},
    {"client_encoding": "'LATIN1'"},
    {"client_encoding": "'SQL_ASCII'"},
    {"client_encoding": "'SJIS'", "datestyle": "'Postgres, YMD'", "intervalstyle": "'iso_8601'"},
    {"timezone": "'<+0530>-05:30'", "datestyle": "'SQL, MDY'", "bytea_output": "'escape'", "extra_float_digits": "0"},
]


class Naming(Hourly):
    """Leaves a name, and logs it."""

    def do_work(self, context: WorkerContext) -> None:
        context.logger.warning("Naming %s", NAME)
        context.session.execute(effects.insert().values(key=context.idempotency_key, note=NAME))


@pytest.fixture(params=DEFAULTS, ids=lambda each: " ".join(each.values()))
def odd_url(request: pytest.FixtureRequest, postgresql_url: str, databases: Callable[[str], object]) -> str:
    """Give a database with the defaults of another country and time zone."""
    for name, value in request.param.items():
        databases(f"ALTER DATABASE {make_url(postgresql_url).database} SET {name} = {value}")
    return postgresql_url


@pytest.fixture
def odd(odd_url: str) -> Iterator[Flask]:
    app = make_app(odd_url, Naming)
    with app.app_context():
        db.create_all()
    yield app
    close(app)


def manager_of(app: Flask) -> BackgroundWorkerManager:
    manager: BackgroundWorkerManager = app.extensions["background_workers"]
    return manager


@pytest.mark.promise
def test_workers_run_and_the_commands_work_whatever_the_servers_defaults_are(odd: Flask) -> None:
    tick = datetime.now(UTC)
    assert manager_of(odd).request("naming")  # before the start, whose own run would block it
    manager_of(odd).start()
    wait_until(lambda: manager_of(odd).history.executions("naming", state="succeeded"), "the run")
    record = manager_of(odd).history.executions("naming", state="succeeded")[-1]
    assert timedelta() <= record.started_at - tick < timedelta(minutes=1)
    assert str(manager_of(odd).history.log(record.id)).endswith(NAME)
    with odd.app_context():
        assert set(db.session.scalars(select(effects.c.note))) == {NAME}
    for command in (["check"], ["list"], ["instances"], ["history", "naming"], ["why", "naming"]):
        result = odd.test_cli_runner().invoke(args=["workers", *command])
        assert result.exit_code in (0, 1), result.output
        assert "cannot be used" not in result.output


def test_the_applications_own_moments_and_names_are_read_as_written(odd: Flask) -> None:
    at = datetime(2026, 2, 3, 4, 5, 6, 789, UTC)
    with odd.app_context():
        db.session.add(Note(text=NAME, at=at))
        db.session.commit()
        note = db.session.scalars(select(Note)).one()
        assert (note.text, note.at) == (NAME, at)


def test_a_setting_in_the_url_does_not_matter_either(postgresql_url: str) -> None:
    url = make_url(postgresql_url).update_query_dict({"options": "-c datestyle=German -c client_encoding=LATIN1"})
    app = make_app(text(url), Hourly)
    assert manager_of(app).trigger("hourly") is not None
    close(app)


def test_a_server_with_suitable_settings_gets_no_setting(postgresql_url: str) -> None:
    engine = create_engine(postgresql_url, poolclass=NullPool)
    sent: list[str] = []

    @event.listens_for(engine, "connect")
    def watch(connection: Any, _record: Any) -> None:
        connection.execute = sent.append

    postgresql.prepare(engine)
    engine.raw_connection().close()
    assert sent == []


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN2"])
def test_a_database_in_another_encoding_serves(
    postgresql_server: URL, databases: Callable[[str], object], encoding: str
) -> None:
    databases(f"CREATE DATABASE odd_{encoding} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    app = make_app(text(postgresql_server.set(database=f"odd_{encoding}".lower())), Hourly)
    try:
        with app.app_context():
            db.create_all()
        manager = manager_of(app)
        execution = manager.tick("hourly", datetime.now(UTC))
        assert execution is None or execution.state == "succeeded"
        execution = manager.trigger("hourly")
        assert execution is not None
        assert execution.state == "succeeded"
        with manager.stores.main.engine.connect() as connection:
            assert connection.scalars(select(tables.workers.c.name)).all() == ["hourly"]
    finally:
        close(app)
        databases(f"DROP DATABASE odd_{encoding} WITH (FORCE)")

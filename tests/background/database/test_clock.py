"""Moments that a user typed. SQLite keeps any text, PostgreSQL keeps moments beyond Python's range."""

import logging

import pytest
from flask import Flask
from sqlalchemy import Engine, text
from support.databases import on_postgresql, on_sqlite
from support.fleet import Hourly, last_hour

from background import BackgroundWorkerManager

READABLE = {
    "2026-11-30": "2026-11-30T00:00:00+00:00",
    "2026-11-30 07:00": "2026-11-30T07:00:00+00:00",
    "2026-11-30T07:00:00Z": "2026-11-30T07:00:00+00:00",
    "2026-11-30T07:00:00+02:00": "2026-11-30T05:00:00+00:00",
}


def type_moments(engine: Engine, value: str) -> None:
    with engine.begin() as connection:
        for table, column in (("workers", "paused_at"), ("workers", "mark"), ("executions", "started_at")):
            connection.execute(text(f"UPDATE background_{table} SET {column} = :value"), {"value": value})


def run_commands(app: Flask) -> None:
    runner = app.test_cli_runner()
    for command in (["list"], ["history", "hourly"], ["why", "hourly"]):
        ended = runner.invoke(args=["workers", *command])
        assert ended.exception is None or isinstance(ended.exception, SystemExit), (command, ended.exception)


def run_worker(manager: BackgroundWorkerManager) -> None:
    assert manager.resume("hourly")
    execution = manager.trigger("hourly")
    assert execution is not None
    assert execution.state == "succeeded"


@on_sqlite
@pytest.mark.parametrize("value", [*READABLE, "yesterday", "", "5", "0001-01-01T00:00:00+05:00"])
def test_a_moment_that_a_user_typed_in_another_form_ends_no_command_and_no_claim(
    app: Flask, manager: BackgroundWorkerManager, engine: Engine, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager.add(Hourly)
    manager.tick("hourly", last_hour())
    type_moments(engine, value)
    run_commands(app)
    run_worker(manager)
    said = [each for each in caplog.records if "It counts as 1970" in each.message]
    assert len(said) == (value not in READABLE)
    assert all(each.levelno == logging.WARNING for each in said)


@on_sqlite
@pytest.mark.parametrize(("value", "meant"), READABLE.items())
def test_a_typed_moment_without_a_zone_is_in_utc(
    manager: BackgroundWorkerManager, engine: Engine, value: str, meant: str
) -> None:
    manager.add(Hourly)
    manager.tick("hourly", last_hour())
    type_moments(engine, value)
    state = manager.stores.ledger.states()["hourly"]
    assert state.paused_at is not None
    assert state.paused_at.isoformat() == meant


@on_postgresql
@pytest.mark.parametrize("value", ["infinity", "-infinity", "0044-03-15 BC", "12026-11-30"])
def test_a_moment_beyond_pythons_range_ends_no_command_and_no_claim(
    app: Flask, manager: BackgroundWorkerManager, engine: Engine, value: str
) -> None:
    manager.add(Hourly)
    manager.tick("hourly", last_hour())
    type_moments(engine, value)
    run_commands(app)
    run_worker(manager)

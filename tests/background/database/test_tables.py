"""Rows that a user edited: a column of numbers or moments has a value that is neither."""

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import select, text
from support.databases import on_postgresql, on_sqlite
from support.fleet import Hourly, db, last_hour

from background import BackgroundWorkerManager, MessageWorker, UtcDateTime, WorkerContext
from background.database import tables
from background.ledger.leases import Instance

PAGES = (
    *("/workers/", "/workers/timeline", "/workers/instances", "/workers/messages"),
    *("/workers/worker/hourly", "/workers/worker/running", "/metrics", "/health/ready", "/health/workers"),
)
COMMANDS = (
    *("workers list", "workers instances", "workers check", "workers history hourly", "workers why hourly"),
    *("messages list", "messages stats"),
)


class Running(Hourly):
    """A worker whose tick runs elsewhere."""


class LetterWorker(MessageWorker):
    topic = "letters"
    max_attempts = 1

    def handle(self, message: Any, context: WorkerContext) -> None:
        raise LookupError("no such reader")


@pytest.fixture
def edited(app: Flask, manager: BackgroundWorkerManager) -> Callable[[tuple[type, ...], str], None]:
    """Give a function that types a value into each column of the given types, in each row of a used database."""
    for worker in (Hourly, Running, LetterWorker):
        manager.add(worker)
    manager.tick("hourly", last_hour())
    elsewhere = Instance(manager.stores.lease)
    manager.stores.leases.beat(elsewhere)
    schedule = manager.recovery.look(Running, last_hour()).schedule_text
    assert manager.stores.ledger.claim("running", last_hour(), schedule, (elsewhere.id, elsewhere.name))
    with app.app_context():
        manager.enqueue_many("letters", ["dead", "waiting"])
        db.session.commit()

    def edit(types: tuple[type, ...], value: str) -> None:
        with manager.stores.leases.engine.begin() as connection:
            for table in tables.metadata.sorted_tables:
                typed = [each.name for each in table.c if isinstance(each.type, types) and not each.primary_key]
                if typed:
                    connection.execute(
                        text(f"UPDATE {table.name} SET {', '.join(f'{each} = {value}' for each in typed)}")
                    )

    return edit


def look_everywhere(app: Flask) -> None:
    """Open each page and run each command that reads. Fail if one of them ends with an error."""
    client, runner = app.test_client(), app.test_cli_runner()
    ids = [("messages", tables.messages), ("worker/hourly", tables.executions)]
    with app.app_context():
        rows = [f"/workers/{path}/{id}" for path, table in ids for id in db.session.scalars(select(table.c.id))]
    for page in (*PAGES, *rows):
        assert client.get(page).status_code in (200, 404, 503), page
    for command in (*COMMANDS, *(f"{each} --json" for each in COMMANDS)):
        ended = runner.invoke(args=command.split())
        assert ended.exception is None or isinstance(ended.exception, SystemExit), (command, ended.exception)


@on_sqlite
@pytest.mark.parametrize("value", ["'many'", "x'00ff'", "9e999", "1.5"])
def test_a_value_that_is_not_a_number_ends_no_page_and_no_command(
    app: Flask, edited: Callable[[tuple[type, ...], str], None], value: str, caplog: pytest.LogCaptureFixture
) -> None:
    edited((tables.Whole, tables.Real), value)
    look_everywhere(app)
    said = [each.message for each in caplog.records if "in a column of numbers. It counts as 0" in each.message]
    assert bool(said) == (value != "1.5")
    assert len(said) == len(set(said))  # once, however many rows have it


@pytest.mark.promise
@on_postgresql
@pytest.mark.parametrize("value", ["'NaN'", "'Infinity'"])
def test_a_number_that_is_not_finite_ends_no_page_and_no_command(
    app: Flask, edited: Callable[[tuple[type, ...], str], None], value: str
) -> None:
    edited((tables.Real,), value)
    look_everywhere(app)


@on_sqlite
def test_bytes_in_the_place_of_a_moment_end_no_page_and_no_command(
    app: Flask, edited: Callable[[tuple[type, ...], str], None]
) -> None:
    edited((UtcDateTime,), "x'00ff'")
    look_everywhere(app)


@pytest.mark.promise
@on_postgresql
@pytest.mark.parametrize("value", ["'infinity'", "'-infinity'"])
def test_a_moment_without_end_ends_no_page_and_no_command(
    app: Flask, edited: Callable[[tuple[type, ...], str], None], value: str
) -> None:
    edited((UtcDateTime,), value)
    look_everywhere(app)

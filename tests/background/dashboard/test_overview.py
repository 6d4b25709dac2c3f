"""The overview: the fleet in numbers, problems before all else, and a filter by state."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from flask.testing import FlaskClient
from sqlalchemy import Engine, delete, insert, update
from support.databases import close, on_sqlite
from support.fleet import Hourly, make_app

from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext
from background.database import tables


class Archiving(Hourly):
    pass


class Billing(Hourly):
    ends_well = True

    def do_work(self, context: WorkerContext) -> None:
        if not self.ends_well:
            raise ValueError("no paper")


class Counting(Hourly):
    enabled = False


class Mailing(MessageWorker):
    topic = "mail"

    def handle(self, message: Message, context: WorkerContext) -> None:
        pass


class Zipping(Hourly):
    pass


@pytest.fixture
def app(database_url):
    app = make_app(database_url, Archiving, Billing, Counting, Mailing, Zipping)
    for worker in (Archiving, Billing, Counting, Zipping):
        app.extensions["background_workers"].recovery.look(worker)
    yield app
    close(app)


@pytest.fixture
def ends_badly(monkeypatch: pytest.MonkeyPatch, manager: BackgroundWorkerManager) -> None:
    """Let `billing` fail once."""
    monkeypatch.setattr(Billing, "ends_well", False)
    manager.trigger("billing")


def shown(client: FlaskClient, query: str = "") -> list[str]:
    """Return the names of the shown workers, in the order of the page."""
    return re.findall(r'id="row-([^"]*)"', client.get(f"/workers/?{query}").text)


def headline(client: FlaskClient) -> dict[str, tuple[str, str]]:
    """Return each text of the headline with its address and its number."""
    found = re.findall(r'<li><a[^>]* href="([^"]*)"><strong>([^<]*)</strong> ([^<]*)</a>', client.get("/workers/").text)
    return {text: (address, number) for address, number, text in found}


def enqueue(engine: Engine, **message: object) -> None:
    at = datetime.now(UTC) - timedelta(seconds=90)
    with engine.begin() as connection:
        connection.execute(
            insert(tables.messages).values(topic="mail", payload="1", enqueued_at=at, due_at=at, **message)
        )


def test_workers_without_problems_are_sorted_by_name(client: FlaskClient, manager: BackgroundWorkerManager) -> None:
    with manager.presence.present():
        assert shown(client) == ["archiving", "billing", "counting", "mailing", "zipping"]


@pytest.mark.usefixtures("ends_badly")
def test_workers_with_a_problem_come_first_and_the_state_in_the_address_filters(
    client: FlaskClient, manager: BackgroundWorkerManager, engine: Engine
) -> None:
    enqueue(engine, state="dead", attempt=5, finished_at=datetime.now(UTC))
    with engine.begin() as connection:
        overdue = {
            "mark": datetime.now(UTC) - timedelta(hours=4),
            "scheduled_at": datetime.now(UTC) - timedelta(days=1),
        }
        connection.execute(update(tables.workers).where(tables.workers.c.name == "zipping").values(**overdue))
    manager.pause("archiving")
    with manager.presence.present():
        assert shown(client) == ["billing", "mailing", "zipping", "archiving", "counting"]
        states = ("failed", "dead", "overdue", "paused", "disabled", "running", "stuck")
        assert {state: shown(client, f"state={state}") for state in states} == {
            "failed": ["billing"],
            "dead": ["mailing"],
            "overdue": ["zipping"],
            "paused": ["archiving"],
            "disabled": ["counting"],
            "running": [],
            "stuck": [],
        }
        assert shown(client, "state=overdue&q=billing") == []
        assert len(shown(client, "state=nonsense")) == 5
        assert headline(client) == {
            "instance alive": ("/workers/instances", "1"),
            "running now": ("/workers/?state=running", "0"),
            "failed": ("/workers/?state=failed", "1"),
            "overdue": ("/workers/?state=overdue", "1"),
            "dead letter": ("/workers/messages?state=dead#messages", "1"),
            "ticks / min": ("/workers/timeline?window=1m", "1"),
            "messages / min": ("/workers/messages", "0"),
        }


@pytest.mark.usefixtures("ends_badly")
def test_a_worker_that_succeeds_again_shows_how_often_it_failed(
    client: FlaskClient, manager: BackgroundWorkerManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Billing, "ends_well", True)
    manager.trigger("billing")
    assert shown(client, "state=failed") == []
    assert re.search(r'href="/workers/worker/billing#executions">1 of 2 failed</a>', client.get("/workers/").text)


def test_a_run_is_counted_while_it_runs_and_for_a_minute(
    client: FlaskClient, manager: BackgroundWorkerManager, engine: Engine
) -> None:
    seen: list[tuple[list[str], str]] = []

    class Looking(Hourly):
        def do_work(self, context: WorkerContext) -> None:
            seen.append((shown(client, "state=running"), headline(client)["running now"][1]))

    manager.add(Looking)
    with manager.presence.present():
        manager.trigger("looking")
        assert seen == [(["looking"], "1")]
        assert headline(client)["ticks / min"][1] == "1"
        with engine.begin() as connection:
            old = datetime.now(UTC) - timedelta(minutes=2)
            connection.execute(update(tables.executions).values(started_at=old, finished_at=old))
        assert headline(client)["ticks / min"][1] == "0"


@on_sqlite
def test_a_message_workers_row_shows_its_messages(client: FlaskClient, engine: Engine) -> None:
    assert "nothing waits" in row(client)
    for message in ({}, {"attempt": 1}, {"state": "running"}, {"state": "done", "finished_at": datetime.now(UTC)}):
        enqueue(engine, **message)
    text = row(client)
    assert re.search(r"2 waiting the oldest for 1 min \d+ s running 1 1 per minute 1 retrying", text), text
    with engine.begin() as connection:
        connection.execute(insert(tables.topics).values(topic="mail", paused_at=datetime.now(UTC)))
        connection.execute(delete(tables.messages))
    assert "mailing paused" in row(client)
    assert shown(client, "state=paused") == ["mailing"]


def row(client: FlaskClient) -> str:
    """Return the text of the message worker's row."""
    found = re.search(r'<tr id="row-mailing">.*?</tr>', client.get("/workers/").text, re.DOTALL)
    assert found is not None
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", found[0])).strip()

"""The right to change something: without it, a visitor sees all pages without buttons, and no change is accepted."""

import re
from datetime import UTC, datetime

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import insert
from support.databases import close, on_sqlite
from support.fleet import Hourly, make_app

from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext
from background.dashboard.access import Access, user_name
from background.database import tables


class Counting(Hourly):
    pass


class Mailing(MessageWorker):
    topic = "mail"

    def handle(self, message: Message, context: WorkerContext) -> None:
        raise ValueError("no stamps")


asked: list[str] = []


def may_change() -> bool:
    asked.append("may_change")
    return False


@pytest.fixture
def app(database_url):
    app = make_app(database_url, Counting, Mailing)
    yield app
    close(app)


@pytest.fixture
def viewers_client(app: Flask, client: FlaskClient) -> FlaskClient:
    app.extensions["background_dashboard"] = Access(may_change, lambda: "nat@example.com")
    return client


PAGES = ("", "timeline", "instances", "messages", "worker/counting", "worker/mailing", "messages/1")


@on_sqlite
def test_without_the_right_no_page_has_a_button_that_changes_something(
    manager: BackgroundWorkerManager, engine, client: FlaskClient, request: pytest.FixtureRequest
) -> None:
    manager.recovery.look(Counting)
    letter = {"id": 1, "topic": "mail", "payload": "1", "state": "dead", "attempt": 5, "enqueued_at": datetime.now(UTC)}
    with engine.begin() as connection:
        connection.execute(insert(tables.messages).values(letter | {"due_at": letter["enqueued_at"]}))
    found = [re.findall('method="post"', client.get(f"/workers/{path}").text) for path in PAGES]
    assert [len(each) > 0 for each in found] == [True, False, False, True, True, True, True]
    viewers = request.getfixturevalue("viewers_client")
    for path in PAGES:
        asked.clear()
        response = viewers.get(f"/workers/{path}", follow_redirects=True)
        assert response.status_code == 200
        assert 'method="post"' not in response.text, path
        assert len(asked) <= 1, "one question per request"


@on_sqlite
def test_without_the_right_each_change_is_refused(
    app: Flask, manager: BackgroundWorkerManager, viewers_client: FlaskClient
) -> None:
    manager.recovery.look(Counting)
    rules = [rule for rule in app.url_map.iter_rules() if rule.endpoint.startswith("background.")]
    changing = [rule for rule in rules if "POST" in (rule.methods or ())]
    assert len(changing) >= 8
    for rule in changing:
        path = re.sub(r"<(int[^>]*:)?id>", "1", rule.rule).replace("<name>", "counting")
        response = viewers_client.post(path, data={"topic": "mail", "confirmed": "yes"})
        assert response.status_code == 403, rule
        assert "You may look at the workers, but you may not change them." in response.text
    state = manager.stores.ledger.look("counting")
    assert state is not None
    assert state.paused_at is None


@on_sqlite
def test_the_application_names_the_visitor(app: Flask, viewers_client: FlaskClient) -> None:
    names: list[str | None] = []
    app.before_request(lambda: names.append(user_name()))
    viewers_client.get("/workers/")
    assert names == ["nat@example.com"]

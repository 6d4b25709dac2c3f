"""The charts: each bar says its counts, the table has the same ones, and an empty chart is a sentence."""

import re
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, insert
from support.databases import close, on_sqlite
from support.fleet import Hourly, make_app, statements
from support.pages import Counting, Mailing, page, said

from background.dashboard.filters import length_text, percent_text
from background.database.tables import executions, message_errors, messages, workers
from background.testing.clock import Clock

EVIL = '"><b>bad'
NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


@pytest.fixture
def app(database_url: str) -> Any:
    app = make_app(database_url, Hourly, Counting, Mailing)
    with Clock(NOW):
        yield app
    close(app)


def titles(text: str) -> list[str]:
    return [unescape(each) for each in re.findall(r"<g><title>(.*?)</title>", text)]


def add_runs(engine: Engine, *states: str, worker: str = "hourly", took: float = 2.0) -> None:
    ended = NOW - timedelta(seconds=1)
    began = ended - timedelta(seconds=took)
    row = {"worker": worker, "tick": began - timedelta(seconds=1), "trigger": "schedule", "attempt": 1}
    with engine.begin() as connection:
        for state in states:
            connection.execute(
                insert(executions).values({**row, "state": state, "started_at": began, "finished_at": ended})
            )


def add_messages(engine: Engine) -> None:
    row = {"topic": "orders", "payload": "1", "enqueued_at": NOW - timedelta(seconds=9)}
    with engine.begin() as connection:
        for state, ended in (("done", NOW - timedelta(seconds=1)), ("waiting", None)):
            more = {"due_at": row["enqueued_at"], "state": state, "finished_at": ended}
            connection.execute(insert(messages).values({**row, **more}))
        failed = {"message": 2, "attempt": 1, "at": NOW - timedelta(seconds=5), "error": "no"}
        connection.execute(insert(message_errors).values(failed))


def roll(app: Flask) -> None:
    while app.extensions["background_workers"].stores.roll_up.step():
        pass


def test_the_page_of_the_fleet_has_the_runs_and_the_messages(app: Flask, client: FlaskClient, engine: Engine) -> None:
    add_runs(engine, "succeeded", "succeeded", "succeeded", "failed")
    add_messages(engine)
    roll(app)
    text = page(client, "/workers/charts")
    shown = said(text)
    assert "Runs by outcome 4 runs, 75 % succeeded" in shown
    assert "Duration p50 2 s, p95 2 s, max 2 s" in shown
    assert "Lateness p50 1 s, p95 1 s, max 1 s" in shown
    assert "Messages 2 enqueued, 1 done, 1 failed" in shown
    assert "Latency p50 8 s, p95 8 s, max 8 s" in shown
    assert [each.split(": ")[1] for each in titles(text)] == [
        "3 succeeded, 1 failed",
        "p50 2 s, p95 2 s, max 2 s",
        "p50 1 s, p95 1 s, max 1 s",
        "1 done, 1 failed, 2 enqueued",
        "p50 8 s, p95 8 s, max 8 s",
    ]
    assert "3 1 2 s 2 s 2 s 1 s 1 s 1 s" in shown, "the table"
    assert "2 1 1 0 0 8 s 8 s 8 s" in shown


@on_sqlite
def test_the_span_is_chosen_by_links_and_kept_in_the_address(app: Flask, client: FlaskClient, engine: Engine) -> None:
    add_runs(engine, "succeeded")
    roll(app)
    for span, bars in (("1h", 13), ("24h", 25), ("7d", 29), ("14d", 29)):
        text = page(client, f"/workers/charts?span={span}")
        assert f'href="/workers/charts?span={span}#charts" aria-current="true"' in text
        assert text.count('<th scope="row">') == bars
        assert len(titles(text)) == 3
    assert page(client, "/workers/charts?span=nonsense").count('<th scope="row">') == 25


@on_sqlite
def test_a_workers_page_has_the_charts_of_its_own_runs_and_keeps_the_rest_of_its_address(
    app: Flask, client: FlaskClient, engine: Engine
) -> None:
    add_runs(engine, "succeeded", "failed")
    add_runs(engine, "succeeded", worker="other")
    text = page(client, "/workers/worker/hourly?state=failed&span=1h")
    assert "Runs by outcome 2 runs, 50 % succeeded" in said(text)
    assert 'href="/workers/worker/hourly?state=failed&amp;span=7d#charts"' in text


@on_sqlite
def test_a_worker_without_runs_says_so_in_a_sentence(app: Flask, client: FlaskClient) -> None:
    roll(app)
    assert "Charts 1 hour 24 hours 7 days 14 days" in (shown := said(page(client, "/workers/worker/hourly")))
    assert "Last 24 hours No run ended." in shown
    assert "No run ended since" in shown


@on_sqlite
def test_the_charts_of_one_topic_are_reached_from_those_of_the_fleet(
    app: Flask, client: FlaskClient, engine: Engine
) -> None:
    add_runs(engine, "succeeded")
    add_messages(engine)
    roll(app)
    assert 'href="/workers/charts?span=1h&amp;topic=mail"' in page(client, "/workers/charts?span=1h")
    orders, mail = (said(page(client, f"/workers/charts?topic={topic}")) for topic in ("orders", "mail"))
    assert "Messages 2 enqueued, 1 done, 1 failed" in orders
    assert "Runs by outcome" not in orders
    assert "Messages of mail The whole fleet No message was enqueued or handled since" in mail
    assert client.get("/workers/charts?topic=%00").status_code == 404


@on_sqlite
def test_an_application_that_never_ran_says_so_in_a_sentence(app: Flask, client: FlaskClient) -> None:
    roll(app)
    shown = said(page(client, "/workers/charts"))
    assert "Runs of all workers No run ended since" in shown
    assert "Messages of all topics Charts of one topic: mail , orders No message was enqueued or handled since" in shown
    assert "not counted yet" not in shown


@on_sqlite
def test_the_time_before_the_first_count_is_named(client: FlaskClient) -> None:
    shown = said(page(client, "/workers/charts"))
    assert "is not counted yet. An instance counts it within minutes. Nothing is counted yet." in shown


@on_sqlite
def test_each_outcome_but_a_success_has_a_pattern_beside_its_colour(
    app: Flask, client: FlaskClient, engine: Engine
) -> None:
    add_runs(engine, "succeeded", "failed", "lost", "timed out", "handed back", "cancelled")
    text = page(client, "/workers/charts")
    for state in ("failed", "lost", "timed-out", "handed-back", "cancelled"):
        assert f'<pattern id="runs-state-{state}"' in text
        assert text.count(f'fill="url(#runs-state-{state})"') == 2, "in the bar and in the legend"
    assert 'id="runs-state-succeeded"' not in text


@on_sqlite
def test_a_single_failure_among_many_successes_is_visible(app: Flask, client: FlaskClient, engine: Engine) -> None:
    add_runs(engine, *["succeeded"] * 500, "failed")
    bar = re.search(
        r'class="state-failed" x="[^"]*" width="[^"]*" y="[^"]*" height="([^"]*)"', page(client, "/workers/charts")
    )
    assert bar
    assert float(bar[1]) >= 2


@on_sqlite
def test_a_state_that_a_user_typed_is_escaped(app: Flask, client: FlaskClient, engine: Engine) -> None:
    add_runs(engine, EVIL)
    text = page(client, "/workers/charts")
    assert EVIL not in text
    assert f"1 {EVIL}" in titles(text)[0]


@on_sqlite
def test_the_page_takes_as_many_queries_for_a_thousand_workers(app: Flask, client: FlaskClient, engine: Engine) -> None:
    def queries() -> int:
        with statements(Engine) as seen:
            page(client, "/workers/charts?span=14d")
        return len(seen)

    few = queries()
    for number in range(100):
        add_runs(engine, "succeeded", worker=f"worker_{number}")
    row = {"schedule": "every 60s", "declared": "every 60s", "scheduled_at": NOW}
    with engine.begin() as connection:
        connection.execute(insert(workers), [{"name": f"worker_{number}", **row} for number in range(1_000)])
    roll(app)
    assert queries() == few


def test_lengths_and_shares_are_short() -> None:
    lengths = [None, 0.0312345, 0.9999, 4.0512, 59.96, 123.4]
    assert list(map(length_text, lengths)) == ["–", "31.2 ms", "1000 ms", "4.05 s", "60 s", "2 min 3 s"]
    assert [percent_text(share) for share in (1.0, 0.99999, 0.5, 0.0)] == ["100 %", "99.9 %", "50 %", "0 %"]

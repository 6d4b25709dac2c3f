"""The overview shows the open incidents, each with a link to the rows behind it."""

from typing import Any

from flask.testing import FlaskClient
from sqlalchemy import Engine, insert, update
from support.alert_receiver import SECRET
from support.fleet import Fleet, Hourly, statements

from background.database.clock import now
from background.database.tables import incidents

ALARMS = {"ALERT_WEBHOOK": "http://127.0.0.1:9/", "ALERT_WEBHOOK_SECRET": SECRET}


def overview(fleet: Fleet, **config: Any) -> str:
    client: FlaskClient = fleet.app(Hourly, **config).test_client()
    return client.get("/workers/").text


def add(fleet: Fleet, *found: tuple[str, str, str]) -> None:
    rows = [{"kind": kind, "subject": subject, "detail": detail, "opened_at": now()} for kind, subject, detail in found]
    with fleet.engine.begin() as connection:
        for row in rows:
            connection.execute(insert(incidents).values(row))


def test_each_open_incident_links_to_its_rows(fleet: Fleet) -> None:
    add(
        fleet,
        ("failing", "hourly", "Its last run ended as failed: <b>no bread</b>"),
        ("dead", "bread", "2 messages are dead."),
        ("clock", "web-1", "It is 3.0 s ahead of the database's clock."),
    )
    page = overview(fleet, **ALARMS)
    assert "3 open incidents" in page
    assert '<a href="/workers/worker/hourly">The worker hourly is failing</a>' in page
    assert '<a href="/workers/messages?topic=bread&amp;state=dead">Messages of the topic bread died</a>' in page
    assert '<a href="/workers/instances">The clock of web-1 is off</a>' in page
    assert "&lt;b&gt;no bread" in page
    with fleet.engine.begin() as connection:
        connection.execute(update(incidents).values(ended_at=now()))
    assert "open incident" not in overview(fleet, **ALARMS)


def test_a_moment_in_an_incident_is_in_the_zone_of_the_viewer(fleet: Fleet) -> None:
    add(fleet, ("failing", "hourly", "It has failed since 2030-01-01T12:00:00Z."))
    assert 'When it opened: It has failed since <time datetime="2030-01-01T12:00:00+00:00"' in overview(fleet, **ALARMS)


def test_of_many_incidents_the_oldest_ten_are_shown(fleet: Fleet) -> None:
    add(fleet, *(("failing", f"worker_{number:02}", "It failed.") for number in range(11)))
    page = overview(fleet, **ALARMS)
    assert "11 open incidents" in page
    assert "worker_09" in page
    assert "worker_10" not in page
    assert "<code>flask workers alerts</code> lists all." in page


def test_without_alarms_the_page_has_no_query_for_incidents(fleet: Fleet) -> None:
    with statements(Engine) as seen:
        overview(fleet)
    assert seen
    assert not [each for each in seen if "background_incidents" in each]

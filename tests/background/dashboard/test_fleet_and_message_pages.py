"""The dashboard's pages of the fleet and of the messages: their contents and their buttons."""

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from flask.testing import FlaskClient
from sqlalchemy import Engine, insert, update
from support.alert_receiver import SECRET
from support.databases import on_sqlite
from support.fleet import Fleet, Hourly, last_hour, statements, states, wait_until

from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext
from background.dashboard.timeline import Bar, Timeline, draw
from background.database import tables
from background.history.records import InstanceRecord, Record, Window
from background.ledger.leases import Instance

LEASE = timedelta(seconds=30)
EVIL = "<script>alert('x')</script>"
NOON = datetime(2024, 6, 1, 12, tzinfo=UTC)
MINUTE, SECOND = timedelta(minutes=1), timedelta(seconds=1)


class Ticker(Hourly):
    """Leaves an effect."""


class OrderWorker(MessageWorker):
    topic = "orders"
    max_attempts = 1

    def handle(self, message: Message, context: WorkerContext) -> None:
        raise ValueError(f"no such book: {EVIL}")


@pytest.fixture
def manager(fleet: Fleet) -> BackgroundWorkerManager:
    return fleet.manager(Ticker, OrderWorker)


@pytest.fixture
def client(manager: BackgroundWorkerManager) -> FlaskClient:
    return manager.app.test_client()


def see(client: FlaskClient, path: str) -> str:
    answer = client.get(f"/workers/{path}")
    assert answer.status_code == 200, answer.text
    return str(answer.text)


def post(client: FlaskClient, path: str, **form: str) -> str:
    answer = client.post(f"/workers/{path}", data=form, follow_redirects=True)
    assert answer.status_code == 200, answer.text
    return str(answer.text)


def claim(manager: BackgroundWorkerManager, instance: Instance, at: datetime) -> Any:
    """Claim a tick of the Ticker as this instance."""
    schedule = manager.recovery.look(Ticker).schedule_text
    found = manager.stores.ledger.claim("ticker", at, schedule, (instance.id, instance.name))
    assert found is not None
    return found


def signed_on(manager: BackgroundWorkerManager, host: str, lease: timedelta = LEASE, pid: int = 1) -> Instance:
    instance = Instance(lease, host=host, pid=pid)
    manager.stores.leases.beat(instance)
    return instance


# -- the timeline --------------------------------------------------------------------------------


def test_a_lost_run_and_the_run_that_took_it_over_are_in_two_lanes_with_an_arrow(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    died = signed_on(manager, "dead-host", timedelta(seconds=-1))
    claim(manager, died, last_hour())
    manager.start()
    wait_until(lambda: fleet.states("ticker")[:2] == ["lost", "succeeded"], "the take-over")
    page = see(client, "timeline?window=5m")
    assert "† dead-host:1" in page
    assert re.search(r"ticker: tick \S+, lost after \S+ s on dead-host:1", page)
    assert re.search(r"ticker: tick \S+, attempt 2, succeeded after", page)
    assert page.count('<line class="bw-arrow state-lost"') == 1


@on_sqlite
def test_the_release_leaves_room_for_the_name_of_a_lost_instance(
    manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    died = Instance(timedelta(seconds=-1), host="dead-host", pid=1, release="1.2.3.4")
    manager.stores.leases.beat(died)
    claim(manager, died, last_hour())
    page = see(client, "timeline")
    assert "† dead-host:1</span></div>" in page
    assert "release 1.2.3.4" in page


@on_sqlite
def test_the_first_and_the_last_moment_of_the_axis_stay_in_the_picture(
    manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    ran(manager, NOON - MINUTE, worker="ticker")
    page = see(client, "timeline?window=5m&until=2024-06-01T12:00:00Z")
    anchors = re.findall(r'<text class="bw-axis" x="[0-9.]+%" y="14" text-anchor="(\w+)"', page)
    assert (anchors[0], anchors[1], anchors[-1]) == ("start", "middle", "end")


@on_sqlite
def test_a_run_that_was_handed_back_points_to_its_next_attempt(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    left = signed_on(manager, "left-host")
    manager.stores.ledger.end(claim(manager, left, last_hour()), "handed back", next_attempt=1)
    manager.stores.leases.sign_off(left)
    manager.start()
    wait_until(lambda: fleet.states("ticker")[:2] == ["handed back", "succeeded"], "the hand-over")
    page = see(client, "timeline")
    assert page.count('<line class="bw-arrow state-handed-back"') == 1
    assert "signed off" in page
    assert "†" not in page.partition("bw-legend")[0]


@on_sqlite
def test_the_timeline_of_one_worker_shows_no_other_worker(
    manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    claim(manager, signed_on(manager, "one-host"), last_hour())
    with manager.stores.main.engine.begin() as connection:
        connection.execute(insert(tables.workers).values(schedule_of("other")))
    assert "one-host:1" in see(client, "timeline?worker=ticker")
    assert "running for" not in see(client, "timeline?worker=other")
    assert client.get("/workers/timeline?worker=unknown").status_code == 404


@on_sqlite
def test_each_tick_that_did_not_run_leads_to_the_reason(manager: BackgroundWorkerManager, client: FlaskClient) -> None:
    ran(manager, NOON - MINUTE, worker="ticker")
    ran(manager, NOON, worker="ticker", state="missed", instance=None, started_at=None, through=NOON + 2 * MINUTE)
    link = '<a href="/workers/worker/ticker?at=2024-06-01T12:02:00Z#why"'
    assert see(client, "timeline?worker=ticker&until=2024-06-01T12:01:00Z&table=1").count(link) == 2


@on_sqlite
def test_a_tick_that_waits_is_below_the_live_picture_with_a_link_to_the_reason(
    manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    manager.recovery.look(Ticker)
    with manager.stores.main.engine.begin() as connection:
        connection.execute(update(tables.workers).values(scheduled_at=last_hour() - timedelta(hours=2)))
    at = f"{last_hour() - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    for query in ("", "?worker=ticker"):
        page = see(client, f"timeline{query}")
        assert "Ticks that wait" in page
        assert f'<a class="bw-nowrap" href="/workers/worker/ticker?at={at}#why">Why?</a>' in page
    assert "Ticks that wait" not in see(client, "timeline?until=2024-06-01T12:00Z")
    for number in range(11):
        manager.add(type("Another", (Hourly,), {"name": f"another_{number}"}))
    with manager.stores.main.engine.begin() as connection:
        rows = [{**schedule_of(f"another_{number}"), "schedule": "every 60s"} for number in range(11)]
        connection.execute(insert(tables.workers), rows)
    page = see(client, "timeline")
    assert page.count(">Why?</a>") == 10
    assert '<a href="/workers/?state=overdue">2 more</a>' in page


@on_sqlite
def test_ticks_without_a_row_have_a_mark_that_leads_to_the_reason_and_take_two_queries(
    manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    known_since_morning(manager, "ticker")
    minutes = [NOON + number * MINUTE for number in range(-20, 20)]
    ran(manager, *(at for at in minutes if not NOON < at < NOON + 4 * MINUTE), worker="ticker")
    for query in ("", "&worker=ticker"):
        with statements(Engine) as seen:
            page = see(client, f"timeline?until=2024-06-01T12:05:00Z&table=1{query}")
        assert "ticker: tick 2024-06-01T12:01:00Z to 2024-06-01T12:03:00Z, no execution" in page
        assert page.count('<a href="/workers/worker/ticker?at=2024-06-01T12:03:00Z#why"') == 2
        with statements(Engine) as of_no_gap:
            page = see(client, f"timeline?until=2024-06-01T12:00:00Z&table=1{query}")
        assert ", no execution" not in page
        assert len(seen) == len(of_no_gap) + 2


def test_a_row_that_was_written_after_the_window_explains_its_ticks(
    manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    known_since_morning(manager, "ticker")
    ran(manager, NOON - 10 * MINUTE, worker="ticker")
    out = {"through": NOON + 10 * MINUTE, "instance": None, "started_at": None, "state": "missed"}
    later = NOON + 30 * MINUTE
    ran(manager, later, worker="other")
    ran(manager, NOON - 9 * MINUTE, worker="ticker", finished_at=later, **out)
    ran(manager, NOON + 11 * MINUTE, NOON + 12 * MINUTE, worker="ticker", started_at=later)
    page = see(client, "timeline?until=2024-06-01T12:05:00Z")
    assert "ticker: tick 2024-06-01T11:51:00Z to 2024-06-01T12:10:00Z, missed" in page
    page = see(client, "timeline?until=2024-06-01T12:13:30Z")
    assert "to 2024-06-01T12:10:00Z, missed" in page
    assert "ticker: tick 2024-06-01T12:13:00Z, no execution" in page


@on_sqlite
def test_only_the_newest_gaps_of_workers_that_this_release_runs_have_a_mark(
    manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    names = [f"another_{number:02}" for number in range(25)]
    for name in names:
        manager.add(type("Another", (Hourly,), {"name": name, "enabled": name != "another_24"}))
    known_since_morning(manager, *names, "of_another_release")
    for name in [*names, "of_another_release"]:
        ran(manager, NOON, worker=name)
    page = see(client, "timeline?until=2024-06-01T12:05:00Z")
    assert page.count(", no execution</title>") == 20
    assert "Only the newest 20 gaps" in page
    for name in ("another_24", "of_another_release"):
        assert ", no execution" not in see(client, f"timeline?until=2024-06-01T12:05:00Z&worker={name}")
    assert ", no execution" in see(client, "timeline?until=2024-06-01T12:05:00Z&worker=another_00")


def known_since_morning(manager: BackgroundWorkerManager, *names: str) -> None:
    """Insert the workers, each with a tick every minute."""
    rows = [schedule_of(name) | {"schedule": "every 60s", "scheduled_at": NOON - HOURS} for name in names]
    with manager.stores.main.engine.begin() as connection:
        connection.execute(insert(tables.workers), rows)


def schedule_of(name: str) -> dict[str, Any]:
    return {"name": name, "schedule": "every 60 s", "declared": "every 60 s", "scheduled_at": NOON}


def ran(manager: BackgroundWorkerManager, *starts: datetime, length: timedelta = SECOND, **more: Any) -> None:
    """Insert runs that began at `starts`, by an instance whose row is gone."""
    rows = [
        {"worker": "w", "tick": at, "trigger": "schedule", "state": "succeeded", "attempt": 1}
        | {"instance": "old", "instance_name": "old-host:1", "started_at": at, "finished_at": at + length}
        | more
        for at in starts
    ]
    with manager.stores.main.engine.begin() as connection:
        connection.execute(insert(tables.executions), rows)


@on_sqlite
def test_a_note_has_moments_in_the_format_of_the_commands(
    manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    ran(manager, NOON, worker="ticker", state="skipped", reason=f"still running the tick {NOON.isoformat()} on a:1")
    page = re.sub("</?time[^>]*>", "", see(client, "worker/ticker"))
    assert f"still running the tick {NOON:%Y-%m-%dT%H:%M:%S}Z on a:1" in page


def test_an_earlier_window_shows_only_runs_of_its_time(manager: BackgroundWorkerManager) -> None:
    minutes = [NOON + number * MINUTE for number in range(60)]
    ran(manager, *minutes)
    found = manager.history.window(5 * MINUTE, NOON + timedelta(minutes=30, seconds=30))
    assert [record.tick for record in found.records] == minutes[26:31]
    assert found.is_complete
    assert manager.history.window(5 * MINUTE, NOON - MINUTE).records == ()
    assert manager.history.window(5 * MINUTE, worker="w").records == ()
    before = manager.history.window(5 * MINUTE, minutes[20] + SECOND / 2, worker="w")
    assert [record.tick for record in before.records] == minutes[15:21]


def test_only_the_newest_runs_are_shown_and_the_page_says_since_when(manager: BackgroundWorkerManager) -> None:
    ran(manager, *(NOON + number * SECOND for number in range(60)))
    found = manager.history.window(MINUTE, NOON + 50 * SECOND, limit=10)
    assert [record.tick for record in found.records] == [NOON + number * SECOND for number in range(41, 51)]
    assert not found.is_complete
    assert found.complete_since == NOON + 41 * SECOND
    assert 0 < draw(found).veil < 100


def test_a_run_from_long_ago_that_is_still_going_on_is_seen(manager: BackgroundWorkerManager) -> None:
    ran(manager, NOON, state="running", finished_at=None, worker="long", token=1)
    with manager.stores.main.engine.begin() as connection:
        connection.execute(insert(tables.workers).values(schedule_of("long") | {"token": 1, "running": 1}))
    ran(manager, *(NOON + HOURS + number * SECOND for number in range(5)))
    for until in (None, NOON + HOURS + MINUTE):
        assert "long" in {each.worker for each in manager.history.window(5 * MINUTE, until, limit=2).records}


HOURS = timedelta(hours=5)


# -- the drawing ---------------------------------------------------------------------------------

_OF_RUN = (1, "w", NOON, None, "schedule", "succeeded", 1, 1, "a", "a:1", NOON, NOON)
RUN = Record(*_OF_RUN, None, None, None, None, None, NOON + MINUTE)
SEEN = InstanceRecord("a", "a", 1, NOON - HOURS, NOON + MINUTE, None)


def drawn(*records: Record, seen: tuple[InstanceRecord, ...] = (SEEN,)) -> Timeline:
    """Draw the minute after noon."""
    return draw(Window(NOON, NOON + MINUTE, NOON + MINUTE, records, NOON, seen))


def bars(picture: Timeline) -> list[Bar]:
    return [bar for lane in picture.lanes for bar in lane.bars]


def run(number: int, start: float, seconds: float | None, **more: Any) -> Record:
    started = NOON + start * SECOND
    finished = None if seconds is None else started + seconds * SECOND
    times = {"tick": started, "started_at": started, "finished_at": finished}
    return RUN._replace(id=number, token=number, **times | more)


def test_a_bar_goes_from_the_start_to_the_end_and_for_a_running_execution_to_now() -> None:
    ended, running = bars(drawn(run(1, 15, 30), run(2, 30, None, worker="x", state="running")))
    assert ended.x == pytest.approx(0.6 + 97.8 / 4)
    assert ended.width == pytest.approx(97.8 / 2)
    assert running.x + running.width == pytest.approx(98.4)


def test_a_run_shorter_than_a_pixel_is_visible_and_an_earlier_start_is_drawn_at_the_edge() -> None:
    short, early = bars(drawn(run(1, 15, 0.001), run(2, -600, 610, worker="x")))
    assert short.width > 0.3
    assert (early.x, early.tick_x) == (0.6, None)


def test_the_bar_of_a_lost_run_ends_at_the_last_heartbeat_of_its_instance() -> None:
    gone = replace(SEEN, heartbeat_at=NOON + 20 * SECOND, is_alive=False)
    (lost,) = bars(drawn(run(1, 10, 40, state="lost"), seen=(gone,)))
    assert lost.x + lost.width == pytest.approx(0.6 + 97.8 / 3)
    assert lost.end_x == pytest.approx(0.6 + 97.8 * 50 / 60)


def test_attempts_at_one_tick_are_connected_and_attempts_at_two_ticks_are_not() -> None:
    first, second = run(1, 0, 10, state="failed"), run(2, 20, 5, attempt=2, tick=NOON)
    assert len(drawn(first, second).arrows) == 1
    assert not drawn(first, second._replace(tick=NOON + SECOND)).arrows
    assert not drawn(first._replace(state="succeeded"), second).arrows


def test_few_workers_have_a_row_each_and_many_share_rows_without_an_overlap() -> None:
    few = drawn(run(1, 0, 10), run(2, 20, 10, worker="x"))
    assert [name for name, _ in few.lanes[0].rows] == ["w", "x"]
    many = drawn(*(run(number, number % 30, 1.5, worker=f"w{number}") for number in range(1, 60)))
    assert many.lanes[0].rows == ()
    spans = sorted((bar.y, bar.record.began_at, bar.record.ended_at) for bar in bars(many))
    assert all(one[0] < two[0] or one[2] <= two[1] for one, two in pairwise(spans))
    assert len({y for y, _, _ in spans}) == 4  # as many as ran at the same time


def test_many_instances_have_a_lane_only_if_they_did_something() -> None:
    seen = tuple(replace(SEEN, id=f"i{number}", pid=number) for number in range(100))
    picture = drawn(run(1, 0, 1, instance="i7"), seen=seen)
    assert [lane.label for lane in picture.lanes] == ["a:7"]
    assert picture.idle == 99
    assert len(drawn(run(1, 0, 1, instance="i7"), seen=seen[5:10]).lanes) == 5


def test_ticks_that_no_instance_ran_have_a_lane_of_their_own() -> None:
    missed = RUN._replace(state="missed", instance=None, started_at=None, through=NOON + 30 * SECOND, attempt=None)
    lane = drawn(run(1, 0, 1), missed).lanes[-1]
    assert lane.label == "not run"
    assert lane.bars[0].title == "w: tick 2024-06-01T12:00:00Z to 2024-06-01T12:00:30Z, missed"


# -- the instances -------------------------------------------------------------------------------


def test_the_page_of_instances_shows_their_runs_and_which_instances_are_gone(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    holder, left = signed_on(manager, "holder"), signed_on(manager, "left")
    signed_on(manager, "lost-host", -LEASE)
    manager.stores.leases.sign_off(left)
    execution = claim(manager, holder, last_hour()).execution
    fleet.enqueue("orders", 1, 2)
    manager.stores.queue.claim("order_worker", "orders", 2, (holder.id, holder.name))
    with manager.stores.main.engine.begin() as connection:
        progress = {"progress_done": 700, "progress_total": 1000}
        connection.execute(update(tables.executions).where(tables.executions.c.id == execution).values(progress))
    with manager.stores.leases.engine.begin() as connection:
        of_holder = tables.instances.c.id == holder.id
        connection.execute(update(tables.instances).where(of_holder).values(clock_offset=-1.5, release="3f2a91c"))
        locked = {"instance": holder.id, "instance_name": holder.name, "since": NOON}
    with manager.locks.single.begin() as connection:
        connection.execute(insert(tables.locks).values(name="invoice-42", token=1, holder="h", **locked))
    rows = {
        row.partition("</th>")[0].rpartition('"row">')[2].split(" ")[0]: row
        for row in see(client, "instances").split("<tr")
    }
    alive = rows["holder:1"]
    for text in ("alive", "3f2a91c", "+1.500 s: set it right", "ticker", "700 of 1,000", "2 messages", "invoice-42"):
        assert text in alive
    assert ">lost<" in rows["lost-host:1"]
    assert ">signed off<" in rows["left:1"]


@on_sqlite
def test_of_the_instances_that_left_only_a_few_and_those_that_hold_something_are_not_folded(
    manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    holder = signed_on(manager, "holder", -LEASE)
    claim(manager, holder, last_hour())
    for number in range(18):
        manager.stores.leases.sign_off(signed_on(manager, f"left-{number}", pid=number))
    signed_on(manager, "alive")
    shown, _, folded = see(client, "instances").partition("<summary>16 earlier instances</summary>")
    names = re.findall(r'<th scope="row">([\w-]+):', shown)
    assert names[:2] == ["alive", "holder"]
    assert len(names) == 4
    assert len(re.findall(r'<th scope="row">left', folded)) == 16


# -- the messages --------------------------------------------------------------------------------


def bury(fleet: Fleet, count: int, topic: str = "orders", error: str = "ValueError: bad") -> list[int]:
    """Insert `count` dead letters. Return their ids."""
    ids = [id for id in fleet.enqueue("orders", *range(count)) if id]
    with fleet.engine.begin() as connection:
        dead = update(tables.messages).where(tables.messages.c.id.in_(ids))
        connection.execute(dead.values(state="dead", attempt=1, finished_at=datetime.now(UTC), topic=topic))
        rows = [{"message": id, "attempt": 1, "at": datetime.now(UTC), "error": error} for id in ids]
        connection.execute(insert(tables.message_errors), rows)
    return ids


@on_sqlite
def test_a_message_that_died_is_shown_with_its_error_and_can_be_retried(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    (id,) = fleet.enqueue("orders", {"note": EVIL}, key="k-1")
    manager.start()
    wait_until(lambda: states(fleet) == ["dead"], "its death")
    manager.stop()
    assert "ValueError: no such book: &lt;script&gt;" in see(client, "messages?topic=orders")
    page = see(client, f"messages/{id}")
    for text in ("Traceback (most recent call last)", "k-1", "order_worker", "&#34;note&#34;: &#34;&lt;script&gt;"):
        assert text in page
    form = {"id": str(id), "next": f"/workers/messages/{id}"}
    assert "1 message waits again." in post(client, "messages/change", do="retry", **form)
    assert states(fleet) == ["waiting"]
    assert "1 message is discarded." in post(client, "messages/change", do="discard", **form)
    assert states(fleet) == ["discarded"]
    page = post(client, "messages/change", do="discard", **form)
    assert "No message was changed. 1 stayed as it was" in page


@on_sqlite
def test_all_messages_that_match_are_changed_after_the_box_is_ticked(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    bury(fleet, 3)
    bury(fleet, 1, topic="old topic")
    page = see(client, "messages?topic=orders&state=dead")
    assert "3 messages match." in page
    assert "All 3 that match" in page
    everything = {"topic": "orders", "state": "dead"}
    assert "Nothing was changed" in post(client, "messages/change", do="discard all", **everything)
    assert states(fleet) == ["dead"] * 4
    confirmed = everything | {"confirmed": "yes"}
    assert "3 messages wait again." in post(client, "messages/change", do="retry all", **confirmed)
    everything = {"topic": "old topic", "confirmed": "yes"}
    assert "Choose the topic" in post(client, "messages/change", do="move all", **everything)
    assert "1 message waits in orders." in post(client, "messages/change", do="move all", to="orders", **everything)
    assert [(row.topic, row.state) for row in fleet.messages()] == [("orders", "waiting")] * 4
    for form, status in (({}, 400), ({"do": "fold"}, 400), ({"do": "move", "to": "\0"}, 404)):
        assert client.post("/workers/messages/change", data=form).status_code == status


@on_sqlite
def test_no_message_moves_to_a_topic_of_the_alerts(fleet: Fleet) -> None:
    config = {"ALERT_WEBHOOK": "http://127.0.0.1:9/", "ALERT_WEBHOOK_SECRET": SECRET}
    client = fleet.app(OrderWorker, **config).test_client()
    (id,) = bury(fleet, 1, topic="old topic")
    for path in ("messages", f"messages/{id}"):
        targets = see(client, path).partition('name="to"')[2].partition("</select>")[0]
        assert "<option>orders</option>" in targets
        assert "alert_webhook" not in targets
    for form in ({"do": "move", "id": str(id)}, {"do": "move all", "confirmed": "yes"}):
        page = post(client, "messages/change", to="alert_webhook", **form)
        assert "alert_webhook takes only the engine&#39;s alerts: choose a topic of the application." in page
    assert [(row.topic, row.state) for row in fleet.messages()] == [("old topic", "dead")]


@on_sqlite
def test_only_the_selected_messages_are_changed(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    one, two, _ = bury(fleet, 3)
    chosen = {"do": "discard", "id": [str(one), str(two), "x", "9" * 40]}
    answer = client.post("/workers/messages/change", data=chosen, follow_redirects=True)
    assert "2 messages are discarded." in answer.text
    assert states(fleet) == ["discarded", "discarded", "dead"]


def test_the_messages_are_paged_from_the_newest_to_the_oldest(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    ids, seen, path = bury(fleet, 60), [], "messages?topic=orders&state=dead"
    while path:
        page = see(client, path)
        seen += [int(id) for id in re.findall(r'<tr id="message-(\d+)"', page)]
        following = re.search(r'rel="next" href="/workers/(messages\?[^"#]*)', page)
        path = following[1].replace("&amp;", "&") if following else ""
    assert seen == ids[::-1]
    assert "First page" in page


@on_sqlite
def test_a_row_shows_the_payload_the_key_and_the_reason_of_its_state(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    fleet.enqueue("orders", {"note": EVIL * 20}, key="k-1")
    fleet.enqueue("orders", 2, delay=60)
    with fleet.engine.begin() as connection:
        is_second = tables.messages.c.payload == "2"
        connection.execute(update(tables.messages).where(is_second).values(postponed=2, postponed_because="closed"))
    page = see(client, "messages")
    for text in (
        "&#34;note&#34;:&#34;&lt;script&gt;",
        "key <code>k-1</code>",
        "postponed 2 times: closed",
        "until <time",
    ):
        assert text in page
    page = see(client, "messages?text=script&error=&key=&age=1h")
    assert "1 message matches. Of each payload, the first 4,000 characters were searched." in page
    assert "No message matches." in see(client, "messages?text=nothing")
    assert 'value="nothing"' in see(client, "messages?text=nothing")
    assert client.get("/workers/messages?topic=nothing").status_code == 404
    for nonsense in (
        "after=x~1",
        "after=2024-06-01T12:00:00Z~x",
        "state=x",
        "text=%00",
        "after=2024-06-01T12:00:00Z~" + "9" * 40,
    ):
        assert client.get(f"/workers/messages?{nonsense}").status_code == 200


@on_sqlite
def test_errors_are_shown_in_groups_that_lead_to_their_messages(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    bury(fleet, 3, error="Traceback\nOSError: <jam>")
    bury(fleet, 1, error="ValueError: 50%")
    page = see(client, "messages")
    assert "Errors of dead messages" in page
    found = re.search(
        r'href="/workers/(messages\?[^"#]*)[^"]*"><code>OSError: &lt;jam&gt;</code></a></th>\s*'
        r'<td data-label="Messages" class="bw-number">3</td>',
        page,
    )
    assert found
    assert "3 messages match." in see(client, found[1].replace("&amp;", "&"))
    assert "Errors of" not in see(client, "messages?state=retrying")


@on_sqlite
def test_a_copy_is_enqueued_without_the_key(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    (id,) = fleet.enqueue("orders", {"book": [1, "ä"]}, key="k-1")
    assert f"is a copy of message {id}." in post(client, f"messages/{id}/copy")
    first, second = fleet.messages()
    assert (second.topic, second.payload, second.key, second.state) == ("orders", first.payload, None, "waiting")
    (foreign,) = bury(fleet, 1, topic="old topic")
    assert "Enqueue a copy" not in see(client, f"messages/{foreign}")
    assert client.post(f"/workers/messages/{foreign}/copy").status_code == 404
    assert client.post("/workers/messages/99/copy").status_code == 404


def test_the_topics_show_their_depth_their_worker_and_their_done_messages(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    fleet.enqueue("orders", 1, 2)
    fleet.enqueue("orders", 3, delay=60)
    bury(fleet, 2, topic="old topic")
    done(fleet, 30, SECOND)
    (orders, old) = (topic_row(see(client, "messages"), topic) for topic in ("orders", "old topic"))
    assert orders == ["3", "1", "0", "0", "0", "ago", "30", "30", "Pause"]
    assert old == ["0", "0", "0", "0", "2", "", "0", "0", "Pause"]


@on_sqlite
def test_a_topic_is_paused_and_resumed_by_its_button(manager: BackgroundWorkerManager, client: FlaskClient) -> None:
    assert "orders is paused: its messages wait." in post(client, "messages/pause", topic="orders")
    page = post(client, "messages/pause", topic="orders")
    assert "orders was paused already." in page
    assert re.search(r'paused</span> <span class="[^"]*">since <time', page)
    assert 'aria-label="Resume orders"' in page
    assert "orders is resumed: its messages are handled." in post(client, "messages/resume", topic="orders")
    assert "orders was not paused." in post(client, "messages/resume", topic="orders")
    for topic, status in (("", 400), ("mail", 404), ("\0", 404)):
        assert client.post("/workers/messages/pause", data={"topic": topic}).status_code == status


def topic_row(page: str, topic: str) -> list[str]:
    row = page.partition(f'<th scope="row">{topic} ')[2].partition("</tr>")[0]
    cells = [" ".join(re.sub(r"<[^>]*>", "", cell).split()) for cell in re.findall(r"<td.*?</td>", row, re.S)]
    return [re.sub(r"^\S+ s ago$", "ago", cell) for cell in cells]


def done(fleet: Fleet, count: int, apart: timedelta) -> None:
    """Insert `count` done messages, the newest from a moment ago."""
    now = datetime.now(UTC) - SECOND
    rows = [
        {"topic": "orders", "payload": "1", "state": "done", "enqueued_at": now, "due_at": now}
        | {"finished_at": now - number * apart}
        for number in range(count)
    ]
    with fleet.engine.begin() as connection:
        connection.execute(insert(tables.messages), rows)


def test_a_high_throughput_is_estimated_from_the_newest_messages(
    fleet: Fleet, manager: BackgroundWorkerManager
) -> None:
    done(fleet, 6_000, timedelta(milliseconds=20))
    [orders] = manager.messages.figures()
    assert orders.is_estimate
    assert orders.per_minute == pytest.approx(3_000, rel=0.2)  # inserting them took a while
    assert orders.handled == pytest.approx(180_000, rel=0.2)


@pytest.mark.parametrize(
    ("count", "apart", "per_minute"), [(6_000, timedelta(milliseconds=5), 12_000), (3, timedelta(minutes=5), 1)]
)
def test_the_overview_counts_the_messages_of_a_minute_like_the_other_pages(
    fleet: Fleet, manager: BackgroundWorkerManager, count: int, apart: timedelta, per_minute: int
) -> None:
    done(fleet, count, apart)
    [orders], [same] = manager.messages.rates(), manager.messages.figures()
    assert orders.per_minute == pytest.approx(per_minute, rel=0.2)  # inserting them took a while
    assert same.per_minute == pytest.approx(orders.per_minute, rel=0.2)


# -- all of them ---------------------------------------------------------------------------------

PAGES = ["timeline", "timeline?until=2024-06-01T12:05:00Z&window=1h", "instances", "messages", "messages?topic=orders"]


@on_sqlite
def test_no_name_is_read_as_html(fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient) -> None:
    evil = signed_on(manager, EVIL)
    (id,) = bury(fleet, 1, topic=EVIL, error=EVIL)
    with manager.stores.main.engine.begin() as connection:
        connection.execute(insert(tables.workers).values(schedule_of(EVIL) | {"token": 1, "running": 1}))
    running = {"state": "running", "finished_at": None, "token": 1, "worker": EVIL}
    ran(manager, NOON, instance=evil.id, instance_name=evil.name, **running)
    ran(manager, NOON + MINUTE, worker=f'w" onload="{EVIL}', instance=None, instance_name=f"{EVIL}:1")
    with manager.stores.leases.engine.begin() as connection:
        connection.execute(update(tables.instances).values(release=EVIL[:100]))
    for path in (*PAGES, f"messages/{id}", "timeline?worker=%3Cscript%3Ealert('x')%3C/script%3E"):
        page = see(client, path)
        assert EVIL not in page, path
        assert 'onload="' not in page, path
        assert "&lt;script&gt;" in page or path.endswith("orders"), path


FINE = [
    "timeline?until=nonsense",
    "timeline?until=0001-01-01T00:00:00%2B23:59",
    "timeline?until=9999-12-31T23:59:59-23:59",
    "timeline?until=1900-01-01&window=6h",
    "timeline?window=abc",
    "timeline?window=",
    "timeline?worker=",
    "instances?x=%00%ff",
    "timeline?until=2024-06-01T12:00:00+00:00",
    "messages?before=abc",
    "messages?before=-1",
    "messages?topic=",
    "messages?before=99999999999999999999999",
    "messages?before=9223372036854775807&topic=orders",
]
MISSING = [
    "timeline?worker=%00",
    "timeline?worker=<script>",
    "messages?topic=<script>",
    "messages?topic=%00",
    "messages/0",
    "messages/1",
    "messages/-1",
    "messages/9223372036854775808",
    "messages/99999999999999999999999999",
    "messages/x",
]


def test_an_invalid_address_shows_the_usual_page_or_not_found(client: FlaskClient) -> None:
    answers = {query: client.get(f"/workers/{query}").status_code for query in (*FINE, *MISSING)}
    assert answers == dict.fromkeys(FINE, 200) | dict.fromkeys(MISSING, 404)


@on_sqlite
def test_an_id_that_no_message_has_can_be_neither_retried_nor_discarded(client: FlaskClient) -> None:
    for id in ("0", "7", "99999999999999999999999"):
        for what in ("retry", "discard"):
            assert client.post(f"/workers/messages/{id}/{what}").status_code == 404


def test_a_page_costs_as_many_queries_with_much_in_the_database_as_with_little(
    fleet: Fleet, manager: BackgroundWorkerManager, client: FlaskClient
) -> None:
    def queries() -> dict[str, int]:
        counts = {}
        for path in PAGES:
            with statements(Engine) as seen:
                see(client, path)
            counts[path] = len(seen)
        return counts

    def fill(count: int) -> None:
        for _ in range(count):
            number = len(fleet.messages())
            instance = signed_on(manager, f"host-{number}")
            bury(fleet, 1, topic=f"topic {number % 7}")
            running = {"state": "running", "finished_at": None, "token": 1, "worker": f"worker-{number}"}
            row = schedule_of(running["worker"]) | {"token": 1, "running": 1}
            with manager.stores.main.engine.begin() as connection:
                connection.execute(insert(tables.workers).values(row))
            ran(manager, NOON + number * SECOND, instance=instance.id, instance_name=instance.name, **running)

    fill(1)
    few = queries()
    fill(20)
    assert queries() == few
    assert max(few.values()) <= 8


@on_sqlite
def test_a_button_of_an_application_below_a_prefix_leads_back_to_the_filtered_list(client: FlaskClient) -> None:
    below = {"SCRIPT_NAME": "/shop"}
    page = client.get("/workers/messages?topic=orders", environ_overrides=below).text
    [address] = set(re.findall(r'name="next" value="([^"]+)"', page))
    answer = client.post("/workers/messages/pause", data={"topic": "orders", "next": address}, environ_overrides=below)
    assert answer.location == "/shop/workers/messages?topic=orders"

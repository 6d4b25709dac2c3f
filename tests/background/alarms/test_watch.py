"""One alert when an incident opens, and one when it ends, however many instances see it."""

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select, text, update
from support.alert_receiver import SECRET, Receiver
from support.fleet import HOUR, Fleet, Hourly, at_once, last_hour, statements, wait_until
from support.processes import PATIENCE

from background import BackgroundWorkerManager, Bury, InvalidConfig, Message, MessageWorker
from background.alarms import delivery
from background.alarms.alert import title, trial
from background.alarms.findings import Finding, Findings
from background.alarms.incidents import CALM, Incident
from background.alarms.watch import FleetWatch
from background.database import tables
from background.database.clock import now
from background.ledger.leases import Instance
from background.settings import settle


class Broken(Hourly):
    is_broken = True

    def do_work(self, context: Any) -> None:
        if self.is_broken:
            raise ValueError("no bread")


class Baking(MessageWorker):
    topic = "bread"
    max_attempts = 1
    batch_size = 1

    def handle(self, message: Message, context: Any) -> None:
        raise ValueError(f"burnt: {message.payload}")


@pytest.fixture(autouse=True)
def broken() -> None:
    Broken.is_broken = True


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def webhook(receiver: Receiver) -> dict[str, str]:
    return {"ALERT_WEBHOOK": f"{receiver.url}/alerts", "ALERT_WEBHOOK_SECRET": SECRET}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FleetWatch, "every", timedelta(seconds=0.2))


def look(manager: BackgroundWorkerManager) -> None:
    """Look now, regardless of the moment of the last look."""
    watch_of(manager).look_now()


def watch_of(manager: BackgroundWorkerManager) -> FleetWatch:
    assert isinstance(manager.watch, FleetWatch)
    return manager.watch


def alerts(fleet: Fleet) -> list[dict[str, Any]]:
    return [json.loads(row.payload)["alert"] for row in fleet.messages() if row.topic == "alert_webhook"]


def titles(fleet: Fleet) -> list[str]:
    return [each["title"] for each in alerts(fleet)]


def forget_the_calm(fleet: Fleet) -> None:
    """Have the ended incidents be old enough to open again."""
    with fleet.engine.begin() as connection:
        ended = tables.incidents.c.ended_at.is_not(None)
        connection.execute(update(tables.incidents).where(ended).values(ended_at=now(-CALM)))


def run(manager: BackgroundWorkerManager, *outcomes: str) -> None:
    """Run the broken worker until it has these outcomes."""
    for outcome in outcomes:
        Broken.is_broken = outcome == "failed"
        execution = manager.trigger("broken")
        assert execution is not None
        assert execution.state == outcome


FAILS, WORKS = "The worker broken is failing", "The worker broken is no longer failing"


def test_a_worker_that_fails_three_times_in_a_row_is_one_incident(fleet: Fleet, webhook: dict[str, str]) -> None:
    manager = fleet.manager(Broken, **webhook)
    run(manager, "failed", "failed", "succeeded", "failed", "failed")
    look(manager)
    assert titles(fleet) == []
    run(manager, "failed", "failed")
    look(manager)
    look(manager)
    assert titles(fleet) == [FAILS]
    assert alerts(fleet)[0]["detail"].endswith("Its last run ended as failed: ValueError: no bread")
    run(manager, "succeeded")
    look(manager)
    look(manager)
    assert titles(fleet) == [FAILS, WORKS]
    assert alerts(fleet)[0]["id"] != alerts(fleet)[1]["id"]


def test_an_alert_names_the_first_failure_in_a_row(fleet: Fleet, webhook: dict[str, str]) -> None:
    manager = fleet.manager(Broken, **webhook)
    run(manager, "failed", "succeeded", *["failed"] * 5)
    with fleet.engine.begin() as connection:  # each run ended at a minute of its own
        ids = connection.scalars(select(tables.executions.c.id).order_by(tables.executions.c.id)).all()
        for minute, id in enumerate(ids):
            at = datetime(2030, 1, 1, 12, minute, tzinfo=UTC)
            connection.execute(update(tables.executions).where(tables.executions.c.id == id).values(finished_at=at))
    look(manager)
    (alert,) = alerts(fleet)
    assert alert["detail"].startswith("It has failed since 2030-01-01T12:02:00Z.")


def test_a_worker_that_fails_and_succeeds_in_turn_alerts_once_within_ten_minutes(
    fleet: Fleet, webhook: dict[str, str]
) -> None:
    manager = fleet.manager(Broken, **webhook, ALERT_AFTER_FAILURES=1)
    for _ in range(3):
        run(manager, "failed")
        look(manager)
        run(manager, "succeeded")
        look(manager)
    assert titles(fleet) == [FAILS, WORKS]
    run(manager, "failed")
    forget_the_calm(fleet)
    look(manager)
    assert titles(fleet) == [FAILS, WORKS, FAILS]


def test_two_instances_at_once_open_and_end_one_incident(fleet: Fleet, webhook: dict[str, str]) -> None:
    managers = [fleet.manager(Broken, **webhook, ALERT_AFTER_FAILURES=1) for _ in range(2)]

    def both_look() -> None:
        assert at_once(2, lambda number: look(managers[number]) or "without an error") == ["without an error"] * 2

    for _ in range(3):
        run(managers[0], "failed")
        both_look()
        run(managers[0], "succeeded")
        both_look()
        forget_the_calm(fleet)
    assert titles(fleet) == [FAILS, WORKS] * 3


def test_an_instance_that_looked_before_does_not_end_a_newer_incident(fleet: Fleet, webhook: dict[str, str]) -> None:
    slow, quick = (fleet.manager(Broken, **webhook, ALERT_AFTER_FAILURES=1) for _ in range(2))
    found: list[Any] = []

    class Slow(Findings):
        def look(self, *arguments: Any) -> list[Any]:
            found[:] = super().look(*arguments)
            run(quick, "failed")
            look(quick)
            return found

    watch_of(slow)._findings = lambda: Slow(slow.stores, slow.workers, 1)  # type: ignore[method-assign]
    look(slow)
    assert found == []
    assert titles(fleet) == [FAILS]


def test_an_incident_whose_alert_cannot_be_enqueued_does_not_open(
    fleet: Fleet, webhook: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = fleet.manager(Broken, **webhook, ALERT_AFTER_FAILURES=1)
    run(manager, "failed")
    with monkeypatch.context() as patch:
        patch.setattr(delivery, "enqueue", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            look(manager)
    assert watch_of(manager).incidents.current() == []
    look(manager)
    assert titles(fleet) == [FAILS]


def test_one_instance_of_the_fleet_looks_in_each_interval(fleet: Fleet, webhook: dict[str, str]) -> None:
    managers = [fleet.manager(Broken, **webhook) for _ in range(4)]
    every = timedelta(minutes=1)
    for _ in range(3):
        looks = at_once(4, lambda number: watch_of(managers[number]).incidents.claim_look(every))
        assert sorted(looks) == [False, False, False, True]
        with fleet.engine.begin() as connection:
            connection.execute(update(tables.chores).values(until=now(-every)))
    assert watch_of(managers[0]).incidents.current() == []


def test_dead_messages_of_a_topic_are_one_incident_until_none_is_left(fleet: Fleet, webhook: dict[str, str]) -> None:
    manager = fleet.manager(Baking, **webhook)
    handling = fleet.manager(Baking)  # without alarms, so that no look of its own comes in between
    first, second = fleet.enqueue("bread", 1, 2)
    handling.start()
    wait_until(lambda: [row.state for row in fleet.messages() if row.topic == "bread"] == ["dead", "dead"])
    look(manager)
    look(manager)
    assert titles(fleet) == ["Messages of the topic bread died"]
    assert alerts(fleet)[0]["detail"] == "2 messages are dead: ValueError: burnt: 2"
    manager.messages.discard([first])
    look(manager)
    assert len(alerts(fleet)) == 1
    manager.messages.discard([second])
    look(manager)
    assert titles(fleet)[1:] == ["The topic bread has no dead message"]


def test_an_alert_that_dies_is_one_incident_and_not_a_chain_of_alerts(fleet: Fleet, webhook: dict[str, str]) -> None:
    manager = fleet.manager(Broken, **webhook)
    run(manager, "failed", "failed", "failed")
    look(manager)
    for _ in range(3):
        with fleet.engine.begin() as connection:
            connection.execute(update(tables.messages).values(state="dead", finished_at=now()))
        look(manager)
    assert titles(fleet) == [FAILS, "Messages of the topic alert_webhook died"]


def test_a_second_look_at_thousands_of_incidents_takes_a_second_at_most(
    fleet: Fleet, webhook: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = fleet.manager(Broken, **webhook)
    many = [Finding("dead", f"topic_{number}", lambda: "It is dead.") for number in range(3_000)]
    monkeypatch.setattr(Findings, "look", lambda *_: many)
    moments = {"opened_at": last_hour(), "detail": "It is dead."}
    with fleet.engine.begin() as connection:
        connection.execute(
            insert(tables.incidents), [{"kind": "dead", "subject": each.subject, **moments} for each in many]
        )
    began = time.process_time()
    watch_of(manager).look_now()
    assert time.process_time() - began < 1
    assert len(watch_of(manager).incidents.current()) == 3_000


def test_the_title_of_an_alert_is_one_line_beside_a_topic_that_a_user_typed() -> None:
    incident = Incident(1, "dead", "a\nBcc: b@example.com", last_hour(), None, "It is dead.")
    assert title(incident) == "Messages of the topic a\\nBcc: b@example.com died"


def test_a_worker_whose_tick_waits_for_a_minute_is_overdue(fleet: Fleet, webhook: dict[str, str]) -> None:
    manager = fleet.manager(Broken, **webhook)
    manager.pause("broken")
    manager.resume("broken")  # makes the row
    late = last_hour() - timedelta(hours=3)
    fleet.set("broken", mark=late, scheduled_at=late)
    look(manager)
    assert titles(fleet) == ["The worker broken is overdue"]
    assert "is overdue since" in alerts(fleet)[0]["detail"]
    manager.tick("broken", datetime.now(UTC))
    look(manager)
    assert titles(fleet)[1:] == ["The worker broken is no longer overdue"]


def test_ticks_that_wait_when_a_process_starts_are_not_overdue_at_once(fleet: Fleet, webhook: dict[str, str]) -> None:
    manager = fleet.manager(Broken, **webhook)
    manager.pause("broken")
    manager.resume("broken")
    late = last_hour() - timedelta(hours=3)
    fleet.set("broken", mark=late, scheduled_at=late)
    watch_of(manager).before_joining()
    look(manager)
    assert titles(fleet) == []


def test_a_clock_that_is_off_is_an_incident_of_its_host(fleet: Fleet, webhook: dict[str, str]) -> None:
    manager = fleet.manager(Broken, **webhook)
    instance = Instance(HOUR)
    manager.stores.leases.renew(instance)
    for offset, expected in ((-3.0, 1), (-0.7, 1), (-0.3, 2), (-0.7, 2)):
        manager.stores.leases.change(update(tables.instances).values(clock_offset=offset))
        look(manager)
        assert len(alerts(fleet)) == expected
    host = instance.host
    assert titles(fleet) == [f"The clock of {host} is off", f"The clock of {host} is right again"]
    assert alerts(fleet)[0]["detail"] == "It is 3.0 s ahead of the database's clock."


def kill(manager: BackgroundWorkerManager, ago: timedelta) -> None:
    """Leave the row of an instance that was killed that long ago."""
    gone = Instance(timedelta(seconds=10))
    manager.stores.leases.renew(gone)
    values = {"heartbeat_at": now(-ago), "expires_at": now(-ago), "started_at": now(-2 * ago)}
    manager.stores.leases.change(update(tables.instances).where(tables.instances.c.id == gone.id).values(values))


def test_the_next_process_that_starts_says_that_no_instance_was_alive(fleet: Fleet, webhook: dict[str, str]) -> None:
    managers = [fleet.manager(Broken, **webhook) for _ in range(2)]
    kill(managers[0], timedelta(minutes=7))
    at_once(2, lambda number: managers[number].start())
    wait_until(lambda: all(manager.presence.instance for manager in managers))
    assert titles(fleet) == ["No instance was alive"]
    [alert] = alerts(fleet)
    began, ended = (datetime.fromisoformat(alert[each]) for each in ("opened_at", "ended_at"))
    assert timedelta(minutes=7) <= ended - began < timedelta(minutes=8)
    look(managers[0])
    assert len(alerts(fleet)) == 1


def test_an_outage_whose_alert_could_not_be_written_is_reported_by_the_next_look(
    fleet: Fleet, webhook: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    manager = fleet.manager(Broken, **webhook)
    kill(manager, timedelta(minutes=7))
    with fleet.engine.begin() as connection:
        connection.execute(text("ALTER TABLE background_incidents RENAME TO away"))
    manager.start()
    wait_until(lambda: manager.presence.instance)
    assert "Cannot say since when no instance was alive" in caplog.text
    with fleet.engine.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO background_incidents"))
    for _ in range(2):
        watch_of(manager).look()
        assert titles(fleet) == ["No instance was alive"]


def test_a_fleet_that_is_new_or_that_a_deploy_restarts_is_no_incident(fleet: Fleet, webhook: dict[str, str]) -> None:
    manager = fleet.manager(Broken, **webhook)
    for _ in range(2):
        manager.start()
        wait_until(lambda: manager.presence.instance)
        manager.stop()
    assert titles(fleet) == []


def test_an_instance_that_lost_its_lease_says_so_when_no_other_was_alive(
    fleet: Fleet, webhook: dict[str, str], quick: None
) -> None:
    manager = fleet.manager(Broken, **webhook)
    manager.start()
    first = wait_until(lambda: manager.presence.instance)
    leases = manager.stores.leases
    leases.change(update(tables.instances).values(heartbeat_at=now(-HOUR), expires_at=now(-HOUR)))
    first.deadline = 1.0
    wait_until(lambda: manager.presence.instance is not first)
    assert titles(fleet) == ["No instance was alive"]


def test_an_alert_goes_out_while_hung_runs_use_all_threads(
    fleet: Fleet, webhook: dict[str, str], receiver: Receiver, quick: None
) -> None:
    class Hung(Hourly):
        run_on_first_start = True

        def do_work(self, context: Any) -> None:
            began.set()
            ended.wait(3 * PATIENCE)  # longer than the test waits for the alert

    began, ended = threading.Event(), threading.Event()
    manager = fleet.manager(Hung, Baking, **webhook, WORKERS_THREADS=1)
    try:
        manager.start()
        assert began.wait(PATIENCE)
        [id] = fleet.enqueue("bread", 1)
        with fleet.engine.begin() as connection:
            values = {"state": "dead", "finished_at": now()}
            connection.execute(update(tables.messages).where(tables.messages.c.id == id).values(values))
        wait_until(lambda: receiver.got)
    finally:
        ended.set()
    assert receiver.titles() == ["Messages of the topic bread died"]
    assert receiver.got[0].is_signed


def test_an_application_without_alarms_has_no_watch_no_topic_and_no_statement(fleet: Fleet) -> None:
    with statements(Engine) as seen:
        manager = fleet.manager(Hourly)
        manager.start()
        wait_until(fleet.keys)
        manager.stop()
    assert (manager.watch, manager.topics) == (None, {})
    assert seen
    assert not [each for each in seen if "background_incidents" in each]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"ALERT_MAIL": "operator"}, "ALERT_MAIL is 'operator'; expected e-mails, with commas in between"),
        ({"ALERT_WEBHOOK": "ftp://secret.example"}, "ALERT_WEBHOOK is a value that is not shown; expected http://"),
        ({"ALERT_WEBHOOK": "https://me:secret@example.com"}, "ALERT_WEBHOOK is a value that is not shown"),
        ({"ALERT_WEBHOOK": "https://example.com"}, "ALERT_WEBHOOK is set, and ALERT_WEBHOOK_SECRET is not"),
        ({"ALERT_WEBHOOK_SECRET": "whsec_c2VjcmV0"}, "ALERT_WEBHOOK_SECRET is a value that is not shown"),
        ({"ALERT_WEBHOOK_SECRET": 5}, "ALERT_WEBHOOK_SECRET is a value that is not shown"),
        ({"ALERT_MAIL": "\x1b[31mred@example.com"}, "expected e-mails, with commas in between"),
        ({"ALERT_AFTER_FAILURES": 0}, "ALERT_AFTER_FAILURES is 0; expected a whole number from 1 to 100"),
        ({"PING_URL": "https://secret.example/all"}, "PING_URL is a value that is not shown; expected http:// or"),
        ({"ALERT_WEBHOK": "https://example.com"}, "Did you mean ALERT_WEBHOOK?"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_sentence(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidConfig) as error:
        settle(dict(config))
    assert sentence in str(error.value)
    assert "secret.example" not in str(error.value)


def test_alerts_by_mail_need_a_function_that_sends_mails(fleet: Fleet) -> None:
    manager = fleet.manager(Broken, ALERT_MAIL="operator@example.com")
    with pytest.raises(InvalidConfig, match=r"workers\.send_mail = send_mail"):
        manager.serve()


def test_each_reader_gets_a_mail_with_the_worker_the_error_and_the_time(fleet: Fleet, quick: None) -> None:
    manager = fleet.manager(Broken, ALERT_MAIL="a@example.com, b@example.com", PUBLIC_URL="https://shop.example/")
    mails: list[tuple[Any, ...]] = []
    manager.send_mail = lambda *mail: mails.append(mail)
    run(manager, "failed", "failed", "failed")
    manager.start()
    wait_until(lambda: len(mails) == 2)
    run(manager, "succeeded")
    wait_until(lambda: len(mails) == 4)
    assert {mail[:2] for mail in mails} == {
        (to, f"[host] {title}") for to in ("a@example.com", "b@example.com") for title in (FAILS, WORKS)
    }
    assert len({mail[3] for mail in mails}) == 4
    assert "ValueError: no bread" in mails[0][2]
    assert "https://shop.example/workers/worker/broken" in mails[0][2]
    assert "A second mail follows when the incident has ended." in mails[0][2]


def test_alerts_that_wait_at_the_same_time_become_one_mail_to_each_reader(fleet: Fleet) -> None:
    manager = fleet.manager(Broken, ALERT_MAIL="a@example.com, b@example.com")
    mails: list[tuple[Any, ...]] = []
    manager.send_mail = lambda *mail: mails.append(mail)
    with manager.app.app_context():
        for number in range(3):
            delivery.enqueue(manager, trial(manager.app) | {"title": f"The worker {number} is failing"})
        manager.db.session.commit()
    manager.start()
    wait_until(lambda: len(mails) == 2)
    assert [mail[:2] for mail in mails] == [
        (to, "[host] The worker 0 is failing (and 2 more)") for to in ("a@example.com", "b@example.com")
    ]
    assert all(f"The worker {number} is failing." in mail[2] for mail in mails for number in range(3))


def test_a_refused_reader_repeats_no_mail_to_another_reader(fleet: Fleet) -> None:
    manager = fleet.manager(Broken, ALERT_MAIL="a@example.com, refused@example.com, z@example.com")
    mails: list[tuple[Any, ...]] = []

    def send_mail(to: str, *mail: Any) -> None:
        if to.startswith("refused"):
            raise Bury("550 no such user")
        mails.append((to, *mail))

    manager.send_mail = send_mail
    with manager.app.app_context():
        for number in range(2):
            delivery.enqueue(manager, trial(manager.app) | {"title": f"The worker {number} is failing"})
        manager.db.session.commit()
    manager.start()
    wait_until(lambda: [row.state for row in fleet.messages()][:6] == ["done", "dead", "done"] * 2)
    first = [mail[:2] for mail in mails[:2]]
    assert first == [(to, "[host] The worker 0 is failing (and 1 more)") for to in ("a@example.com", "z@example.com")]
    assert not [mail for mail in mails[2:] if "The worker" in mail[1]]

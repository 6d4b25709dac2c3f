"""`flask messages ...`: its output, and its changes to messages."""

import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import event, insert, text, update
from support.databases import on_postgresql, on_sqlite
from support.fleet import Fleet, Hourly, effect, in_threads, statements, states, wait_until

from background import (
    BackgroundWorkerManager,
    Bury,
    Message,
    MessageWorker,
    UnknownMessage,
    UnknownTopic,
    UnknownWorker,
    WorkerContext,
    WrongState,
)
from background.database import tables
from background.errors import error_line
from background.messages import dead_letters

MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


class OrderWorker(MessageWorker):
    """Fails for a bad payload until the test sets `is_mended`."""

    topic = "orders"
    max_attempts = 2
    backoff = timedelta(milliseconds=20)
    is_mended = False

    def handle(self, message: Message, context: WorkerContext) -> None:
        if message.payload == "bad" and not OrderWorker.is_mended:
            raise ValueError("no such\x1b[31m book")
        if message.payload == "hopeless":
            raise Bury("no such\x1b[31m reader")
        effect(context, str(message.payload)[:100])


class MailWorker(OrderWorker):
    topic = "mail"
    max_attempts = 1


@pytest.fixture
def manager(fleet: Fleet) -> BackgroundWorkerManager:
    OrderWorker.is_mended = False
    return fleet.manager(OrderWorker, MailWorker)


@pytest.fixture
def flask(manager: BackgroundWorkerManager) -> Callable[..., Result]:
    """Run `flask messages` with these arguments, or `flask workers`."""

    def flask(*arguments: str, code: int = 0, group: str = "messages") -> Result:
        result = manager.app.test_cli_runner().invoke(args=[group, *arguments])
        assert result.exit_code == code, result.output + repr(result.exception)
        assert "Traceback" not in result.stderr
        return result

    return flask


def rows(flask: Callable[..., Result], *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(flask("list", *arguments, "--json").stdout)
    return found


def handle_all(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    """Handle or bury the due messages."""
    manager.start()
    wait_until(lambda: not [row for row in fleet.messages() if row.state in ("waiting", "running")], "all was handled")
    manager.stop()


def leave_behind(manager: BackgroundWorkerManager, topic: str) -> None:
    """Claim a batch of the topic as an instance that died a minute ago."""
    assert manager.stores.queue.claim("order_worker", topic, 1, ("dead", "far:7"))
    clock = manager.history.clock()
    gone = {"started_at": clock, "heartbeat_at": clock, "expires_at": clock - timedelta(minutes=1)}
    with manager.stores.leases.engine.begin() as connection:
        connection.execute(insert(tables.instances).values(id="dead", host="far", pid=7, **gone))


# -- list, show ----------------------------------------------------------------------------------


def test_the_list_is_newest_first_and_shows_each_outcome(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    assert flask("list").stdout == "There is no message.\n"
    fleet.enqueue("orders", "fine")
    fleet.enqueue("orders", "bad", key="order 17")
    handle_all(fleet, manager)
    fleet.enqueue("mail", "taken")
    leave_behind(manager, "mail")
    fleet.enqueue("orders", {"titles": ["x" * 300]}, delay=3600)
    header, later, taken, bad, fine = flask("list").stdout.splitlines()
    assert header.split() == ["ID", "TOPIC", "STATE", "ATTEMPT", "KEY", "ENQUEUED", "PAYLOAD", "NOTE"]
    assert re.search(rf'^4 +orders +waiting until {MOMENT} +- +{MOMENT} +{{"titles":\["x+…$', later)
    assert re.search(r'^3 +mail +running .*"taken" +on far:7, which is gone: will be taken over$', taken)
    assert re.search(r'^2 +orders +dead +2 +order 17 .*"bad" +ValueError: no such\\x1b\[31m book$', bad)
    assert re.search(r'^1 +orders +done +1 .*"fine"$', fine)


def test_the_list_can_be_narrowed_by_topic_state_and_number(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "bad", "fine")
    fleet.enqueue("mail", "bad", "bad")
    handle_all(fleet, manager)
    fleet.enqueue("mail", "later", delay=3600)
    assert [row["id"] for row in rows(flask)] == [5, 4, 3, 2, 1]
    assert [row["id"] for row in rows(flask, "--limit", "2")] == [5, 4]
    assert [row["id"] for row in rows(flask, "--state", "dead")] == [4, 3, 1]
    assert [row["id"] for row in rows(flask, "--state", "Dead", "--topic", "mail", "--limit", "1")] == [4]
    assert [row["id"] for row in rows(flask, "--state", "waiting")] == [5]
    assert [row["id"] for row in rows(flask, "--state", "done")] == [2]
    nothing = flask("list", "--topic", "orders", "--state", "discarded")
    assert nothing.stdout == "There is no message of orders that is discarded.\n"


@on_sqlite
def test_a_message_that_its_handler_buried_is_listed_and_shown_with_the_reason(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "hopeless")
    handle_all(fleet, manager)
    _header, dead = flask("list", "--state", "dead").stdout.splitlines()
    assert re.search(r'^1 +orders +dead +1 .*"hopeless" +no such\\x1b\[31m reader$', dead)
    assert flask("show", "1").stdout.endswith(":\nno such\\x1b[31m reader\n")


@on_sqlite
def test_with_json_the_list_has_the_whole_payload_and_error(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    payload = {"text": "ü\n" * 1_000, "number": 10**1_000}
    fleet.enqueue("orders", payload, "bad")
    handle_all(fleet, manager)
    dead, done = rows(flask)
    assert done["payload"] == payload
    assert (done["state"], done["attempt"], done["error"]) == ("done", 1, None)
    assert datetime.fromisoformat(done["finished_at"]) >= datetime.fromisoformat(done["enqueued_at"])
    assert dead["error"].startswith("Traceback (most recent call last)")


@on_sqlite
def test_a_dead_letter_is_shown_with_the_error_of_every_attempt(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "bad", key="order 17")
    handle_all(fleet, manager)
    shown = flask("show", "1").stdout
    facts, payload, first, second = shown.split("\n\n", 3)
    assert re.fullmatch(
        rf"message   1\ntopic     orders \(order_worker\)\nstate     dead\nattempt   2\nkey       order 17\n"
        rf"enqueued  {MOMENT}\ndue       {MOMENT}\nclaimed   {MOMENT} on \S+:\d+\nfinished  {MOMENT}",
        facts,
    )
    assert payload == '"bad"'
    for number, each in enumerate((first, second), 1):
        assert re.match(rf"Attempt {number} failed at {MOMENT} on \S+:\d+:\nTraceback \(most recent", each)
        assert each.rstrip().endswith("ValueError: no such\\x1b[31m book")
    errors = json.loads(flask("show", "1", "--json").stdout)["errors"]
    assert [each["attempt"] for each in errors] == [1, 2]
    assert errors[1]["error"].endswith("no such\x1b[31m book\n")


def test_for_an_error_of_the_database_the_list_shows_the_line_that_names_it(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    class Wrong(MessageWorker):
        topic = "wrong"
        max_attempts = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            context.session.execute(text("SELECT 1 FROM nowhere"))

    manager.add(Wrong)
    fleet.enqueue("wrong", 1)
    handle_all(fleet, manager)
    assert re.search(r"sqlalchemy.exc.\w+: \(.*nowhere", flask("list").stdout.splitlines()[1])


@on_sqlite
def test_a_payload_is_shown_in_full_and_cannot_control_the_terminal(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    payload = {"order": 17, "title": "Über\u202e\x9b \x1b[31m\n", "long": "x" * 1_000}
    fleet.enqueue("orders", payload)
    shown = flask("show", "1").stdout
    assert f'"title": "Über\\u202e\\u009b \\u001b[31m\\n",\n  "long": "{"x" * 1_000}"' in shown
    assert json.loads(shown.split("\n\n", 1)[1]) == payload


@on_sqlite
def test_a_manually_written_row_without_json_is_shown_as_it_is(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", 1)
    with fleet.engine.begin() as connection:
        connection.execute(update(tables.messages).values(payload="{oops", topic="old"))
    assert '"{oops"' in flask("show", "1").stdout
    assert "topic     old (not in this release)" in flask("show", "1").stdout
    assert rows(flask)[0]["payload"] == "{oops"


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (None, None),
        ("", None),
        ("its instance stopped renewing its lease", "its instance stopped renewing its lease"),
        ('Traceback:\n  File "a"\n    b\nKeyError: 1\n\nDuring ...\n  File "c"\n    d\n     ^\nE: 2\n\n3\n', "E: 2"),
        ('Traceback:\n  File "a"\n    b\nValueError: \n\n  first\nsecond\n', "ValueError: first"),
        ('Traceback:\n  File "a"\n    b\nValueError: \n\n', "ValueError"),
        ("  + Exception Group\n  |   File\n  | ValueError: 1\n  +---", "+---"),
    ],
)
def test_the_line_of_an_error_is_the_first_line_after_the_frames(said: str | None, line: str | None) -> None:
    assert error_line(said) == line


# -- retry ---------------------------------------------------------------------------------------


def test_a_retried_dead_letter_is_handled_again_and_keeps_its_errors(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "bad", key="order 17")
    handle_all(fleet, manager)
    OrderWorker.is_mended = True
    assert flask("retry", "1").stdout == "Message 1 waits again.\n"
    (row,) = rows(flask)
    assert (row["state"], row["attempt"], row["finished_at"]) == ("waiting", 0, None)
    handle_all(fleet, manager)
    assert fleet.effects() == ["bad"]
    assert [error.attempt for error in fleet.errors()] == [1, 2]
    (row,) = rows(flask)
    assert (row["state"], row["attempt"], row["key"]) == ("done", 1, "order 17")


@on_sqlite
def test_a_letter_that_fails_again_after_a_retry_has_all_its_attempts_again(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "bad")
    handle_all(fleet, manager)
    flask("retry", "1")
    handle_all(fleet, manager)
    assert states(fleet) == ["dead"]
    assert [error.attempt for error in fleet.errors()] == [1, 2, 1, 2]


def test_all_dead_letters_are_retried_once_even_if_they_die_again_meanwhile(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "_SLICE", 2)
    fleet.enqueue("orders", *["bad"] * 3)
    fleet.enqueue("mail", *["bad"] * 5)
    handle_all(fleet, manager)
    fleet.enqueue("orders", "later", delay=3600)
    retried: list[int] = []
    for some in manager.stores.dead_letters._slices(None):  # as `retry --all`, but they die between slices
        retried += some
        assert manager.messages.retry(some) == len(some) <= 2
        with fleet.engine.begin() as connection:
            connection.execute(text("UPDATE background_messages SET state = 'dead' WHERE id <= 8"))
    assert retried == [4, 5, 6, 7, 8, 1, 2, 3]
    assert flask("retry", "--all", "--topic", "mail").stdout == "5 messages wait again.\n"
    assert states(fleet) == [*["dead"] * 3, *["waiting"] * 6]
    assert flask("retry", "--all").stdout == "3 messages wait again.\n"
    assert flask("retry", "--all").stdout == "No message is dead.\n"


@on_postgresql
def test_a_retry_wakes_the_consumers_whatever_their_heartbeat(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "bad")
    handle_all(fleet, manager)
    OrderWorker.is_mended = True
    consumer = fleet.manager(OrderWorker, WORKERS_HEARTBEAT_SECONDS=600, WORKERS_LEASE_SECONDS=6000)
    consumer.start()
    fleet.enqueue("orders", "here")
    wait_until(lambda: fleet.effects() == ["here"], "the start")
    flask("retry", "1")
    wait_until(lambda: fleet.effects() == ["here", "bad"], "the retry")


def test_several_ids_are_all_retried_or_not_at_all(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "bad", "fine", "bad")
    handle_all(fleet, manager)
    fleet.enqueue("orders", "taken")
    leave_behind(manager, "orders")
    assert flask("retry", "1", "2", "4", code=1).stderr == (
        "Error: Nothing was changed: message 2 is done, message 4 is running; expected messages that are dead or "
        "discarded or waiting: leave out the other messages.\n"
    )
    assert "There is no message 99;" in flask("retry", "1", "99", "2", code=2).stderr
    assert states(fleet) == ["dead", "done", "dead", "running"]
    assert flask("retry", "3", "1", "3").stdout == "2 messages wait again.\n"
    assert states(fleet) == ["waiting", "done", "waiting", "running"]


# -- discard -------------------------------------------------------------------------------------


def test_a_discarded_message_is_never_handled_and_its_key_still_refuses_a_second_message(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "bad", key="a")
    handle_all(fleet, manager)
    fleet.enqueue("orders", "too late", key="b")
    assert flask("discard", "1", "2").stdout == "2 messages are discarded.\n"
    handle_all(fleet, manager)
    assert fleet.effects() == []
    assert [(row["state"], bool(row["finished_at"])) for row in rows(flask)] == [("discarded", True)] * 2
    assert fleet.enqueue("orders", "again", key="a") == [None]
    assert flask("list").stdout.splitlines()[2].endswith("ValueError: no such\\x1b[31m book")


@on_sqlite
def test_a_discarded_message_can_be_retried(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "after all")
    assert flask("discard", "1").stdout == "Message 1 is discarded.\n"
    flask("retry", "1")
    handle_all(fleet, manager)
    assert fleet.effects() == ["after all"]


@on_sqlite
def test_running_and_done_messages_are_not_discarded(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "fine")
    handle_all(fleet, manager)
    fleet.enqueue("orders", "taken")
    leave_behind(manager, "orders")
    for number, state in (("1", "done"), ("2", "running")):
        refused = flask("discard", number, code=1).stderr
        assert refused.startswith(f"Error: Nothing was changed: message {number} is {state}; expected messages")
        assert refused.count("\n") == 1


def test_discarding_all_discards_dead_messages_and_keeps_waiting_messages(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "bad")
    fleet.enqueue("mail", "bad")
    handle_all(fleet, manager)
    fleet.enqueue("orders", "later", delay=3600)
    assert flask("discard", "--all", "--topic", "mail").stdout == "1 message is discarded.\n"
    assert states(fleet) == ["dead", "discarded", "waiting"]
    flask("discard", "--all")
    assert states(fleet) == ["discarded", "discarded", "waiting"]


def test_a_message_that_is_discarded_as_it_is_claimed_is_either_handled_or_discarded(
    fleet: Fleet, manager: BackgroundWorkerManager
) -> None:
    fleet.enqueue("orders", *range(60))

    def discard_some() -> int:
        return sum(map(is_discarded, range(60, 0, -2)))

    def is_discarded(number: int) -> int:
        try:
            return manager.messages.discard([number])
        except WrongState:
            return 0

    discarded, _ = in_threads(discard_some, manager.start)
    wait_until(lambda: set(states(fleet)) == {"done", "discarded"} or states(fleet) == ["done"] * 60, "the end")
    assert states(fleet).count("discarded") == discarded
    assert sorted(map(int, fleet.effects())) == [row.id - 1 for row in fleet.messages() if row.state == "done"]


# -- stats ---------------------------------------------------------------------------------------


def test_the_stats_show_the_waiting_and_done_messages_of_every_topic(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    fleet.enqueue("orders", "fine", "fine", "bad")
    fleet.enqueue("mail", "bad")
    handle_all(fleet, manager)
    fleet.enqueue("orders", "taken", "due")
    fleet.enqueue("orders", "later", delay=3600)
    leave_behind(manager, "orders")
    with fleet.engine.begin() as connection:
        connection.execute(text("UPDATE background_messages SET topic = 'old' WHERE topic = 'mail'"))
    mail, old, orders = json.loads(flask("stats", "--json").stdout)
    assert (orders["topic"], orders["worker"]) == ("orders", "order_worker")
    counts = {name: orders[name] for name in ("waiting", "delayed", "running", "dead", "handled")}
    assert counts == {"waiting": 2, "delayed": 1, "running": 1, "dead": 1, "handled": 2}
    assert 0 <= orders["oldest_seconds"] < 60
    assert 0 <= orders["mean_seconds"] <= orders["longest_seconds"] < 60
    assert (old["topic"], old["worker"], old["dead"], old["oldest_seconds"]) == ("old", None, 1, None)
    assert (mail["topic"], mail["dead"], mail["mean_seconds"]) == ("mail", 0, None)
    header, *lines = flask("stats").stdout.splitlines()
    assert header.startswith("TOPIC   WORKER               WAITING  DELAYED  RUNNING  DEAD  OLDEST")
    assert re.match(r"mail    mail_worker          0        0        0        0     -  ", lines[0])
    assert re.match(r"old     not in this release  0        0        0        1     -  ", lines[1])
    assert re.match(r"orders  order_worker         2        1        1        1     \S+ s", lines[2])


def test_the_stats_omit_messages_done_over_an_hour_ago_and_count_the_age_since_the_due_time(
    fleet: Fleet, manager: BackgroundWorkerManager
) -> None:
    fleet.enqueue("orders", "old", "fine")
    handle_all(fleet, manager)
    fleet.enqueue("orders", "waits")
    clock = manager.history.clock()
    done, waiting = tables.messages.c.id == 1, tables.messages.c.id == 3
    with fleet.engine.begin() as connection:
        for which, columns in (
            (done, {"finished_at": clock - timedelta(hours=1, seconds=1)}),
            (tables.messages.c.id == 2, {"due_at": clock - timedelta(seconds=90), "finished_at": clock}),
            (waiting, {"due_at": clock - timedelta(days=2), "enqueued_at": clock - timedelta(days=9)}),
        ):
            connection.execute(update(tables.messages).where(which).values(columns))
    (orders,) = [each for each in manager.messages.stats() if each.topic == "orders"]
    assert (orders.handled, orders.mean_seconds, orders.longest_seconds) == (1, 90, 90)
    assert orders.oldest_seconds is not None
    assert 2 * 86_400 <= orders.oldest_seconds < 2 * 86_400 + 60


def test_the_figures_of_every_topic_take_the_same_few_statements(
    fleet: Fleet, manager: BackgroundWorkerManager
) -> None:
    fleet.enqueue("orders", *["fine"] * 3)
    handle_all(fleet, manager)
    fleet.enqueue("orders", "due", "failed", "taken")
    fleet.enqueue("orders", "later", delay=3600)
    fleet.enqueue("mail", "hopeless")
    with fleet.engine.begin() as connection:
        connection.execute(update(tables.messages).where(tables.messages.c.payload == '"failed"').values(attempt=1))
        connection.execute(update(tables.messages).where(tables.messages.c.topic == "mail").values(topic="old"))
        connection.execute(insert(tables.topics).values(topic="orders", paused_at=manager.history.clock()))
    with statements(manager.stores.main.engine) as sent:
        mail, old, orders = manager.messages.figures()
    assert len(sent) == 2
    assert (orders.waiting, orders.delayed, orders.retrying, orders.running) == (4, 1, 1, 0)
    assert (orders.handled, orders.per_minute, orders.is_estimate) == (3, 3, False)
    assert orders.paused_at is not None
    assert orders.oldest_seconds is not None
    assert (mail.topic, mail.worker, mail.waiting, mail.paused_at) == ("mail", "mail_worker", 0, None)
    assert (old.topic, old.worker, old.waiting, old.retrying) == ("old", None, 1, 0)


def test_the_commands_cost_the_same_statements_with_any_number_of_messages(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    counts = []
    for number in (1, 2, 20):
        fleet.enqueue("orders", *["x"] * number)
        with statements(manager.stores.main.engine) as seen:
            flask("list")
            flask("stats")
        counts.append(len(seen))
        with fleet.engine.begin() as connection:
            connection.execute(text("UPDATE background_messages SET topic = 't' || id"))
    assert counts == [4, 4, 4]


@on_postgresql
def test_open_messages_are_counted_and_listed_by_the_index_of_their_state(
    fleet: Fleet, manager: BackgroundWorkerManager
) -> None:
    with manager.app.app_context():
        manager.enqueue_many("orders", ["x" * 100] * 20_000)
        manager.db.session.execute(
            text("UPDATE background_messages SET state = 'done', finished_at = now() - interval '1 day' WHERE id > 900")
        )
        manager.db.session.execute(text("UPDATE background_messages SET state = 'dead' WHERE id <= 300"))
        manager.db.session.execute(text("ANALYZE background_messages"))
        manager.db.session.commit()
    asked: list[tuple[str, Any]] = []

    def remember(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        asked.append((statement, parameters))

    engine = manager.stores.main.engine
    event.listen(engine, "before_cursor_execute", remember)
    manager.messages.stats()
    manager.messages.letters(state="dead")
    manager.messages.letters("orders", "waiting")
    event.remove(engine, "before_cursor_execute", remember)
    with engine.connect() as connection:
        plans = ["\n".join(connection.exec_driver_sql(f"EXPLAIN {each}", more).scalars()) for each, more in asked]
    assert not [plan for plan in plans if "Seq Scan on background_messages" in plan], plans
    of_stats, _, dead, waiting = plans
    for plan, state in (
        (of_stats, "due"),
        (of_stats, "tried"),
        (of_stats, "running"),
        (of_stats, "dead"),
        (dead, "dead"),
        (waiting, "due"),
    ):
        assert f"ix_background_messages_{state}" in plan


# -- enqueue, pause, resume ----------------------------------------------------------------------


def test_a_message_is_enqueued_with_a_key_and_a_delay(fleet: Fleet, flask: Callable[..., Result]) -> None:
    assert flask("enqueue", "orders", '{"book": [1, null]}').stdout == "Message 1 waits.\n"
    assert flask("enqueue", "orders", '"text"', "--key", "k", "--delay", "60.5").stdout == "Message 2 waits.\n"
    result = flask("enqueue", "orders", "1", "--key", "k", code=1)
    assert result.stderr == "Error: Nothing was enqueued: orders has a message with the key 'k' already.\n"
    first, second = fleet.messages()
    assert (first.payload, first.key, second.payload, second.key) == ('{"book":[1,null]}', None, '"text"', "k")
    assert (second.due_at - second.enqueued_at).total_seconds() == pytest.approx(60.5, abs=0.1)


def test_a_topic_is_paused_and_resumed(fleet: Fleet, flask: Callable[..., Result]) -> None:
    assert flask("resume", "orders").stdout == "orders was not paused.\n"
    assert flask("pause", "orders").stdout == "orders is paused: its messages wait.\n"
    assert flask("pause", "orders").stdout == "orders was paused already.\n"
    assert flask("pause", "mail_worker", group="workers").stdout == "mail is paused: its messages wait.\n"
    assert re.search(rf"NOTE\nmail .* paused since {MOMENT}\norders .* paused since {MOMENT}\n", flask("stats").stdout)
    assert flask("resume", "orders").stdout == "orders is resumed: its messages are handled.\n"
    assert flask("resume", "mail_worker", group="workers").stdout == "mail is resumed: its messages are handled.\n"
    assert "paused" not in flask("stats").stdout
    assert [each["paused_at"] for each in json.loads(flask("stats", "--json").stdout)] == [None, None]


def test_a_topic_of_another_release_can_be_resumed(
    fleet: Fleet, manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    with fleet.engine.begin() as connection:
        connection.execute(insert(tables.topics).values(topic="old", paused_at=manager.history.clock()))
    assert flask("resume", "old").stdout == "old is resumed: its messages are handled.\n"
    assert flask("pause", "old", code=2).stderr.startswith("Error: No worker handles the topic 'old'; expected")


# -- wrong arguments -------------------------------------------------------------------------------


def test_a_wrong_argument_is_one_sentence(flask: Callable[..., Result]) -> None:
    for arguments, said in (
        (("list", "--topic", "ordrs"), "No worker handles the topic 'ordrs'; expected the topic of a registered"),
        (("list", "--topic", "ordrs"), "Did you mean 'orders'?"),
        (("list", "--topic", "\udcff"), "No worker handles the topic '\\udcff'"),
        (("retry", "--all", "--topic", "mial"), "Did you mean 'mail'?"),
        (("pause", "mial"), "Did you mean 'mail'?"),
        (("resume", "\udcff"), "No worker handles the topic '\\udcff'"),
        (("enqueue", "mial", "1"), "Did you mean 'mail'?"),
        (("enqueue", "mail", "NaN"), "The payload is 'NaN': NaN is not JSON; expected JSON, such as 42 or '\"text\"'."),
        (("enqueue", "mail", "{"), "The payload is '{': Expecting property name"),
        (("enqueue", "mail", "[" * 9_999), "it is nested too deeply; expected JSON"),
        (("list", "--state", "fine"), "expected one of: waiting, running, done, dead, discarded."),
        (("list", "--limit", "many"), "--limit is 'many'; expected a whole number"),
        (("show", "1"), "There is no message 1; `flask messages list` shows all messages."),
        (("show", "9" * 50), f"There is no message {'9' * 50};"),
        (("show", "0"), "There is no message 0;"),
        (("show", "one"), "The ID is 'one'; expected a whole number"),
        (("discard", "9" * 5_000), "expected a whole number"),
        (("retry",), "Expected IDs of messages, or --all for all dead messages"),
        (("retry", "1", "--all"), "Expected IDs of messages, or --all for all dead messages"),
        (("discard", "1", "--topic", "mail"), "--topic 'mail' goes with --all; expected IDs without it."),
    ):
        result = flask(*arguments, code=2)
        assert result.stderr.count("\n") == 1, arguments
        assert said in result.stderr, arguments


def test_a_topic_that_only_the_database_knows_is_accepted(fleet: Fleet, flask: Callable[..., Result]) -> None:
    fleet.enqueue("orders", 1)
    with fleet.engine.begin() as connection:
        connection.execute(text("UPDATE background_messages SET topic = 'old', state = 'dead'"))
    assert [row["id"] for row in rows(flask, "--topic", "old")] == [1]
    assert "Did you mean 'old'?" in flask("list", "--topic", "olf", code=2).stderr
    assert flask("retry", "--all", "--topic", "old").stdout == "1 message waits again.\n"
    assert flask("retry", "--all", "--topic", "old").stdout == "No message is dead.\n"


def test_python_calls_refuse_the_same(manager: BackgroundWorkerManager) -> None:
    with pytest.raises(UnknownMessage):
        manager.messages.retry([2**70])
    with pytest.raises(UnknownMessage):
        manager.messages.letter(-1)
    with pytest.raises(UnknownTopic):
        manager.messages.letters("\0")
    assert manager.messages.discard(None) == 0


# -- flask workers -------------------------------------------------------------------------------


@on_sqlite
def test_the_list_and_the_check_of_workers_name_the_message_workers(
    manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    line = "Messages: mail (mail_worker), orders (order_worker); see `flask messages stats`."
    manager.presence.sign_on()
    assert flask("list", group="workers").stdout == f"{line}\n"
    manager.add(Hourly)
    assert flask("list", group="workers").stdout.splitlines()[2] == line
    assert [row["name"] for row in json.loads(flask("list", "--json", group="workers").stdout)] == ["hourly"]
    checked = flask("check", group="workers").stdout.splitlines()
    assert checked[2] == line
    assert checked[-1].startswith("Fine: the settings, 3 workers, the database, ")


@on_sqlite
def test_a_command_about_ticks_names_the_command_for_a_message_worker(
    manager: BackgroundWorkerManager, flask: Callable[..., Result]
) -> None:
    for command in ("trigger", "history", "why", "run --once"):
        result = flask(*command.split(), "order_worker", code=2, group="workers")
        assert result.stderr == (
            "Error: The worker 'order_worker' handles the messages of 'orders' and has no ticks; expected a periodic "
            "worker: see `flask messages list --topic orders`.\n"
        ), command
    with pytest.raises(UnknownWorker, match="handles the messages of 'orders'"):
        manager.trigger("order_worker")
    assert "Did you mean 'order_worker'?" in flask("run", "order_workr", code=2, group="workers").stderr
    with pytest.raises(UnknownWorker, match=r"Did you mean 'mail_worker'?"):
        manager.remove("mail_workr")

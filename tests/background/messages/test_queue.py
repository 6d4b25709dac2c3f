"""Messages: enqueued with the caller's data, handled once with their effects, or buried with their errors."""

import math
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, text
from support.databases import on_postgresql, on_sqlite
from support.fleet import BEAT, HOUR, PATIENCE, Fleet, Hourly, db, effect, statements, states, wait_until

from background import (
    BackgroundWorkerManager,
    DuplicateWorker,
    InvalidMessage,
    InvalidWorker,
    Message,
    MessageWorker,
    UnknownTopic,
    WorkerContext,
    current_workers,
)
from background.database import tables
from background.database.notifications import CHANNEL
from background.worker import pause_after

MINUTE = 60


class Notes(MessageWorker):
    """Leaves one effect per message."""

    topic = "notes"
    max_attempts = 3
    backoff = timedelta(milliseconds=20)

    def handle(self, message: Message, context: WorkerContext) -> Any:
        effect(context, message.payload)


def all_are(fleet: Fleet, state: str, count: int) -> None:
    wait_until(lambda: states(fleet) == [state] * count, f"{count} messages that are {state}")


# -- enqueueing ------------------------------------------------------------------------------------


def test_a_message_exists_once_the_caller_commits_and_not_if_it_or_its_savepoint_rolls_back(
    fleet: Fleet,
) -> None:
    manager = fleet.manager(Notes)
    with manager.app.app_context():
        manager.enqueue("notes", "rolled back", key="one")
        manager.enqueue_many("notes", ["rolled back"] * 100)
        db.session.rollback()
        assert manager.enqueue("notes", "kept", key="one")
        assert fleet.messages() == []
        savepoint = db.session.begin_nested()
        manager.enqueue("notes", "rolled back", key="two")
        savepoint.rollback()
        with db.session.begin_nested():
            assert manager.enqueue("notes", "kept too", key="two")
        db.session.commit()
    assert [row.payload for row in fleet.messages()] == ['"kept"', '"kept too"']


def test_a_second_message_with_the_same_key_is_not_enqueued_and_returns_none(fleet: Fleet) -> None:
    class Letters(Notes):
        topic = "letters"

    manager = fleet.manager(Notes, Letters)
    [first] = fleet.enqueue("notes", 1, key="a")
    assert isinstance(first, int)
    assert fleet.enqueue("notes", 2, key="a") == [None]
    assert fleet.enqueue("letters", 3, key="a") != [None]
    assert fleet.enqueue("notes", 4, key="b") != [None]
    manager.start()
    all_are(fleet, "done", 3)
    assert fleet.enqueue("notes", 5, key="a") == [None]


def test_many_messages_are_enqueued_in_order_except_existing_keys(fleet: Fleet) -> None:
    manager = fleet.manager(Notes)
    fleet.enqueue("notes", "first", key="key 7")
    payloads = [{"number": number, "text": "ü\0\n"} for number in range(6_000)]
    with manager.app.app_context():
        assert manager.enqueue_many("notes", payloads, (f"key {number}" for number in range(6_000))) == 5_999
        assert manager.enqueue_many("notes", []) == 0
        db.session.commit()
    with manager.app.app_context(), fleet.engine.connect() as connection:
        found = connection.execute(
            select(tables.messages).order_by(tables.messages.c.due_at, tables.messages.c.id)
        ).all()
    assert [row.key for row in found] == ["key 7", *(f"key {number}" for number in range(6_000) if number != 7)]


def test_enqueueing_costs_the_caller_one_statement_and_no_commit(fleet: Fleet) -> None:
    manager = fleet.manager(Notes)
    with manager.app.app_context(), statements(db.engine) as seen:
        manager.enqueue("notes", 1)
        assert [statement.split()[0] for statement in seen] == ["INSERT"]
        manager.enqueue_many("notes", range(1_000))
        assert len(seen) <= 3


def test_a_message_cannot_be_changed() -> None:
    now = datetime.now(UTC)
    message = Message(1, "notes", '"hello"', None, 1, 1, now, now)
    assert message.payload == "hello"
    for name in ("payload", "id", "other"):
        with pytest.raises(AttributeError, match=f"cannot set '{name}' of a message"):
            setattr(message, name, "changed")
    assert message.payload == "hello"


def test_a_handler_gets_the_enqueued_payload(fleet: Fleet) -> None:
    given: list[tuple[Message, WorkerContext, Any]] = []

    class Keeper(MessageWorker):
        topic = "notes"

        def handle(self, message: Message, context: WorkerContext) -> None:
            given.append((message, context, (context.tick, context.attempt, context.token, context.idempotency_key)))

    manager = fleet.manager(Keeper)
    payload = {"": [None, True, -1, 1e300, 10**1000, '\0 ü 🐘 "\\', [], {}], "tuple": [1, [2]]}
    before = datetime.now(UTC)
    [number] = fleet.enqueue("notes", payload | {"tuple": (1, (2,))}, key="the key")
    manager.start()
    all_are(fleet, "done", 1)
    [(message, context, seen)] = given
    assert message.payload == payload
    assert (message.id, message.key, message.topic) == (number, "the key", "notes")
    assert (message.attempt, message.token) == (1, 1)
    assert timedelta(seconds=-1) < message.enqueued_at - before < timedelta(seconds=PATIENCE)
    assert seen == (message.due_at, 1, 1, f"notes:{number}")
    assert context.worker == "keeper"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def cycle() -> Any:
    value: dict[str, Any] = {"a": []}
    value["a"].append(value)
    return value


@on_sqlite
@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (
            {"at": [0, datetime(2026, 1, 1, tzinfo=UTC)]},
            r"payload\['at'\]\[1\] is of type datetime, which JSON cannot carry",
        ),
        ([1, {"price": math.nan}], r"payload\[1\]\['price'\] is nan"),
        (-math.inf, r"^payload is -inf"),
        ({"a": {1: 2}}, r"payload\['a'\]\[1\] is under a key of type int"),
        ({True: 1}, r"payload\[True\] is under a key of type bool"),
        (cycle(), r"payload\['a'\]\[0\] is a container that contains itself"),
        (nested(100_000), r"payload is nested more than 100 deep"),
        (nested(101), r"payload is nested more than 100 deep"),
        (["\ud800"], r"payload\[0\] is the text '\\ud800' with an unpaired surrogate"),
        ({"\ud800": 1}, r"payload is a dict with the key '\\ud800', which has an unpaired surrogate"),
        ([10**10_000], r"payload\[0\] is a whole number of thousands of digits"),
        (b"bytes", r"^payload is of type bytes"),
        ({"a": {1, 2}}, r"payload\['a'\] is of type set"),
        ("x" * 262_143, r"The payload is 262,145 bytes of JSON; expected at most 262,144 \(MESSAGES_MAX_BYTES\)"),
        ("ü" * 131_072, r"The payload is 262,146 bytes"),
    ],
)
def test_a_payload_that_is_not_json_is_refused_with_the_path_to_the_value(
    manager: BackgroundWorkerManager, payload: Any, said: str
) -> None:
    manager.add(Notes)
    with manager.app.app_context():
        with pytest.raises(InvalidMessage, match=said):
            manager.enqueue("notes", payload)
        with pytest.raises(InvalidMessage, match=said):
            manager.enqueue_many("notes", [1, payload])
        assert db.session.scalar(select(tables.messages.c.id)) is None


@on_sqlite
@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"topic": "note"}, UnknownTopic, "No worker handles the topic 'note'.* Did you mean 'notes'?"),
        ({"topic": None}, UnknownTopic, "No worker handles the topic None"),
        ({"topic": []}, UnknownTopic, r"No worker handles the topic \[\]"),
        ({"key": ""}, InvalidMessage, "The key of a message is ''; expected 1 to 200 printable characters"),
        ({"key": 5}, InvalidMessage, "The key of a message is 5"),
        ({"key": "x" * 201}, InvalidMessage, "The key of a message is 'xxx"),
        ({"key": "a\0"}, InvalidMessage, "The key of a message is"),
        ({"delay": -1}, InvalidMessage, "The delay of a message is -1; expected a timedelta or a number of seconds"),
        ({"delay": timedelta(seconds=-1)}, InvalidMessage, "The delay of a message is"),
        ({"delay": math.nan}, InvalidMessage, "The delay of a message is nan"),
        ({"delay": 1e300}, InvalidMessage, "The delay of a message is 1e"),
        ({"delay": True}, InvalidMessage, "The delay of a message is True"),
        ({"delay": "soon"}, InvalidMessage, "The delay of a message is 'soon'"),
    ],
)
def test_a_wrong_topic_key_or_delay_is_refused_in_a_sentence(
    manager: BackgroundWorkerManager, more: dict[str, Any], error: type[Exception], said: str
) -> None:
    manager.add(Notes)
    with manager.app.app_context(), pytest.raises(error, match=said):
        manager.enqueue(**{"topic": "notes", "payload": 1} | more)


@on_sqlite
def test_each_of_many_payloads_needs_one_key(manager: BackgroundWorkerManager) -> None:
    manager.add(Notes)
    with manager.app.app_context(), pytest.raises(InvalidMessage, match="There are 1 keys for 2 payloads"):
        manager.enqueue_many("notes", [1, 2], ["a"])


@on_sqlite
@pytest.mark.parametrize("single", [{"order": 1}, "order", b"order", 1, None])
def test_a_single_payload_or_key_instead_of_many_is_refused(manager: BackgroundWorkerManager, single: Any) -> None:
    manager.add(Notes)
    with manager.app.app_context():
        with pytest.raises(InvalidMessage, match=r"The payloads of many messages are .*; expected a list"):
            manager.enqueue_many("notes", single)
        if single is not None:
            with pytest.raises(InvalidMessage, match=r"The keys of many messages are .*; expected a list"):
                manager.enqueue_many("notes", range(5), single)


# -- registering -----------------------------------------------------------------------------------


def make(**members: Any) -> type[MessageWorker]:
    return type("Made", (MessageWorker,), {"topic": "made", "handle": Notes.handle, **members})


@on_sqlite
@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"handle": MessageWorker.handle}, "Made is abstract; expected a class that can run: give it either handle"),
        ({"handle_many": lambda self, messages, context: None}, "Made has both handle and handle_many"),
        ({"timeout": timedelta(seconds=1)}, "Made.timeout is for a PeriodicWorker only"),
        ({"topic": ""}, "Worker 'made' has topic = ''; expected 1 to 100 letters"),
        ({"topic": "a b"}, "has topic = 'a b'"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"batch_size": 0}, "has batch_size = 0; expected a whole number from 1 to 10000"),
        ({"batch_size": 10_001}, "has batch_size = 10001"),
        ({"max_attempts": 0}, "has max_attempts = 0"),
        ({"backoff": 5}, "has backoff = 5; expected a timedelta of at least 0"),
        ({"concurrency": 1.5}, "has concurrency = 1.5"),
    ],
)
def test_a_message_worker_that_cannot_work_is_refused_in_a_sentence(
    manager: BackgroundWorkerManager, members: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidWorker, match=said):
        manager.add(make(**members))


@on_sqlite
def test_one_worker_handles_a_topic_and_its_name_is_unique(manager: BackgroundWorkerManager) -> None:
    manager.add(Hourly)
    manager.add(make(name="one"))
    with pytest.raises(DuplicateWorker, match="There is a worker of the topic 'made' already"):
        manager.add(make(name="two"))
    with pytest.raises(DuplicateWorker, match="There is a worker named 'hourly' already"):
        manager.add(make(name="hourly", topic="other"))
    manager.remove("one")
    manager.add(make(name="two"))
    assert manager.topics.keys() >= {"made"}


# -- handling --------------------------------------------------------------------------------------


def test_messages_are_handled_once_each_in_the_order_in_which_they_were_enqueued(fleet: Fleet) -> None:
    manager = fleet.manager(Notes)
    fleet.enqueue("notes", *range(250))
    manager.start()
    all_are(fleet, "done", 250)
    assert fleet.effects() == [str(each) for each in range(250)]
    assert fleet.keys() == [f"notes:{row.id}" for row in fleet.messages()]


@on_sqlite
def test_a_consumer_looks_for_messages_before_it_writes_but_not_after_a_full_batch(fleet: Fleet) -> None:
    manager = fleet.manager(Notes)
    fleet.enqueue("notes", *range(2 * Notes.batch_size + 1))
    with statements(manager.stores.main.engine) as seen:
        manager.start()
        all_are(fleet, "done", 2 * Notes.batch_size + 1)
    columns = "SELECT background_messages.id, background_messages.attempt"
    kinds = ["write" if "RETURNING" in each else "look" for each in seen if "RETURNING" in each or columns in each]
    assert kinds[:4] == ["look", "write", "write", "write"]
    assert "write" not in kinds[4:]


@on_postgresql
@pytest.mark.parametrize(
    "spoil",
    [
        "DEALLOCATE ALL",
        "ALTER TABLE background_messages ALTER COLUMN topic TYPE varchar(120)",
    ],
)
def test_a_claim_of_messages_is_parsed_once_and_again_after_a_migration_or_without_its_plan(
    fleet: Fleet, spoil: str
) -> None:
    stores = fleet.manager(Notes).stores

    def claim() -> list[str]:
        [id] = fleet.enqueue("notes", "one")
        with statements(stores.main.engine) as seen:
            batch = stores.queue.claim("notes", "notes", 10, ("us", "here:1"))
        assert batch is not None
        assert batch.ids == [id]
        return ["PREPARE" if "PREPARE" in each else "EXECUTE" if "EXECUTE" in each else "plain" for each in seen]

    assert [claim() for _ in range(3)] == [["PREPARE"], ["EXECUTE"], ["EXECUTE"]]
    with stores.main.single.begin() as connection:
        connection.execute(text(spoil))
    assert claim() == ["EXECUTE", "plain"]
    assert [claim() for _ in range(2)] == [["PREPARE"], ["EXECUTE"]]


@on_postgresql
def test_a_claim_of_messages_has_no_plan_from_the_time_when_the_table_was_small(fleet: Fleet) -> None:
    stores = fleet.manager(Notes).stores
    for _ in range(10):  # PostgreSQL may keep a plan from the sixth time on
        assert stores.queue.claim("notes", "notes", 10, ("us", "here:1")) is None
    with stores.main.single.connect() as connection:
        plans = connection.execute(text("SELECT generic_plans, custom_plans FROM pg_prepared_statements")).all()
    assert plans == [(0, 10)]


@on_postgresql
def test_a_message_has_its_moments_in_utc_in_every_time_zone_of_the_server(fleet: Fleet) -> None:
    stores = fleet.manager(Notes).stores
    fleet.enqueue("notes", "one")
    with stores.main.single.connect() as connection:
        connection.execute(text("SET timezone = 'Asia/Kolkata'"))
    batch = stores.queue.claim("notes", "notes", 10, ("us", "here:1"))
    assert batch is not None
    [message] = batch.messages
    [row] = fleet.messages()
    assert [(each, each.tzinfo) for each in (message.enqueued_at, message.due_at)] == [
        (each, UTC) for each in (row.enqueued_at, row.due_at)
    ]


@on_postgresql
def test_a_message_whose_transaction_ends_late_is_handled_after_newer_messages(fleet: Fleet) -> None:
    """Enqueue the late message first. A consumer that continues after the last handled id would miss it."""
    manager = fleet.manager(Notes)
    manager.start()
    with manager.app.app_context():
        manager.enqueue("notes", "early, and late")
        fleet.enqueue("notes", "one", "two")
        all_are(fleet, "done", 2)
        db.session.commit()
    all_are(fleet, "done", 3)
    assert fleet.effects() == ["one", "two", "early, and late"]
    [late, *others] = fleet.messages()
    assert late.due_at < min(other.due_at for other in others)


def test_an_enqueue_wakes_its_own_process_without_a_heartbeat(fleet: Fleet) -> None:
    manager = fleet.manager(Notes, WORKERS_HEARTBEAT_SECONDS=MINUTE, WORKERS_LEASE_SECONDS=5 * MINUTE)
    manager.start()
    wait_until(lambda: manager.presence.instance is not None, "the start")
    with manager.app.app_context():
        manager.enqueue("notes", "now")
        with db.session.begin_nested():
            manager.enqueue("notes", "and soon", delay=0.3)
        db.session.commit()
    all_are(fleet, "done", 2)
    early = [row.finished_at - row.due_at for row in fleet.messages() if row.claimed_at < row.due_at]
    assert early == []


def test_messages_of_other_processes_are_handled_at_once(fleet: Fleet) -> None:
    """A heartbeat would handle the last of them after minutes."""
    manager = fleet.manager(Notes, WORKERS_HEARTBEAT_SECONDS=MINUTE, WORKERS_LEASE_SECONDS=5 * MINUTE)
    manager.start()
    fleet.manager(Notes)
    wait_until(lambda: manager.presence.instance is not None, "the start")
    for number in range(3):
        fleet.enqueue("notes", number)
        all_are(fleet, "done", number + 1)


@on_postgresql
def test_other_processes_are_notified_of_due_messages_and_not_of_delayed_messages(fleet: Fleet) -> None:
    manager = fleet.manager(Notes)
    with manager.stores.connections.listening() as connection:
        connection.execute(f"LISTEN {CHANNEL}")
        fleet.enqueue("notes", "later", delay=HOUR)
        with manager.app.app_context():
            manager.enqueue_many("notes", ["later", "and later"], delay=HOUR)
            db.session.commit()
        fleet.enqueue("notes", "now")
        heard = next(connection.notifies(timeout=PATIENCE))
        assert heard.payload == "notes"
        assert list(connection.notifies(timeout=0)) == []


@pytest.mark.promise
def test_many_instances_share_the_messages_and_handle_each_once(fleet: Fleet) -> None:
    class Eager(Notes):
        concurrency = 2

    managers = [fleet.manager(Eager) for _ in range(4)]
    for manager in managers:
        manager.start()
        with manager.app.app_context():
            manager.enqueue_many("notes", range(500))
            db.session.commit()
    wait_until(lambda: states(fleet) == ["done"] * 2_000, "2,000 done messages")
    assert sorted(fleet.keys()) == sorted(f"notes:{row.id}" for row in fleet.messages())


def test_async_handlers_and_batch_handlers_work(fleet: Fleet) -> None:
    class Async(Notes):
        async def handle(self, message: Message, context: WorkerContext) -> None:
            effect(context, message.payload)

    class Many(MessageWorker):
        topic = "many"
        batch_size = 10

        def handle_many(self, messages: Any, context: WorkerContext) -> None:
            effect(context, [message.payload for message in messages])

    manager = fleet.manager(Async, Many)
    fleet.enqueue("notes", "one")
    fleet.enqueue("many", *range(12))
    manager.start()
    all_are(fleet, "done", 13)
    assert sorted(fleet.effects()) == sorted(["one", str(list(range(10))), str([10, 11])])


def test_a_payload_written_by_hand_that_is_not_json_is_buried_and_blocks_no_other_message(fleet: Fleet) -> None:
    manager = fleet.manager(Notes)
    fleet.enqueue("notes", "one", "two", "three")
    with fleet.engine.begin() as connection:
        first = select(tables.messages.c.id).order_by(tables.messages.c.id).limit(1).scalar_subquery()
        connection.execute(tables.messages.update().where(tables.messages.c.id == first).values(payload="{no"))
    manager.start()
    wait_until(lambda: states(fleet) == ["dead", "done", "done"], "the burial")
    assert "JSONDecodeError" in fleet.errors()[0].error


# -- failing ---------------------------------------------------------------------------------------


class Failing(Notes):
    """Fails at the payload "bad", after it left an effect."""

    def handle(self, message: Message, context: WorkerContext) -> None:
        effect(context, message.payload)
        if message.payload == "bad":
            raise ValueError(f"cannot do {message.payload}, attempt {message.attempt}")


def test_a_failing_message_is_retried_and_buried_with_every_error_while_its_neighbours_are_done(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    manager = fleet.manager(Failing)
    fleet.enqueue("notes", "one", "bad", "three")
    manager.start()
    wait_until(lambda: states(fleet) == ["done", "dead", "done"], "the burial")
    assert fleet.effects() == ["one", "three"]
    bad = fleet.messages()[1]
    errors = fleet.errors()
    assert [row.attempt for row in fleet.messages()] == [1, 3, 1]
    assert [(row.message, row.attempt) for row in errors] == [(bad.id, 1), (bad.id, 2), (bad.id, 3)]
    assert all(f"ValueError: cannot do bad, attempt {row.attempt}" in row.error for row in errors)
    assert all("Traceback" in row.error and row.instance_name for row in errors)
    assert (bad.attempt, bad.instance, bad.finished_at is not None) == (3, None, True)

    def said() -> list[str]:
        return [record.levelname for record in caplog.records if record.name == "background.failing"]

    wait_until(lambda: "ERROR" in said(), "the line about the burial")  # the log says so after the commit
    assert said().count("ERROR") == 1


def test_the_pause_before_another_attempt_doubles(fleet: Fleet) -> None:
    attempts: list[tuple[datetime, datetime]] = []

    class Slower(Failing):
        backoff = timedelta(seconds=0.2)

        def handle(self, message: Message, context: WorkerContext) -> None:
            attempts.append((message.due_at, datetime.now(UTC)))
            super().handle(message, context)

    manager = fleet.manager(Slower)
    fleet.enqueue("notes", "bad")
    manager.start()
    wait_until(lambda: states(fleet) == ["dead"], "the burial")
    (_, first), (second_due, second), (third_due, _) = attempts
    assert second_due - first >= timedelta(seconds=0.14)
    assert third_due - second >= timedelta(seconds=0.29)


@pytest.mark.parametrize("backoff", [timedelta(seconds=1), timedelta.max])
def test_the_pause_is_spread_by_a_quarter_and_grows_to_an_hour_at_most(backoff: timedelta) -> None:
    slow = make(backoff=backoff)
    for attempt in (1, 2, 12, 13, 2_000):
        full = min(backoff.total_seconds() * 2 ** min(attempt - 1, 12), 3_600)
        pauses = [pause_after(slow, attempt).total_seconds() for _ in range(500)]
        assert 0.75 * full <= min(pauses) < 0.85 * full < 1.15 * full < max(pauses) <= 1.25 * full


Misdeed = Callable[[WorkerContext], None]


def roll_back(context: WorkerContext) -> None:
    context.session.rollback()


def remove_session(_context: WorkerContext) -> None:
    db.session.remove()


@pytest.mark.promise
@pytest.mark.parametrize("deed", [roll_back, remove_session])
def test_whatever_a_handler_does_with_its_session_its_neighbours_effects_are_kept_once(
    fleet: Fleet, deed: Misdeed
) -> None:
    class Daring(Notes):
        def handle(self, message: Message, context: WorkerContext) -> None:
            if message.payload == "daring":
                deed(context)
            effect(context, message.payload)

    manager = fleet.manager(Daring)
    fleet.enqueue("notes", "one", "two", "daring", "four", "daring", "six")
    manager.start()
    all_are(fleet, "done", 6)
    assert sorted(fleet.effects()) == sorted(["one", "two", "daring", "four", "daring", "six"])
    assert fleet.errors() == []


@pytest.mark.promise
def test_a_stopped_batch_keeps_its_handled_messages_and_hands_the_rest_back_untried(
    fleet: Fleet,
) -> None:
    reached, told = threading.Event(), threading.Event()

    class Slow(Notes):
        def handle(self, message: Message, context: WorkerContext) -> None:
            effect(context, message.payload)
            if message.payload == 1:
                reached.set()
                assert told.wait(PATIENCE)

    manager = fleet.manager(Slow)
    fleet.enqueue("notes", *range(5))
    manager.start()
    assert reached.wait(PATIENCE)
    manager.tell()
    told.set()
    manager.stop()
    assert states(fleet) == ["done"] * 2 + ["waiting"] * 3
    assert [row.attempt for row in fleet.messages()] == [1, 1, 0, 0, 0]
    fleet.manager(Notes).start()
    all_are(fleet, "done", 5)
    assert fleet.effects() == ["0", "1", "2", "3", "4"]


# -- pausing -----------------------------------------------------------------------------------


def test_a_paused_topic_waits_in_every_instance_and_its_batch_in_progress_goes_on(fleet: Fleet) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Slow(Notes):
        batch_size = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            began.set()
            go_on.wait(PATIENCE)
            effect(context, message.payload)

    managers = [fleet.manager(Slow, WORKERS_HEARTBEAT_SECONDS=0.1) for _ in range(2)]
    fleet.enqueue("notes", "one", "two", "three")
    managers[0].start()
    assert began.wait(PATIENCE)
    assert managers[1].pause("slow")  # the name of the worker
    assert not managers[0].messages.pause("notes")
    go_on.set()
    managers[1].start()
    wait_until(lambda: states(fleet)[0] == "done", "the end of the batch in progress")
    wait_until(lambda: managers[1].presence.instance is not None, "the start")
    fleet.enqueue("notes", "four")
    assert managers[1].stores.queue.claim("slow", "notes", 1, ("us", "here:1")) is None
    assert states(fleet) == ["done", "waiting", "waiting", "waiting"]
    assert managers[1].resume("slow")
    assert not managers[0].messages.resume("notes")
    all_are(fleet, "done", 4)
    assert sorted(fleet.effects()) == ["four", "one", "three", "two"]


@pytest.mark.promise
def test_a_resumed_topic_wakes_all_instances_long_before_their_heartbeats(fleet: Fleet) -> None:
    manager = fleet.manager(Notes, WORKERS_HEARTBEAT_SECONDS=PATIENCE, WORKERS_LEASE_SECONDS=3 * PATIENCE)
    manager.pause("notes")
    fleet.enqueue("notes", "one")
    manager.start()
    wait_until(lambda: manager.presence.instance is not None, "the start")
    fleet.manager(Notes).resume("notes")
    all_are(fleet, "done", 1)


@pytest.mark.promise
@pytest.mark.parametrize("is_paused", [False, True])
def test_an_idle_instance_with_delayed_or_paused_messages_is_one_statement_per_heartbeat(
    fleet: Fleet, is_paused: bool
) -> None:
    manager = fleet.manager(Notes)
    if is_paused:
        manager.pause("notes")
    fleet.enqueue("notes", "later", delay=None if is_paused else HOUR)
    manager.start()
    wait_until(lambda: manager.presence.instance is not None, "the start")

    def five_heartbeats() -> tuple[set[str], list[str]]:
        with statements(manager.stores.leases.engine) as beats, statements(manager.stores.main.engine) as others:
            wait_until(lambda: len(beats) >= 5, "five heartbeats")
        return {BEAT[fleet.engine.dialect.name] in statement for statement in beats}, others

    wait_until(lambda: five_heartbeats() == ({True}, []), "the end of what a start looks for")
    assert states(fleet) == ["waiting"]


def test_a_process_with_some_workers_can_enqueue_for_all_topics(fleet: Fleet) -> None:
    class Forwarding(Notes):
        def handle(self, message: Message, context: WorkerContext) -> None:
            current_workers.enqueue("letters", message.payload)

    class Letters(Notes):
        topic = "letters"

    manager = fleet.manager(Forwarding, Letters, Hourly)
    fleet.enqueue("notes", "a letter")
    manager.start({"forwarding"})
    wait_until(lambda: states(fleet) == ["done", "waiting"], "the forwarding")
    assert fleet.executions() == []
    fleet.manager(Letters).start()
    all_are(fleet, "done", 2)
    assert fleet.effects() == ["a letter"]

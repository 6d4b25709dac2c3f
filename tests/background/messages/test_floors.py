"""Floors: a look skips the entries of old messages, and each waiting message is still found."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event, update
from support.databases import on_postgresql
from support.fleet import HOUR, Fleet, db, effect, start_and_look, states, wait_until
from support.processes import PATIENCE

from background import BackgroundWorkerManager, Message, MessageWorker, WorkerContext
from background.database import tables
from background.ledger.leases import Instance
from background.messages import floors
from background.messages.floors import Floors

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
SELDOM = {"WORKERS_HEARTBEAT_SECONDS": 3 * PATIENCE, "WORKERS_LEASE_SECONDS": 9 * PATIENCE}


class Notes(MessageWorker):
    topic = "notes"
    backoff = timedelta()

    def handle(self, message: Message, context: WorkerContext) -> None:
        effect(context, message.payload)


@pytest.fixture
def slow_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each look without floors count as slow, as after an hour of messages beside a backup."""
    monkeypatch.setattr(floors, "_SLOW", 0.0)


@pytest.fixture
def exact_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use floors from the first heartbeat on, and leave no second to transactions in progress."""
    monkeypatch.setattr(floors, "_QUICK", 0.0)
    monkeypatch.setattr(floors, "_LATE", timedelta())


# -- one process's floors --------------------------------------------------------------------------


def heartbeat(these: Floors, seconds: float) -> bool:
    """Return whether a heartbeat, which took so many seconds, looked without floors."""
    beat = these.at_heartbeat([])
    these.after_heartbeat(beat, {}, NOON, seconds)
    return beat.is_full


def floors_in_use() -> Floors:
    these = Floors(2.0, may_help=True)
    assert heartbeat(these, 0.04)
    return these


def lifted(first: datetime, asked: datetime) -> datetime | None:
    these = floors_in_use()
    these.lift("notes", these.of("notes"), first, asked)
    return these.of("notes").at


def test_a_floor_is_the_first_message_found_and_leaves_a_second_to_transactions_in_progress() -> None:
    assert lifted(first=NOON - HOUR, asked=NOON) == NOON - HOUR
    assert lifted(first=NOON, asked=NOON) == NOON - SECOND
    assert lifted(first=NOON + HOUR, asked=NOON) == NOON - SECOND


def test_a_look_raises_the_floor_only_if_no_other_thread_changed_it_meanwhile() -> None:
    these = floors_in_use()
    first, second = these.of("notes"), these.of("notes")
    these.lift("notes", second, NOON, NOON + HOUR)
    these.lift("notes", first, NOON + SECOND, NOON + HOUR)
    assert these.of("notes").at == NOON
    these.lift("notes", first, NOON - SECOND, NOON + HOUR)
    assert these.of("notes").at == NOON - SECOND
    these.lift("notes", these.of("notes"), NOON + SECOND, NOON + HOUR)
    assert these.of("notes").at == NOON + SECOND


@pytest.mark.parametrize("change", [Floors.forget, partial(Floors.lower, topic="notes", at=NOON)])
def test_a_look_in_progress_does_not_raise_a_floor_that_was_lowered(change: Callable[[Floors], None]) -> None:
    these = floors_in_use()
    these.lift("notes", these.of("notes"), NOON + SECOND, NOON + HOUR)
    began = these.of("notes")
    change(these)
    these.lift("notes", began, NOON + 2 * SECOND, NOON + HOUR)
    assert these.of("notes").at in (None, NOON)


def test_after_a_slow_look_nine_heartbeats_look_from_the_floors() -> None:
    these = floors_in_use()
    assert [heartbeat(these, 0.04) for _ in range(3)] == [True] * 3
    assert [heartbeat(these, 0.06) for _ in range(21)] == [True, *[False] * 9] * 2 + [True]


def test_no_look_begins_at_a_floor_while_looks_are_quick() -> None:
    these = floors_in_use()
    these.lift("notes", these.of("notes"), NOON, NOON)
    heartbeat(these, 0.001)
    assert these.of("notes").at is None
    these.lift("notes", these.of("notes"), NOON, NOON)
    assert these.of("notes").at is None


# -- messages below the floor ----------------------------------------------------------------------


def has_floor(manager: BackgroundWorkerManager) -> bool:
    return manager.supervisor.consumers.floors.of("notes").at is not None


def all_are(fleet: Fleet, state: str, count: int) -> None:
    wait_until(lambda: states(fleet) == [state] * count, f"{count} messages that are {state}")


def start(manager: BackgroundWorkerManager) -> None:
    """Start, and send the only heartbeat of the test. A look forgets the floors, and a heartbeat begins their use."""
    start_and_look(manager)
    manager.supervisor._beat()


def handled_one(fleet: Fleet, manager: BackgroundWorkerManager) -> None:
    """Have the process handle a message, and so give the topic a floor."""
    fleet.enqueue("notes", "first")
    all_are(fleet, "done", 1)


@on_postgresql
def test_a_claim_with_a_floor_finds_no_older_message(fleet: Fleet) -> None:
    queue = fleet.manager(Notes).stores.queue
    fleet.enqueue("notes", "older")
    fleet.enqueue("notes", "newer")
    newer = fleet.messages()[1]
    batch = queue.claim("notes", "notes", 10, ("us", "here:1"), newer.due_at)
    assert batch is not None
    assert batch.ids == [newer.id]
    assert queue.claim("notes", "notes", 10, ("us", "here:1"), newer.due_at) is None
    assert queue.claim("notes", "notes", 10, ("us", "here:1"))


@on_postgresql
def test_the_messages_of_a_batch_are_found_by_their_ids_not_among_all_that_ran(fleet: Fleet) -> None:
    stores = fleet.manager(Notes).stores
    for number in range(10):
        fleet.enqueue("notes", number)
    batch = stores.queue.claim("notes", "notes", 10, ("us", "here:1"))
    assert batch is not None
    asked: list[tuple[str, Any]] = []

    def remember(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        asked.append((statement, parameters))

    event.listen(stores.main.engine, "before_cursor_execute", remember)
    with stores.main.engine.begin() as connection:
        stores.queue.acknowledge(batch, batch.ids[:5], batch.ids, connection)
    assert len(stores.queue.left(batch)) == 5
    event.remove(stores.main.engine, "before_cursor_execute", remember)
    with stores.main.engine.connect() as connection:
        plans = ["\n".join(connection.exec_driver_sql(f"EXPLAIN {each}", more).scalars()) for each, more in asked]
    assert len(plans) == 2
    assert [plan for plan in plans if "ix_background_messages_running" in plan] == []


@on_postgresql
@pytest.mark.parametrize("is_slow", [False, True])
def test_a_heartbeat_finds_a_message_that_was_committed_late_while_newer_messages_keep_coming(
    fleet: Fleet, is_slow: bool, monkeypatch: pytest.MonkeyPatch, exact_floors: None
) -> None:
    monkeypatch.setattr(floors, "_SLOW", 0.0 if is_slow else 1e9)

    class Chain(Notes):
        batch_size = 1

        def handle(self, message: Message, context: WorkerContext) -> None:
            if message.payload == "late":
                is_handled.set()
            elif not is_handled.is_set():
                manager.enqueue("notes", "next")

    is_handled = threading.Event()
    manager = fleet.manager(Chain)
    elsewhere = fleet.app(Chain)
    with elsewhere.app_context():
        elsewhere.extensions["background_workers"].enqueue("notes", "late")
        manager.start()
        with manager.app.app_context():
            manager.enqueue("notes", "next")
            db.session.commit()
        wait_until(lambda: has_floor(manager), "a floor above the late message")
        db.session.commit()
    assert is_handled.wait(20)


def test_a_message_that_failed_without_a_backoff_is_claimed_again_without_a_heartbeat(
    fleet: Fleet, exact_floors: None
) -> None:
    class Second(Notes):
        concurrency = 2

        def handle(self, message: Message, context: WorkerContext) -> None:
            if message.payload == "slow" and message.attempt == 1:
                began.set()
                assert may_fail.wait(20)
                raise RuntimeError("again")

    began, may_fail = threading.Event(), threading.Event()
    manager = fleet.manager(Second, **SELDOM)
    start(manager)
    fleet.enqueue("notes", "slow")
    assert began.wait(20)
    fleet.enqueue("notes", "newer")
    wait_until(lambda: states(fleet) == ["running", "done"], "the newer message")
    may_fail.set()
    all_are(fleet, "done", 2)


@on_postgresql
def test_messages_that_another_process_handed_back_are_found_without_a_heartbeat(
    fleet: Fleet, exact_floors: None
) -> None:
    other = fleet.manager(Notes, **SELDOM)
    instance = other.presence.sign_on()
    fleet.enqueue("notes", "older")
    batch = other.stores.queue.claim("notes", "notes", 1, (instance.id, instance.name))
    assert batch is not None
    manager = fleet.manager(Notes, **SELDOM)
    start(manager)
    fleet.enqueue("notes", "newer")
    wait_until(lambda: has_floor(manager), "a floor")
    other.stores.queue.hand_back(batch, batch.ids)
    all_are(fleet, "done", 2)


@on_postgresql
def test_an_old_message_that_was_moved_to_a_topic_is_found_without_a_heartbeat(
    fleet: Fleet, exact_floors: None
) -> None:
    fleet.manager(type("Others", (Notes,), {"topic": "others"}))
    [older] = fleet.enqueue("others", "older")
    manager = fleet.manager(Notes, **SELDOM)
    start(manager)
    fleet.enqueue("notes", "newer")
    wait_until(lambda: has_floor(manager), "a floor")
    manager.stores.dead_letters.move([older or 0], "notes")
    all_are(fleet, "done", 2)


@on_postgresql
def test_a_heartbeat_from_the_floors_looks_for_messages_to_take_back_after_an_instance_has_gone(fleet: Fleet) -> None:
    stores = fleet.manager(Notes).stores
    us, other = Instance(HOUR), Instance(HOUR)
    stores.leases.beat(other)
    fleet.enqueue("notes", "held")
    assert stores.queue.claim("notes", "notes", 1, (other.id, other.name))
    assert stores.leases.beat(us, ["notes"]).is_busy
    assert not stores.leases.beat(us, ["notes"], {"notes": None}).is_busy
    stores.leases.sign_off(other)
    assert stores.leases.beat(us, ["notes"], {"notes": None}).is_busy


def test_a_paused_topic_keeps_its_floor_and_is_handled_whole_after_the_pause(fleet: Fleet, exact_floors: None) -> None:
    manager = fleet.manager(Notes)
    manager.start()
    handled_one(fleet, manager)
    manager.pause("notes")
    fleet.enqueue("notes", "waits")
    beats: list[Any] = []
    beat = manager.stores.leases.beat
    manager.stores.leases.beat = lambda *arguments: beats.append(beat(*arguments)) or beats[-1]  # type: ignore[method-assign]
    wait_until(lambda: len(beats) > 2, "heartbeats")
    assert [pulse.due for pulse in beats] == [{}] * len(beats)
    floor = manager.supervisor.consumers.floors.of("notes").at
    assert floor is None or floor <= fleet.messages()[1].due_at
    manager.resume("notes")
    all_are(fleet, "done", 2)


@pytest.mark.promise
@on_postgresql
def test_a_message_below_the_floor_that_a_user_edited_is_found_by_the_tenth_heartbeat(
    fleet: Fleet, slow_looks: None, exact_floors: None
) -> None:
    manager = fleet.manager(Notes)
    manager.start()
    handled_one(fleet, manager)
    fleet.enqueue("notes", "later", delay=HOUR)
    wait_until(lambda: has_floor(manager), "a floor")
    with fleet.engine.begin() as connection:
        edited = update(tables.messages).where(tables.messages.c.state == "waiting")
        connection.execute(edited.values(due_at=NOON - 1000 * HOUR))
    all_are(fleet, "done", 2)
